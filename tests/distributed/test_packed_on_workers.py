"""Experts of few bits on workers: the logits are those of local ones, to the byte."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from experts.checkpoint import open_checkpoint
from router.model.load import Model, load_model
from tests import packable
from tests.distributed.static_pool import StaticPool, shared_out, static_pool
from tests.distributed.workers import expert_model
from tests.forced import FORCED, PROMPTS, logits_of

WORKERS = ("worker-0", "worker-1")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packable.make("qwen3_moe", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=["int8", "int4"])
def pool(request: pytest.FixtureRequest, path: Path) -> Iterator[StaticPool]:
    """Each expert on one of two workers, which have packed them on their own, at the same time, in one cache."""
    model = expert_model(path, "bfloat16", request.param)
    with static_pool(model, *WORKERS) as pool:
        pool.assign(shared_out(model, *WORKERS))
        yield pool


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: StaticPool) -> Path:
    """Of the engine; the workers have another."""
    return packable.own_cache(tmp_path / "cache", monkeypatch)


@pytest.mark.parametrize("wire", ["shm", "grpc"])
def test_logits_are_those_of_local_experts_to_the_byte(pool: StaticPool, path: Path, cache: Path, wire: str) -> None:
    checkpoint, weight_format = open_checkpoint(path), pool.model.format
    config = pool.config("bfloat16", transport=wire)
    assert config.numerics_id.endswith(f"-bfloat16-{weight_format}")  # and workers attach to no other
    remote = load_model(checkpoint, torch.bfloat16, weight_format=weight_format, pool=config)
    try:
        (folder,) = (cache / "packed").iterdir()
        assert not (folder / "experts").exists()
        local = load_model(checkpoint, torch.bfloat16, weight_format=weight_format)
        for ours, theirs in zip(logits(local), logits(remote), strict=True):
            assert torch.equal(ours, theirs)
    finally:
        assert remote.remote is not None
        remote.remote.close()


def test_an_engine_of_another_format_is_not_attached(pool: StaticPool, path: Path) -> None:
    other = {"int8": "int4", "int4": "int8"}[pool.model.format]
    with pytest.raises(Exception, match=r"another checkpoint.*or format than " + other):
        load_model(open_checkpoint(path), torch.bfloat16, weight_format=other, pool=pool.config("bfloat16"))


def logits(model: Model) -> list[torch.Tensor]:
    return logits_of(model, PROMPTS, FORCED, 512)
