"""What a server asks of its pool, before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from barista.config import ServeConfig
from barista.errors import ConfigError
from router.pool_order import pool_order
from tests.unit.tiny_model import CONFIG, write_tiny_model

LAYERS, EXPERTS = CONFIG["num_hidden_layers"], CONFIG["num_experts"]
EXPERT_BYTES = 3 * CONFIG["hidden_size"] * CONFIG["moe_intermediate_size"] * 4


def test_workers_that_just_hold_all_experts_will_do(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    half = LAYERS * EXPERTS // 2 * EXPERT_BYTES
    assert pool_order(ServeConfig(workers=2, worker_memory=half), model).worker_memory == half


def test_workers_that_cannot_hold_all_experts_are_refused_with_what_is_missing_and_what_is_enough(
    tmp_path: Path,
) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    with pytest.raises(ConfigError) as refusal:
        pool_order(ServeConfig(workers=2, worker_memory=3 * EXPERT_BYTES), model)
    missing = (LAYERS * EXPERTS - 6) * EXPERT_BYTES
    assert f"{missing} bytes of memory for experts are missing" in refusal.value.message
    enough = int(refusal.value.remedy.split("--worker-memory ")[1].split(",")[0])
    assert pool_order(ServeConfig(workers=2, worker_memory=enough), model).workers == 2
