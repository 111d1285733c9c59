"""Traces: both ends name a span alike, they hold nothing of a prompt, and who wants none pays nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.sampling import Decision, TraceIdRatioBased

from barista.config import load
from barista.errors import ConfigError
from barista.tracer import Tracer
from barista.tracing import DispatchSpans, SpanIds, check_target, is_recorded, open_tracer, request_ids, step_ids
from experts.checkpoint import open_checkpoint
from experts.link import LinkDown, RowsRequest
from experts.transport.traced import TracedLink, compute_observer
from router.engine.core import Engine
from router.engine.traces import EngineTraces
from router.kv_cache.blocks import BlockPool
from router.model.load import load_model
from router.scheduler import Scheduler
from tests.engines import answer, request
from tests.unit.fake_links import HIDDEN, Clock, FakeLink, random_weights
from tests.unit.tiny_model import write_tiny_model

ENGINE = "e5b1"
WORKER = "worker-0"
KEYS = {
    "request": {"request_id", "prompt_tokens", "generated_tokens", "finish_reason"},
    "step": {"step", "tokens", "sequences"},
    "dispatch": {"worker", "transport", "step", "layer", "attempt", "resend", "pairs"},
    "compute": {"worker", "step", "layer", "attempt", "pairs"},
}

names = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "traces.jsonl"


@pytest.fixture
def tracer(file: Path) -> Iterator[Tracer]:
    tracer = Tracer(str(file), 1.0, "barista-engine", "1")
    yield tracer
    tracer.close()


def spans_of(tracer: Tracer, file: Path) -> list[Mapping]:
    tracer.flush(30)
    return [json.loads(line) for line in file.read_text().splitlines()]


def ids_of(span: Mapping) -> SpanIds:
    return SpanIds(int(span["context"]["trace_id"], 16), int(span["context"]["span_id"], 16))


def rows(step: int, layer: int, attempt: int = 0) -> RowsRequest:
    ids = torch.tensor([[0, 2], [2, 1]], dtype=torch.int32).numpy()
    tokens = torch.tensor([0, 1], dtype=torch.int32).numpy()
    return RowsRequest(step, layer, attempt, 1, torch.randn(2, HIDDEN), tokens, ids, 4)


# ---- ids


@given(st.lists(names, max_size=40))
def test_both_ends_of_a_stream_name_its_dispatches_alike(stream: list[tuple[int, int, int]]) -> None:
    stream.sort(key=lambda name: name[0])  # a step never begins before the last one has ended
    ends = [DispatchSpans(ENGINE, WORKER, 1.0) for _ in range(2)]
    ours, theirs = ([end.next(*name) for name in stream] for end in ends)
    assert ours == theirs
    assert len(set(ours)) == len(stream)
    assert [ids and ids.trace_id for ids in ours] == [step_ids(ENGINE, step).trace_id for step, _, _ in stream]


def test_no_two_streams_share_a_span() -> None:
    ends = [DispatchSpans(engine, worker, 1.0) for engine in ("a", "b") for worker in ("worker-0", "worker-1")]
    assert len({end.next(1, 2, 0) for end in ends}) == 4
    assert step_ids("a", 1) != request_ids("a", 1)


@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.01, 0.5, 1.0]))
def test_a_step_is_recorded_as_the_standard_sampler_says(step: int, ratio: float) -> None:
    ids = step_ids(ENGINE, step)
    theirs = TraceIdRatioBased(ratio).should_sample(None, ids.trace_id, "").decision is Decision.RECORD_AND_SAMPLE
    assert is_recorded(ids, ratio) == theirs
    assert (DispatchSpans(ENGINE, WORKER, ratio).next(step, 0, 0) is not None) == theirs


def test_about_the_share_that_was_asked_for_is_recorded() -> None:
    recorded = sum(is_recorded(step_ids(ENGINE, step), 0.1) for step in range(10_000))
    assert 850 < recorded < 1150


# ---- off


def test_without_traces_nothing_of_opentelemetry_is_imported() -> None:
    program = (
        "import sys, router.engine.loop, experts.remote, experts.worker.server\n"
        "from barista.tracing import open_tracer\n"
        "assert open_tracer(None, 1.0, 'service', 'instance') is None\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_traces_are_off_unless_asked_for() -> None:
    config = load(None, {}, {})
    assert config.trace_to is None
    assert load(None, {}, {"trace_to": "t.jsonl", "trace_ratio": 1.0}).trace_ratio == 1.0
    with pytest.raises(ConfigError, match="--trace-to"):
        load(None, {}, {"trace_ratio": 0.5})
    with pytest.raises(ConfigError, match="more than all"):
        load(None, {}, {"trace_to": "t.jsonl", "trace_ratio": 1.5})


# ---- where spans go


def test_processes_may_share_a_file_and_each_line_is_a_span(file: Path) -> None:
    tracers = [open_tracer(str(file), 1.0, service, "1") for service in ("a", "b")]
    for index, tracer in enumerate(tracers):
        assert tracer is not None
        ids = step_ids(ENGINE, index)
        tracer.record("step", ids, 1.0, 1.25, {"n": index}, parent=request_ids(ENGINE, 1), links=[ids], error="lost")
        tracer.close()
    spans = [json.loads(line) for line in file.read_text().splitlines()]
    assert [ids_of(span).span_id for span in spans] == [step_ids(ENGINE, index).span_id for index in (0, 1)]
    assert [span["resource"]["attributes"]["service.name"] for span in spans] == ["a", "b"]
    assert [span["status"]["status_code"] for span in spans] == ["ERROR", "ERROR"]
    assert [int(span["parent_id"], 16) for span in spans] == [request_ids(ENGINE, 1).span_id] * 2


def test_an_endpoint_gets_spans_as_otlp() -> None:
    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            tracer = Tracer(f"http://127.0.0.1:{server.server_port}", 1.0, "barista-engine", "1")
            tracer.record("step", step_ids(ENGINE, 7), 1.0, 2.0, {})
            tracer.flush(30)
            tracer.close()
        finally:
            server.shutdown()
            thread.join()
    ((path, body),) = received
    assert path == "/v1/traces"
    (span,) = ExportTraceServiceRequest.FromString(body).resource_spans[0].scope_spans[0].spans
    assert span.trace_id == step_ids(ENGINE, 7).trace_id.to_bytes(16, "big")
    assert span.end_time_unix_nano - span.start_time_unix_nano == 10**9


def test_an_endpoint_asks_for_the_package_that_speaks_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'barista\[traces\]'"):
        check_target("http://127.0.0.1:4318")


@pytest.mark.parametrize("target", ["missing/folder/traces.jsonl", "grpc://127.0.0.1:4317"])
def test_where_traces_cannot_go_is_named(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=target):
        check_target(target)


# ---- what is in them


def test_every_request_has_a_span_that_says_how_it_ended_and_steps_link_to_it(
    tracer: Tracer, file: Path, tmp_path: Path
) -> None:
    model = load_model(open_checkpoint(write_tiny_model(tmp_path / "tiny")), torch.float32)
    scheduler = Scheduler(
        BlockPool(64, 4), max_num_seqs=8, max_num_batched_tokens=64, max_model_len=256, eos_token_ids=()
    )
    engine = Engine(model, scheduler, EngineTraces(tracer, ENGINE))
    gone = request("gone", [8], max_tokens=9)
    engine.submit(gone)
    engine.abort(("gone",))
    answer(engine, [request("a", [5, 6, 7], max_tokens=4), request("b", [5, 6], max_tokens=2), request("bad", [-1])])
    spans = spans_of(tracer, file)
    ends = {
        span["attributes"]["barista.request_id"]: tuple(
            span["attributes"][f"barista.{key}"] for key in ("prompt_tokens", "generated_tokens", "finish_reason")
        )
        for span in spans
        if span["name"] == "request"
    }
    assert ends == {
        "a": (3, 4, "length"),
        "b": (2, 2, "length"),
        "bad": (1, 0, "invalid_request"),
        "gone": (1, 0, "aborted"),
    }
    steps = [span for span in spans if span["name"] == "step"]
    assert [ids_of(span) for span in steps] == [step_ids(ENGINE, step) for step in range(4)]
    assert [span["attributes"]["barista.tokens"] for span in steps] == [5, 2, 1, 1]
    requests = {ids_of(span).span_id for span in spans if span["name"] == "request"}
    linked = [{int(link["context"]["span_id"], 16) for link in span["links"]} for span in steps]
    assert [len(links) for links in linked] == [2, 2, 1, 1]
    assert all(links <= requests for links in linked)


def test_a_computation_is_below_its_dispatch_and_a_dispatch_below_its_step(tracer: Tracer, file: Path) -> None:
    clock = Clock()
    link = TracedLink(FakeLink(clock, random_weights(), range(6)), tracer, ENGINE, WORKER)
    observe = compute_observer(tracer, ENGINE, WORKER)
    for attempt in (0, 1):
        link.send(rows(3, 2, attempt))
        assert link.receive(clock.now + 1) is not None
        observe(3, 2, attempt, 4, 1000)
    spans = spans_of(tracer, file)
    dispatches, computes = ([span for span in spans if span["name"] == name] for name in ("dispatch", "compute"))
    assert [int(span["parent_id"], 16) for span in computes] == [ids_of(span).span_id for span in dispatches]
    assert [int(span["parent_id"], 16) for span in dispatches] == [step_ids(ENGINE, 3).span_id] * 2
    assert [span["attributes"]["barista.resend"] for span in dispatches] == [False, True]


def test_spans_hold_nothing_of_a_prompt(tracer: Tracer, file: Path) -> None:
    clock = Clock()
    link = TracedLink(FakeLink(clock, random_weights(), range(6)), tracer, ENGINE, WORKER)
    link.send(rows(0, 0))
    link.receive(clock.now + 1)
    compute_observer(tracer, ENGINE, WORKER)(0, 0, 0, 4, 1000)
    for span in spans_of(tracer, file):
        assert {key.removeprefix("barista.") for key in span["attributes"]} == KEYS[span["name"]]
        assert span["events"] == []


def test_a_dispatch_whose_worker_dies_says_so(tracer: Tracer, file: Path) -> None:
    fake = FakeLink(Clock(), random_weights(), range(6))
    fake.faults.append("down")
    link = TracedLink(fake, tracer, ENGINE, WORKER)
    link.send(rows(0, 0))
    with pytest.raises(LinkDown):
        link.receive(2000.0)
    (span,) = spans_of(tracer, file)
    assert span["status"] == {"status_code": "ERROR", "description": "the link went down"}
