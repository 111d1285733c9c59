"""Engines other than ours whose experts the pool can compute. Each module needs its engine installed; nothing of ours
imports them.
"""
