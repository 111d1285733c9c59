"""The Triton kernel where there is no GPU: its laws (tests/gpu/test_grouped_triton.py) hold in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

LAWS = Path(__file__).parent.parent / "gpu" / "test_grouped_triton.py"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: CUDA builds of torch bring it"
)
def test_the_kernels_laws_hold_in_the_interpreter() -> None:
    """In a process of its own: Triton asks for the variable when a kernel is defined."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", str(LAWS)]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
