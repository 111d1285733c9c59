"""A trace goes from the engine to its workers, over both wires, although nothing travels for it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from barista.tracer import Tracer
from experts.checkpoint import open_checkpoint
from experts.remote import PoolConfig
from experts.transport import grpc as grpc_transport
from router.engine.core import Engine
from router.engine.traces import EngineTraces
from router.kv_cache.blocks import BlockPool
from router.model.load import load_model
from router.scheduler import Scheduler
from tests.distributed.static_pool import shared_out, static_pool
from tests.distributed.workers import tiny_expert_model
from tests.engines import answer, request

NAMES = ("worker-0", "worker-1")
WIRES = ("shm", "grpc")
LAYERS, PROMPT, TOKENS = 2, 97, 4
ROWS_OF_A_MESSAGE = 32
ROW_BYTES = 32 * 4

Span = dict[str, Any]


@pytest.fixture(scope="module")
def spans(tmp_path_factory: pytest.TempPathFactory) -> list[Span]:
    """Of an engine on each wire, and of its workers, which have ended."""
    folder = tmp_path_factory.mktemp("traces")
    model, file = tiny_expert_model(folder / "tiny"), folder / "traces.jsonl"
    with (
        static_pool(model, *NAMES, flags=("--trace-to", str(file), "--trace-ratio", "1")) as pool,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(grpc_transport, "ROWS_MESSAGE_BYTES", ROWS_OF_A_MESSAGE * 2 * ROW_BYTES)
        pool.assign(shared_out(model, *NAMES))
        for wire in WIRES:
            serve(model.path, pool.config(transport=wire, max_rows=512), file)
        for worker in pool.workers.values():
            worker.end()
    return [json.loads(line) for line in file.read_text().splitlines()]


def serve(path: Path, config: PoolConfig, file: Path) -> None:
    """Two requests, side by side, on a traced engine."""
    tracer = Tracer(str(file), 1.0, "barista-engine", config.transport)
    model = load_model(open_checkpoint(path), torch.float32, pool=dataclasses.replace(config, tracer=tracer))
    assert model.remote is not None
    try:
        scheduler = Scheduler(
            BlockPool(32, 16), max_num_seqs=8, max_num_batched_tokens=512, max_model_len=256, eos_token_ids=()
        )
        engine = Engine(model, scheduler, EngineTraces(tracer, model.remote.engine_id))
        prompt = range(3, 3 + PROMPT)
        answer(engine, [request(name, prompt, max_tokens=TOKENS) for name in ("a", "b")])
    finally:
        model.remote.close()
        tracer.close()


def named(spans: list[Span], name: str) -> list[Span]:
    return [span for span in spans if span["name"] == name]


def place(span: Span) -> tuple[str, str]:
    return span["context"]["trace_id"], span["context"]["span_id"]


def parent(span: Span) -> tuple[str, str]:
    return span["context"]["trace_id"], span["parent_id"]


def test_a_computation_of_a_worker_has_the_engines_dispatch_as_its_parent(spans: list[Span]) -> None:
    dispatches = {place(span): span["attributes"] for span in named(spans, "dispatch")}
    computes = named(spans, "compute")
    assert len(computes) == len(dispatches) == len(named(spans, "dispatch"))
    assert {parent(span) for span in computes} == dispatches.keys()
    for span in computes:
        assert span["attributes"].items() <= dispatches[parent(span)].items()
        assert span["resource"]["attributes"]["service.name"] == "barista-worker"


def test_a_dispatch_has_its_step_as_its_parent(spans: list[Span]) -> None:
    steps = {place(span): span["attributes"]["barista.step"] for span in named(spans, "step")}
    assert len(steps) == len(WIRES) * TOKENS
    for span in named(spans, "dispatch"):
        assert steps[parent(span)] == span["attributes"]["barista.step"]


def test_each_message_is_a_dispatch_and_they_carry_every_pair_once(spans: list[Span]) -> None:
    pairs = dict.fromkeys(WIRES, 0)
    for span in named(spans, "dispatch"):
        pairs[span["attributes"]["barista.transport"]] += span["attributes"]["barista.pairs"]
    assert pairs == dict.fromkeys(WIRES, 2 * 2 * LAYERS * (PROMPT + TOKENS - 1))
    prefill = [
        span["attributes"]["barista.transport"]
        for span in named(spans, "dispatch")
        if (span["attributes"]["barista.step"], span["attributes"]["barista.layer"]) == (0, 0)
    ]
    assert prefill.count("shm") == len(NAMES)
    assert prefill.count("grpc") > len(NAMES)
