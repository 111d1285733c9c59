"""µs of one layer between nodes (experts/transport/dist.py), both ways, beside `local` and shared memory.

    python -m benchmarks.dist [--model M] [--format F] [--workers 2] [--threads 1] [--tokens 1,16,128] [--rounds 3]
                              [--json]

All processes are on this host: gloo on the loopback interface, and the workers of `shm` started with Ray. One call is a
layer's dispatch and combine with random experts, the same for every wire, and contains the experts' own compute; before
it the engine is busy as long as with its trunk. `local` computes with as many threads as one worker. The rows that come
back are compared with those of `local`: "equal" says whether every byte was the same. Figures are the medians over the
rounds of each round's percentile; where others use the cores, the tenth is what a call takes while they do not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace

from barista.errors import BaristaError
from benchmarks.pool import progress, started_pool
from benchmarks.wire import LocalExperts, attached, median_percentile, read_model, work_on_trunk
from experts import kernels
from experts.expert_model import ExpertModel
from experts.pool import DispatchBatch, Transport
from experts.transport.dist import DistTransport
from experts.transport.dist_agreement import WAYS
from experts.transport.dist_model import deal
from experts.transport.dist_rendezvous import Rendezvous
from experts.transport.local import LocalTransport
from router.messages import PoolAddress
from router.models import BUILT_IN, prepare_built_in, resolve

START_SECONDS = 120.0
CALLS = 300  # of each wire in each round, at least

Times = dict[str, dict[int, list[list[float]]]]  # seconds by wire and number of tokens: each round's calls


def main() -> None:
    """Measure and print a table."""
    args = parse(sys.argv[1:])
    try:
        rows = asyncio.run(measure(args))
    except BaristaError as error:
        sys.exit(str(error))
    print(json.dumps(rows) if args.json else report(args, rows))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, with what benchmarks.pool.started_pool reads beside it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dist", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=BUILT_IN)
    parser.add_argument("--format", default="auto", help="of the weights")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each worker, and of local")
    parser.add_argument("--tokens", type=lambda text: [int(part) for part in text.split(",")], default=[1, 16, 128])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(transport="shm", tls_dir=None)
    return parser.parse_args(arguments)


async def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each number of tokens and wire."""
    path = resolve(args.model) if args.model != BUILT_IN else prepare_built_in(lambda fraction, message: None)
    async with started_pool(args, path) as (_, address):
        return await asyncio.to_thread(measure_wires, args, path, replace(address, transport="shm"))


def measure_wires(args: argparse.Namespace, path: Path, address: PoolAddress) -> list[dict[str, Any]]:
    """As `measure`, with a pool that serves."""
    model = read_model(path, args.format)
    kernels.set_num_threads(args.threads)
    local = LocalTransport(LocalExperts(model).tables)
    batches = {num_tokens: random_batches(model, num_tokens) for num_tokens in args.tokens}
    expected = {n: [local.combine(batch)[0] for batch in batches[n]] for n in args.tokens}
    times: Times = {wire: {n: [] for n in args.tokens} for wire in ("local", "shm", *WAYS)}
    equal = dict.fromkeys(times, True)

    def time_wire(wire: str, transport: Transport) -> None:
        for n in args.tokens:
            rows = run(transport, batches[n])
            equal[wire] &= all(torch.equal(a, b) for a, b in zip(rows, expected[n], strict=True))
            times[wire][n].append(time_calls(transport, batches[n]))

    for number in range(args.rounds):
        progress(f"round {number + 1} of {args.rounds}")
        time_wire("local", local)
        with attached(model, address) as remote:
            time_wire("shm", remote.group)
        with between_nodes(model, args.workers, args.threads) as (rendezvous, names):
            for way in WAYS:
                assert rendezvous.gather(len(names), START_SECONDS) == names
                agreement = deal(model, names, way=way)
                transport = DistTransport(rendezvous.form(agreement, START_SECONDS), agreement)
                time_wire(way, transport)
                transport.leave()
    return [
        {
            "tokens": n,
            "wire": wire,
            "p10_us": median_percentile(times[wire][n], 10),
            "p50_us": median_percentile(times[wire][n], 50),
            "p90_us": median_percentile(times[wire][n], 90),
            "equal": equal[wire],
        }
        for n in args.tokens
        for wire in times
    ]


@contextmanager
def between_nodes(model: ExpertModel, workers: int, threads: int) -> Iterator[tuple[Rendezvous, tuple[str, ...]]]:
    """A rendezvous, and the names of the workers that are on their way to it."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rendezvous, names = Rendezvous(), tuple(f"node-{index}" for index in range(workers))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "model.json").write_text(model.to_json())
        command = [sys.executable, "-m", "experts.worker.dist", "--engine", rendezvous.address]
        command += ["--model", str(folder / "model.json"), "--threads", str(threads), "--capacity", str(1 << 40)]
        for name in names:
            process = stack.enter_context(subprocess.Popen([*command, "--name", name], stderr=subprocess.DEVNULL))
            stack.callback(process.kill)
        yield rendezvous, names


def random_batches(model: ExpertModel, num_tokens: int) -> list[DispatchBatch]:
    """One for each layer."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.full((num_tokens, model.top_k), 1 / model.top_k)
    batches = []
    for layer, spec in model.layers.items():
        order = torch.rand(num_tokens, spec.num_experts, generator=generator).argsort(1)
        rows = torch.randn(num_tokens, model.hidden_size, generator=generator).to(getattr(torch, model.dtype))
        batches.append(DispatchBatch(0, layer, rows, order[:, : model.top_k].int().contiguous(), weights))
    return batches


def run(transport: Transport, batches: Sequence[DispatchBatch]) -> list[torch.Tensor]:
    """Every layer once."""
    return [transport.combine(transport.dispatch(batch))[0] for batch in batches]


def time_calls(transport: Transport, batches: Sequence[DispatchBatch]) -> list[float]:
    """Seconds of each call, layer by layer."""
    seconds = []
    for _ in range(-(-CALLS // len(batches))):
        for batch in batches:
            work_on_trunk()
            started = time.perf_counter()
            _, failed = transport.combine(transport.dispatch(batch))
            seconds.append(time.perf_counter() - started)
            assert not failed.any()
    return seconds


def report(args: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        f"{args.model}, format {args.format}: {args.workers} workers of {args.threads} thread(s); load average "
        f"{os.getloadavg()[0]:.1f} at the end.",
        "",
        "| tokens | wire | p10, µs | p50 | p90 | bytes of local |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['tokens']} | {row['wire']} | {row['p10_us']:.0f} | {row['p50_us']:.0f} | {row['p90_us']:.0f} | "
        f"{'equal' if row['equal'] else 'not equal'} |"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
