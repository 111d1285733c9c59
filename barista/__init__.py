"""The ground floor: small, torch-free, imports nothing of ours."""

__version__ = "0.1.0"
