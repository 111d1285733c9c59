"""The GPU of this process."""

from __future__ import annotations

import torch

from barista.errors import ConfigError


def cuda_device() -> torch.device:
    """The process's first GPU, set to sum in float32. Raises ConfigError where torch cannot use one."""
    if torch.version.cuda is None:
        raise ConfigError(
            f"device is 'cuda', but torch {torch.__version__} is built for CPUs alone.",
            "Install one for CUDA, as PyPI's for Linux is (pip install --force-reinstall torch==2.13.0), or give "
            "--device cpu.",
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            "device is 'cuda', but no NVIDIA GPU is in reach of this process.",
            "See what nvidia-smi and CUDA_VISIBLE_DEVICES say, or give --device cpu.",
        )
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return torch.device("cuda", 0)
