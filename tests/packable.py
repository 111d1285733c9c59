"""Tiny models whose shapes every format takes: inputs that divide by 64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from barista.cache import cache_root
from experts import kernels
from tests import tiny

WIDE: dict[str, Any] = {"intermediate_size": 128}
MOE: dict[str, Any] = WIDE | {"moe_intermediate_size": 64}
LATENT: dict[str, Any] = MOE | {"v_head_dim": 16}
# Family -> what differs from tests/tiny.py.
CHANGES: dict[str, dict[str, Any]] = {
    "deepseek_v3": LATENT | {"q_lora_rank": 64, "n_shared_experts": 1},
    "deepseek_v3_no_q_lora": LATENT,
    "deepseek_v2": LATENT,
    "glm4_moe": MOE | {"n_shared_experts": 2},
    "qwen3_moe": MOE | {"head_dim": 32},
    "mixtral": WIDE,
    "olmoe": WIDE,
    "llama": WIDE,
    "llama_bias": WIDE,
    "qwen2": WIDE,
    "qwen3": WIDE | {"head_dim": 32},
}


def make(family: str, directory: Path) -> Path:
    """Write the family's tiny checkpoint; returns the directory."""
    tiny.make(family, directory, **CHANGES[family])
    return directory


def own_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make this the cache folder, with nothing in it but the compiled kernels."""
    kernels.load()
    folder.mkdir()
    (folder / "kernels").symlink_to(cache_root() / "kernels")
    monkeypatch.setenv("BARISTA_CACHE", str(folder))
    return folder
