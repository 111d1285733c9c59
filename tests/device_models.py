"""Models by the device's trunk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experts.checkpoint import open_checkpoint
from router.model.device.load import load_device_model
from router.model.load import Model

CPU = torch.device("cpu")


def run_again(run: Callable[[], None]) -> Callable[[], None]:
    """What capturing a CUDA graph is on the CPU."""
    return run


def device_model(
    directory: Path, dtype: torch.dtype = torch.float32, device: torch.device = CPU, **changes: Any
) -> Model:
    return load_device_model(open_checkpoint(directory), dtype, device, **changes)
