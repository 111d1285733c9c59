"""How long one layer's dispatch-and-combine takes over a wire, and how much of it is the experts' own compute."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from barista.trust import Trust
from experts import kernels
from experts.checkpoint import open_checkpoint
from experts.expert_model import ExpertModel, expert_bytes
from experts.expert_weights import ExpertReader
from experts.formats import holding
from experts.numerics import numerics_id
from experts.packed.experts import expert_part
from experts.remote import PoolConfig, RemotePool
from router.messages import PoolAddress
from router.model.expert_model import expert_model

MAX_ROWS = 512  # the engine's default, for which it makes its windows
# Between two layers an engine works on its trunk for about so long, and the workers go to sleep.
TRUNK_SECONDS = 100e-6


@dataclass(slots=True)
class WireTimes:
    """Seconds of each call. compute: of the worker that computed longest in it, by its own clock."""

    call: list[float] = field(default_factory=list)
    compute: list[float] = field(default_factory=list)

    @property
    def above(self) -> list[float]:
        """What each call took beyond its experts' compute."""
        return [call - compute for call, compute in zip(self.call, self.compute, strict=True)]


class Rows:
    """One token's row and its choice of experts for each layer, made beforehand: random, the same for every wire."""

    def __init__(self, model: ExpertModel) -> None:
        generator = torch.Generator().manual_seed(0)
        dtype: torch.dtype = getattr(torch, model.dtype)
        self.hidden_states = torch.randn(1, model.hidden_size, generator=generator).to(dtype)
        self.topk_weights = torch.full((1, model.top_k), 1 / model.top_k)
        self.topk_ids = {
            layer: torch.randperm(spec.num_experts, generator=generator)[None, : model.top_k].int().contiguous()
            for layer, spec in model.layers.items()
        }


def read_model(path: Path, weight_format: str) -> ExpertModel:
    """The experts of a checkpoint, held as the engine holds them. weight_format: as `--format`."""
    checkpoint = open_checkpoint(path)
    return expert_model(checkpoint, holding(checkpoint, weight_format))


@contextmanager
def attached(model: ExpertModel, address: PoolAddress) -> Iterator[RemotePool]:
    """Attached to every worker of the pool, as an engine is."""
    config = PoolConfig(
        controller=address.controller,
        trust=Trust(address.token, None if address.tls_dir is None else Path(address.tls_dir)),
        transport=address.transport,
        numerics_id=numerics_id(getattr(torch, model.dtype), model.format),
        max_rows=MAX_ROWS,
    )
    remote = RemotePool(model, expert_bytes(open_checkpoint(model.path), model), config)
    try:
        remote.start()
        remote.wait_covered(lambda fraction, message: None)
        while not all(member.up for member in remote.roster.members):
            remote.roster.wait_changed(0.1)
        yield remote
    finally:
        remote.close()


def time_wire(remote: RemotePool, rows: Rows, steps: int) -> WireTimes:
    """`steps` decode steps of one token, layer by layer, through the call that the engine's trunk makes."""
    times = WireTimes()
    for step in range(steps):
        for layer, topk_ids in rows.topk_ids.items():
            work_on_trunk()
            before = [member.compute_seconds for member in remote.roster.members]
            started = time.perf_counter()
            _, failed = remote.experts.begin(step, layer, rows.hidden_states, topk_ids, rows.topk_weights).wait()
            times.call.append(time.perf_counter() - started)
            after = [member.compute_seconds for member in remote.roster.members]
            times.compute.append(max(b - a for a, b in zip(before, after, strict=True)))
            assert not failed.any()
    return times


class LocalExperts:
    """The same experts in this process, computed by one thread."""

    def __init__(self, model: ExpertModel) -> None:
        checkpoint, dtype = open_checkpoint(model.path), getattr(torch, model.dtype)
        part = expert_part(checkpoint, model.layers, model.format)  # the workers have packed it
        reader = ExpertReader(part.over(checkpoint), dtype)
        self.tables = {
            layer: kernels.ExpertTable(
                {e: reader.read(s, layer, e) for e in range(s.num_experts)}, s.num_experts, dtype=dtype
            )
            for layer, s in model.layers.items()
        }

    def time(self, rows: Rows, steps: int) -> list[float]:
        """Seconds of kernels.expert_rows over all of a layer's pairs, for the layers of `steps` steps."""
        kernels.set_num_threads(1)
        seconds = []
        for _ in range(steps):
            for layer, topk_ids in rows.topk_ids.items():
                work_on_trunk()
                started = time.perf_counter()
                kernels.expert_rows(rows.hidden_states, topk_ids, self.tables[layer])
                seconds.append(time.perf_counter() - started)
        return seconds


def measure_wires(
    path: Path, weight_format: str, addresses: Sequence[PoolAddress], rounds: int, calls: int
) -> Iterator[dict[str, Any]]:
    """One row for each wire, in microseconds: medians of the rounds' percentiles. calls: in a round, at least."""
    model = read_model(path, weight_format)
    rows, local = Rows(model), LocalExperts(model)
    steps = -(-calls // len(model.layers))
    here: list[list[float]] = []
    wires: dict[str, list[WireTimes]] = {address.transport: [] for address in addresses}
    local.time(rows, max(1, steps // 4))
    for _ in range(rounds):
        here.append(local.time(rows, steps))
        for address in addresses:
            with attached(model, address) as remote:
                time_wire(remote, rows, max(2, steps // 4))
                wires[address.transport].append(time_wire(remote, rows, steps))
    for transport, times in wires.items():
        yield wire_row(transport, times, here)


def wire_row(transport: str, rounds: Sequence[WireTimes], local: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Microseconds. local: seconds of the calls of each round without a wire."""
    call = median_percentile([times.call for times in rounds], 50)
    here = median_percentile(local, 50)
    return {
        "transport": transport,
        "calls": sum(len(times.call) for times in rounds),
        "call_p50_us": call,
        "call_p99_us": median_percentile([times.call for times in rounds], 99),
        "compute_p50_us": median_percentile([times.compute for times in rounds], 50),
        "above_p50_us": median_percentile([times.above for times in rounds], 50),
        "above_p99_us": median_percentile([times.above for times in rounds], 99),
        "local_p50_us": here,
        "above_local_p50_us": call - here,
    }


def median_percentile(rounds: Sequence[Sequence[float]], percent: int) -> float:
    """The median over rounds of a percentile of each (nearest rank), seconds in, microseconds out."""
    return 1e6 * statistics.median(sorted(times)[-(-len(times) * percent // 100) - 1] for times in rounds)


def work_on_trunk() -> None:
    """Busy, as an engine is."""
    end = time.perf_counter() + TRUNK_SECONDS
    while time.perf_counter() < end:
        pass
