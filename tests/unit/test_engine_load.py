"""An engine's model on a GPU: what it is told, and what is left for its KV cache."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from barista.errors import ConfigError
from experts.checkpoint import open_checkpoint
from experts.expert_parallel.pool import GroupConfig
from experts.formats import Holding
from router.device_memory import LEAST_RESERVE
from router.engine import load as load_module
from router.engine import loop
from router.engine.core import kv_bytes_per_token
from router.engine.load import Loaded, load_on_cuda
from router.framing import frame, read_frame
from router.messages import EngineConfig, Fatal, decode_event, encode
from router.model.load import Model
from tests import tiny
from tests.device_models import CPU

GIB = 2**30


def load(folder: Path, monkeypatch: pytest.MonkeyPatch, *, free: int = 60 * GIB, **changes: object) -> Loaded:
    """As on a GPU of 80 GiB; the CPU stands in for it."""
    tiny.make("qwen3_moe", folder)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * GIB))
    config = EngineConfig(path=str(folder), device="cuda", **changes)  # type: ignore[arg-type]
    return load_on_cuda(config, open_checkpoint(folder), Holding("float32"), lambda fraction, message: None, CPU)


def test_unasked_the_cache_holds_every_sequence_that_may_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(tmp_path, monkeypatch, max_num_seqs=3, max_model_len=100)
    assert loaded.free == 60 * GIB
    assert loaded.default_kv == 3 * 100 * kv_bytes_per_token(loaded.model)


def test_the_cache_never_takes_what_steps_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(tmp_path, monkeypatch, free=LEAST_RESERVE).default_kv == 0


def test_a_model_that_the_gpu_cannot_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="of a GPU's memory"):
        load(tmp_path, monkeypatch, free=1000)


def test_its_numerics_name_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = ".".join(torch.__version__.split(".")[:2])
    assert load(tmp_path, monkeypatch).numerics_id == f"cpu-torch{version}-float32"


def test_workers_of_the_engines_own_are_made_for_its_largest_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_module, "visible_uuids", lambda: ("GPU-a", "GPU-b", "GPU-c"))
    made: list[GroupConfig] = []

    def no_group(*_: object, group: GroupConfig, **__: object) -> Model:
        made.append(group)
        raise ConfigError("no GPU here")

    monkeypatch.setattr(load_module, "load_device_model", no_group)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    with pytest.raises(ConfigError, match="no GPU here"):
        load(tmp_path, monkeypatch, gpu_workers=2, max_num_batched_tokens=100, max_num_seqs=99)
    (config,) = made
    assert config.engine == torch.device("cuda", 0)
    assert config.workers == (torch.device("cuda", 1), torch.device("cuda", 2))
    assert config.max_tokens == 104  # 99 sequences are padded to it


def test_a_gpu_that_runs_full_is_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Loaded:
        raise torch.OutOfMemoryError("CUDA out of memory")

    tiny.make("qwen3_moe", tmp_path)
    monkeypatch.setattr(loop, "cuda_device", lambda: CPU)
    monkeypatch.setattr(loop, "load_on_cuda", full)
    api, engine = socket.socketpair()
    with api, engine:
        api.sendall(frame(encode(EngineConfig(path=str(tmp_path), device="cuda"))))
        loop.serve(engine)
        told = read_frame(api)
    assert told is not None
    event = decode_event(told)
    assert isinstance(event, Fatal)
    assert "GPU has not enough memory" in event.message
