"""Experts on workers beside experts in the engine, in one run: the wire, tokens a second, and a worker's death.

    python -m benchmarks.pool [--model M] [--format F] [--workers 2] [--threads 1] [--sequences 1,16]
                              [--transport shm|grpc] [--tls-dir DIR] [--tokens 64] [--rounds 3] [--fault] [--json]

The workers are started with Ray, in a cluster of this run alone or the one at RAY_ADDRESS, which `ray job submit` sets.

Wire: one dispatch-and-combine of one token, layer by layer, through the call that the engine makes, with a pause as
long as the trunk's work between two calls. A call contains the experts' own compute, which is told in two ways:
`compute` is that of the slowest worker of the call, by its own clock, and `above` the rest of that very call; `local`
is kernels.expert_rows over all of the token's pairs by one thread of this process. Every figure is the median of the
rounds' percentiles.

Tokens/s: generated tokens over the wall time of the call, prompt included, of an engine whose experts are on the
workers and of one with its own experts. Both engines have all cores' threads. Rounds alternate, and the ratio is the
median of the rounds' ratios.

Fault: eight streams, twice in each round; in the second time one worker is killed once half of the tokens are there.
The longest gap is between two tokens of one stream. Exits 1 if the texts differ.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from barista.config import ServeConfig
from barista.errors import BaristaError
from barista.machine import usable_cores
from barista.v1 import controller_pb2 as pb
from benchmarks.wire import measure_wires
from router.engine_process import EngineProcess
from router.messages import EngineConfig, Failed, PoolAddress, SamplingParams, Submit
from router.models import BUILT_IN, prepare_built_in, resolve
from router.pool_order import pool_process
from router.pool_process import PoolProcess

PROMPT_TOKENS = 32
WIRE_CALLS = 1000
FAULT_STREAMS = 8
WHOLE_SECONDS = 120.0
LOOPBACK = "127.0.0.1:"


def main() -> None:
    """Measure and print the tables."""
    args = parse(sys.argv[1:])
    try:
        results = asyncio.run(measure(args))
    except BaristaError as error:
        sys.exit(f"{error.message} {error.remedy}".strip())
    print(json.dumps(results) if args.json else report(results))
    sys.exit("the texts differ from those without the fault" if not results.get("fault", {}).get("equal", True) else 0)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line. sequences becomes a list."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pool", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=BUILT_IN)
    parser.add_argument("--format", default="auto", help="of the weights")
    parser.add_argument("--workers", type=_positive, default=2)
    parser.add_argument("--threads", type=_positive, default=1, help="of each worker")
    parser.add_argument("--sequences", type=_positives, default=[1, 16])
    parser.add_argument(
        "--transport", choices=("shm", "grpc"), default="shm", help="grpc: where workers are on other hosts"
    )
    parser.add_argument("--tls-dir", type=Path, help="needed where workers are on other hosts")
    parser.add_argument("--tokens", type=_positive, default=64)
    parser.add_argument("--rounds", type=_positive, default=3)
    parser.add_argument("--fault", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for."""
    path = resolve(args.model) if args.model != BUILT_IN else prepare_built_in(lambda fraction, message: None)
    results: dict[str, Any] = {
        "model": args.model,
        "format": args.format,
        "workers": args.workers,
        "worker_threads": args.threads,
        "engine_threads": usable_cores(),
        "load": os.getloadavg()[0],
    }
    async with started_pool(args, path) as (pool, address):
        transports = ("shm", "grpc") if args.transport == "shm" else ("grpc",)
        addresses = [replace(address, transport=transport) for transport in transports]
        async with started_engine(path, args.format, address) as remote:
            await whole(pool, remote)
            results["wire"] = await asyncio.to_thread(
                lambda: list(measure_wires(path, args.format, addresses, args.rounds, WIRE_CALLS))
            )
            async with started_engine(path, args.format, None) as local:
                results["generate"] = [await compare(remote, local, count, args) for count in args.sequences]
            if args.fault:
                results["fault"] = await measure_fault(pool, remote, args)
    return results


# ---------------------------------------------------------------- what is measured


@asynccontextmanager
async def started_pool(args: argparse.Namespace, path: Path) -> AsyncIterator[tuple[PoolProcess, PoolAddress]]:
    """The workers, as `barista serve` starts them."""
    config = ServeConfig(
        model=str(path),
        format=args.format,
        workers=args.workers,
        worker_threads=args.threads,
        transport=args.transport,
        tls_dir=args.tls_dir,
    )
    pool = pool_process(config, path)
    try:
        yield pool, await pool.start(lambda fraction, message: progress(message))
    finally:
        await pool.close()


@asynccontextmanager
async def started_engine(path: Path, weight_format: str, pool: PoolAddress | None) -> AsyncIterator[EngineProcess]:
    """An engine with all cores' threads. pool: None for experts of its own."""
    engine = EngineProcess(EngineConfig(path=str(path), format=weight_format, threads=usable_cores()))
    try:
        await engine.start(pool=pool)
        yield engine
    finally:
        await engine.close()


async def whole(pool: PoolProcess, engine: EngineProcess) -> pb.PoolState:
    """The pool's state once every worker is ready and the engine attached to it."""
    deadline = time.monotonic() + WHOLE_SECONDS
    while time.monotonic() < deadline:
        state, stats = await pool.client.state(), await engine.stats()
        links = {} if stats.pool is None else {link.worker: link.state for link in stats.pool.links}
        if state.coverage == 1 and all(
            worker.state == pb.WORKER_STATE_READY and links.get(worker.name) == "ready" for worker in state.workers
        ):
            return state
        await asyncio.sleep(0.2)
    raise BaristaError(f"The pool is not whole after {WHOLE_SECONDS:.0f} s: {state.problem or state.workers}")


