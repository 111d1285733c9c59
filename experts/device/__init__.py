"""Experts on a torch device: the same rows as the CPU kernels, to rounding, in plain torch."""
