"""The engine alone, without server or sampler: tokens a second of a checkpoint in a format, and the bytes it reads.

    python -m benchmarks.engine --model DIR [--format int4] [--context 32] [--greedy] [--rounds 3] [--json]

First a prompt of 512 tokens, uncounted. Then a prompt of 32 for each of 1, 4 and 16 sequences, three steps to warm up,
and 32 steps; and one prompt of 512.
Ids are those of one seed, so that every format touches the same experts; with --greedy each step decodes its own.
bytes_per_step: what a step must read as it is stored, scales included: the trunk but one embedding row a token, the KV
cache so far, and the distinct experts that the step was routed to. read_bandwidth: the median of measurements between
every 8 steps. limit: tokens/s of the shortest time that the steps can take (benchmarks/limit.py). share: of the limit,
each 8 steps with the bandwidth just before and after them, because that of a shared machine changes within a second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from barista.machine import usable_cores
from benchmarks.bandwidth import memory_reader
from benchmarks.ids import CONTEXT, PREFILL, SEQUENCES, STEPS, WARM_UP, Ids
from benchmarks.limit import Part, step_seconds
from experts import kernels
from experts.checkpoint import open_checkpoint
from experts.formats import Holding, holding
from router.kv_cache.storage import allocate_cache
from router.memory import held_bytes
from router.model.batch import Batch
from router.model.load import Model, load_model
from router.model.packed import EMBEDDING, model_forms
from router.model.spec import MoESpec
from router.model.tensors import trunk_tensors
from router.precision.run import Choices

BLOCK_SIZE = 16
STRETCH = 8  # steps between two looks at the memory


class Runner:
    """A loaded model and a cache for `sequences` sequences of `max_len` tokens."""

    def __init__(self, model: Model, sequences: int, max_len: int) -> None:
        self.model = model
        blocks = -(-max_len // BLOCK_SIZE)
        self.cache = allocate_cache(model.spec, sequences * blocks, BLOCK_SIZE, model.dtype)
        self.length = 0
        self._seq_ids = np.arange(sequences, dtype=np.int32)
        self._starts = self._seq_ids[:, None] * (blocks * BLOCK_SIZE)
        self._block_tables = torch.arange(sequences * blocks, dtype=torch.int32).view(sequences, blocks)

    @torch.inference_mode()
    def step(self, ids: list[list[int]]) -> torch.Tensor:
        """The next tokens of every sequence, equally many. Returns logits [sequences, vocab] of the last of each."""
        sequences, count = len(ids), len(ids[0])
        positions = np.arange(self.length, self.length + count, dtype=np.int32)
        batch = Batch(
            token_ids=torch.from_numpy(np.array(ids, dtype=np.int32).ravel()),
            positions=torch.from_numpy(np.tile(positions, sequences)),
            seq_ids=torch.from_numpy(self._seq_ids.repeat(count)),
            slots=torch.from_numpy((self._starts + positions).ravel()),
            block_tables=self._block_tables,
            sample_rows=torch.from_numpy(np.arange(count - 1, sequences * count, count)),
        )
        logits, failed = self.model.trunk.forward(batch, self.cache, 0)
        assert not failed.numpy().any()
        self.length += count
        return logits


class Stretch(NamedTuple):
    """Some steps in a row: their seconds, and bytes a second of the memory just before and after."""

    seconds: float
    bandwidth: float


def decode(model: Model, read_memory: Callable[[], float], sequences: int, context: int, greedy: bool) -> list[Stretch]:
    """STEPS steps, STRETCH in each."""
    ids = Ids(model.spec.vocab_size)
    runner = Runner(model, sequences, context + WARM_UP + STEPS)
    logits = prefill(runner, ids, sequences, context)

    def step(logits: torch.Tensor) -> tuple[torch.Tensor, float]:
        chosen = logits.argmax(-1)[:, None].tolist() if greedy else ids.draw(sequences)
        started = time.perf_counter()
        logits = runner.step(chosen)
        return logits, time.perf_counter() - started

    for _ in range(WARM_UP):
        logits, _ = step(logits)
    stretches, before = [], read_memory()
    for _ in range(STEPS // STRETCH):
        seconds = 0.0
        for _ in range(STRETCH):
            logits, taken = step(logits)
            seconds += taken
        after = read_memory()
        stretches.append(Stretch(seconds, (before + after) / 2))
        before = after
    return stretches


def prefill(runner: Runner, ids: Ids, sequences: int, context: int) -> torch.Tensor:
    """Fill every sequence's context, at most 512 tokens a step; logits of the last."""
    logits = torch.empty(0)
    while runner.length < context:
        logits = runner.step(ids.draw(sequences, min(max(1, PREFILL // sequences), context - runner.length)))
    return logits


def prefill_speed(model: Model) -> float:
    """Tokens a second of one prompt of 512 tokens."""
    ids = Ids(model.spec.vocab_size).draw(1, PREFILL)
    runner = Runner(model, 1, PREFILL)
    started = time.perf_counter()
    runner.step(ids)
    return PREFILL / (time.perf_counter() - started)


def step_parts(model: Model, path: Path, held: Holding, sequences: int, context: int) -> list[list[Part]]:
    """What each decode step reads and multiplies."""
    checkpoint, spec = open_checkpoint(path), model.spec
    nbytes, forms = held_bytes(checkpoint, spec, held), model_forms(checkpoint, spec, held.format)

    def part(name: str, shape: tuple[int, ...], rows: int) -> Part:
        adds = rows * shape[0] * shape[1] if len(shape) == 2 else 0
        return Part(nbytes[name], adds, rows, forms[name].name if name in forms else "")

    trunk = {name: part(name, shape, sequences) for name, shape in trunk_tensors(spec).items()}
    if not spec.tied_embeddings:
        trunk[EMBEDDING] = Part(sequences * nbytes[EMBEDDING] // spec.vocab_size)
    experts = {
        index: layer.experts.tensors(index, 0) for index, layer in enumerate(spec.layers) if isinstance(layer, MoESpec)
    }
    per_token = spec.kv_values_per_token * model.dtype.itemsize
    ids, runner = Ids(spec.vocab_size), Runner(model, sequences, context + STEPS)
    prefill(runner, ids, sequences, context)
    steps = []
    with model.pool.through(Choices) if model.pool else contextlib.nullcontext() as choices:
        for _ in range(STEPS):
            runner.step(ids.draw(sequences))
            parts = [*trunk.values(), Part(sequences * runner.length * per_token)]
            for tensors, topk_ids in zip(experts.values(), choices.take() if choices else (), strict=True):
                rows = topk_ids.unique(return_counts=True)[1].tolist()
                parts += [part(name, shape, count) for name, shape in tensors.items() for count in rows]
            steps.append(parts)
    return steps


def least_seconds(steps: list[list[Part]], stretches: list[Stretch], dtype: torch.dtype) -> float:
    """The limit of all steps, each with the bandwidth of its stretch."""
    return sum(
        step_seconds(parts, stretch.bandwidth, dtype)
        for index, stretch in enumerate(stretches)
        for parts in steps[index * STRETCH : (index + 1) * STRETCH]
    )


def measure(
    path: Path, wanted: str, threads: int, sequences: tuple[int, ...], context: int, rounds: int, greedy: bool
) -> dict[str, Any]:
    """Medians of the rounds, as the module says."""
    kernels.set_num_threads(threads)
    torch.set_num_threads(threads)
    checkpoint = open_checkpoint(path)
    held = holding(checkpoint, wanted)
    started = time.perf_counter()
    model = load_model(
        checkpoint, getattr(torch, held.dtype), weight_format=held.format, max_len=context + PREFILL + 64
    )
    ready = time.perf_counter() - started
    runs: dict[int, list[list[Stretch]]] = {count: [] for count in sequences}
    prompts = []
    with memory_reader(threads) as read_memory:
        prefill_speed(model)  # chooses nearly every expert, and so maps and touches what the steps need
        for _ in range(rounds):
            for count in sequences:
                runs[count].append(decode(model, read_memory, count, context, greedy))
            prompts.append(prefill_speed(model))
    speeds, stored, limits, shares = {}, {}, {}, {}
    for count, of_count in runs.items():
        steps = step_parts(model, path, held, count, context)
        taken = [sum(stretch.seconds for stretch in run) for run in of_count]
        least = [least_seconds(steps, run, model.dtype) for run in of_count]
        speeds[str(count)] = count * STEPS / statistics.median(taken)
        stored[str(count)] = sum(part.nbytes for step in steps for part in step) // STEPS
        limits[str(count)] = count * STEPS / statistics.median(least)
        shares[str(count)] = statistics.median(a / b for a, b in zip(least, taken, strict=True))
    bandwidths = [stretch.bandwidth for of_count in runs.values() for run in of_count for stretch in run]
    return {
        "model": str(path),
        "format": held.name,
        "threads": threads,
        "context": context,
        "load_seconds": round(ready, 2),
        "decode": speeds,
        "prefill_512": statistics.median(prompts),
        "bytes_per_step": stored,
        "read_bandwidth": statistics.median(bandwidths),
        "limit": limits,
        "share": shares,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--format", default="auto")
    parser.add_argument("--sequences", default=",".join(map(str, SEQUENCES)))
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens in each sequence before the first step")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--greedy", action="store_true", help="feed each step its own most likely tokens")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    sequences = tuple(map(int, args.sequences.split(",")))
    result = measure(args.model, args.format, args.threads, sequences, args.context, args.rounds, args.greedy)
    if args.json:
        print(json.dumps(result))
        return
    bandwidth = result["read_bandwidth"]
    print(f"{result['format']}, {result['threads']} threads, memory read at {bandwidth / 1e9:.1f} GB/s")
    for count, speed in result["decode"].items():
        size, limit = result["bytes_per_step"][count], result["limit"][count]
        print(
            f"decode {count:>3}: {speed:7.1f} tokens/s  {size / 1e6:8.1f} MB a step, {speed / limit:.0%} of the limit"
        )
    print(f"prefill 512: {result['prefill_512']:.1f} tokens/s")


if __name__ == "__main__":
    main()
