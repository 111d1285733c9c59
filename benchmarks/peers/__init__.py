"""Runners of other engines on the same work as benchmarks.engine, each for a Python environment of its own.

Each prints one JSON object: {"decode": {"1": tokens a second, ...}, "prefill_512": tokens a second}.
"""
