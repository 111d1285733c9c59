"""Models and experts for tests of the device's trunk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experts.checkpoint import open_checkpoint
from experts.kernels.expert_table import ExpertWeights
from router.model.device.load import load_device_model
from router.model.load import Model

CPU = torch.device("cpu")


def run_again(run: Callable[[], None], before: Callable[[], None]) -> Callable[[], None]:
    """What capturing a CUDA graph is on the CPU."""
    return run


def device_model(
    directory: Path, dtype: torch.dtype = torch.float32, device: torch.device = CPU, **changes: Any
) -> Model:
    return load_device_model(open_checkpoint(directory), dtype, device, **changes)


def expert_weights(num_experts: int, hidden: int, intermediate: int, dtype: torch.dtype) -> list[ExpertWeights]:
    """Random experts of one layer."""
    generator = torch.Generator().manual_seed(0)

    def draw(out: int, width: int) -> torch.Tensor:
        return (torch.randn(out, width, generator=generator) * width**-0.5).to(dtype)

    return [
        (draw(intermediate, hidden), draw(intermediate, hidden), draw(hidden, intermediate)) for _ in range(num_experts)
    ]
