"""The packed cache: weights of few bits, converted once and then mapped from the disk by every process that needs them.

`layout` says where each tensor lies (a pure function, torch-free), `index` whether a folder holds what the layout says,
`convert` fills it, and `expert_part` is the part of a model that workers need. A packed model is seen as a Checkpoint.
"""