@dataclass(slots=True)
class Streams:
    """What some streams gave. tokens: of each; gap: the longest, in seconds, between two tokens of one stream."""

    tokens: list[list[int]]
    gap: float = 0.0
    seconds: float = 0.0
    count: int = 0


async def generate(
    engine: EngineProcess,
    prompts: list[list[int]],
    tokens: int,
    on_token: Callable[[int], None] = lambda count: None,
) -> Streams:
    """Every prompt at once, greedily. on_token: told how many tokens there are so far."""
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    streams = Streams([[] for _ in prompts])

    async def one(index: int) -> None:
        last: float | None = None
        submit = Submit(f"{time.monotonic_ns()}-{index}", tuple(prompts[index]), sampling)
        async for event in engine.submit(submit):
            if isinstance(event, Failed):
                raise BaristaError(f"A request failed: {event.message}")
            now = time.perf_counter()
            streams.gap, last = max(streams.gap, 0.0 if last is None else now - last), now
            streams.tokens[index].append(event.token_id)
            streams.count += 1
            on_token(streams.count)

    started = time.perf_counter()
    await asyncio.gather(*map(one, range(len(prompts))))
    streams.seconds = time.perf_counter() - started
    return streams


async def compare(remote: EngineProcess, local: EngineProcess, count: int, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second with `count` sequences."""
    rates: dict[str, list[float]] = {"workers": [], "local": []}
    for engine in (remote, local):
        await generate(engine, random_prompts(count, engine.model.vocab_size, 0), 4)
    for index in range(args.rounds):
        prompts = random_prompts(count, remote.model.vocab_size, index + 1)
        for name, engine in (("workers", remote), ("local", local)):
            rates[name].append(count * args.tokens / (await generate(engine, prompts, args.tokens)).seconds)
        ours, theirs = rates["workers"][-1], rates["local"][-1]
        progress(f"{count} sequences, round {index + 1}: {ours:.1f} on workers, {theirs:.1f} local, tokens/s")
    return generate_row(count, rates["workers"], rates["local"])


async def measure_fault(pool: PoolProcess, engine: EngineProcess, args: argparse.Namespace) -> dict[str, Any]:
    """The longest gaps of all rounds, without and with a worker killed half-way."""
    dice = random.Random(0)
    total = FAULT_STREAMS * args.tokens
    calm, hurt, equal = [], [], True
    for index in range(args.rounds):
        prompts = random_prompts(FAULT_STREAMS, engine.model.vocab_size, index + 100)
        state = await whole(pool, engine)
        victim = dice.choice(list(state.workers))
        if not victim.address.startswith(LOOPBACK):
            raise BaristaError(f"{victim.name} is on another host ({victim.address}).", "Leave --fault out there.")

        def kill_half_way(count: int, pid: int = victim.pid) -> None:
            if count == total // 2:
                os.kill(pid, signal.SIGKILL)

        without = await generate(engine, prompts, args.tokens)
        with_fault = await generate(engine, prompts, args.tokens, kill_half_way)
        calm.append(without.gap)
        hurt.append(with_fault.gap)
        equal &= without.tokens == with_fault.tokens
        progress(f"{victim.name} killed: longest gap {hurt[-1]:.3f} s, without {calm[-1]:.3f} s")
    await whole(pool, engine)
    return {"streams": FAULT_STREAMS, "gap_s": max(hurt), "gap_without_s": max(calm), "equal": equal}


def random_prompts(count: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Random token ids, PROMPT_TOKENS each."""
    generator = random.Random(seed)
    return [[generator.randrange(10, vocab_size) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


# ---------------------------------------------------------------- how it is told


def generate_row(sequences: int, workers: Sequence[float], local: Sequence[float]) -> dict[str, Any]:
    """workers, local: tokens/s of each round."""
    return {
        "sequences": sequences,
        "workers": statistics.median(workers),
        "local": statistics.median(local),
        "ratio": statistics.median(a / b for a, b in zip(workers, local, strict=True)),
    }


def report(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"{results['model']}, format {results['format']}: {results['workers']} workers of "
        f"{results['worker_threads']} thread(s), engines of {results['engine_threads']}; "
        f"load average {results['load']:.1f} at the start.",
        "",
        "| wire | call p50, µs | p99 | compute | above p50 | above p99 | local | call - local |",
        "|---|---|---|---|---|---|---|---|",
    ]
    figures = (
        "call_p50_us", "call_p99_us", "compute_p50_us", "above_p50_us", "above_p99_us", "local_p50_us",
        "above_local_p50_us",
    )  # fmt: skip
    lines += [
        f"| {row['transport']} | " + " | ".join(f"{row[name]:.0f}" for name in figures) + " |"
        for row in results["wire"]
    ]
    lines += ["", "| sequences | workers, tokens/s | local, tokens/s | ratio |", "|---|---|---|---|"]
    lines += [
        f"| {row['sequences']} | {row['workers']:.1f} | {row['local']:.1f} | {row['ratio']:.2f}x |"
        for row in results["generate"]
    ]
    if "fault" in results:
        fault = results["fault"]
        lines += [
            "",
            f"A worker killed under {fault['streams']} streams: longest gap {fault['gap_s']:.3f} s, without "
            f"{fault['gap_without_s']:.3f} s; texts {'equal' if fault['equal'] else 'DIFFER'}.",
        ]
    return "\n".join(lines)


def progress(message: str) -> None:
    """A line on stderr."""
    print(message, file=sys.stderr, flush=True)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _positives(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
