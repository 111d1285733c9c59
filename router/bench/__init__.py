"""A load generator for any OpenAI-compatible server. It knows HTTP only: nothing of the engine, and no torch.

arrivals  when requests come        prompts  what they say       load   who sends them when
client    one request               record   what it became      measure  one run
report    the figures of a run      table    the same for people
"""
