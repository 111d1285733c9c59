"""Measurements, each with the command that repeats it. Nothing imports this package."""
