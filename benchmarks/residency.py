"""Experts larger than memory: tokens a second and hit rate of a checkpoint whose experts are kept within a limit.

    python -m benchmarks.residency --model DIR [--format int4] [--shares 0.25,0.5,1] [--sequences 1,16] [--json]

For each share of the experts' bytes: a prompt of 32 tokens for each sequence, then 32 steps of ids of one seed, first
with none of the experts in the system's cache, then again in the same process with those that the limit kept. The last
rows are without a limit. --greedy feeds each step its own most likely tokens instead. Before that, how fast 16 experts
of a layer that are not in memory are read: page by page as they are touched, or all asked for first.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from barista.machine import usable_cores
from benchmarks.engine import STEPS, Ids, Runner, prefill
from experts import kernels
from experts.checkpoint import Checkpoint, open_checkpoint
from experts.expert_weights import ExpertReader
from experts.formats import Holding, holding
from experts.packed import convert
from router.memory import held_bytes
from router.model.families import model_spec
from router.model.load import Model, load_model
from router.model.packed import expert_layers, packed_experts
from router.model.tensors import expert_tensors

CONTEXT = 32


def forget(checkpoint: Checkpoint, held: Holding) -> None:
    """Have the system drop from its cache whatever it has of the experts' files and nobody has mapped."""
    part = packed_experts(checkpoint, model_spec(checkpoint.config), held.format)
    for file in part.sizes:
        with (part.folder / file).open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_speeds(path: Path, wanted: str) -> dict[str, float]:
    """Bytes of experts a second, touched by two threads: eight experts at a time, twice; the median of five rounds."""
    checkpoint = open_checkpoint(path)
    held, spec = holding(checkpoint, wanted), model_spec(checkpoint.config)
    packed = packed_experts(checkpoint, spec, held.format).over(checkpoint)
    reader = ExpertReader(packed, getattr(torch, held.dtype))
    layer, ffn = next(iter(expert_layers(spec).items()))
    speeds: dict[str, list[float]] = {"page by page": [], "asked for first": []}
    for seed in range(5):
        chosen = random.Random(seed).sample(range(ffn.num_experts), 16)
        for name, rounds in speeds.items():
            for expert in range(ffn.num_experts):
                reader.release(ffn, layer, expert)
            started, nbytes = time.perf_counter(), 0
            for experts in (chosen[:8], chosen[8:]):
                if name == "asked for first":
                    for expert in experts:
                        reader.prefetch(ffn, layer, expert)
                parts = [p for e in experts for w in reader.read(ffn, layer, e) for p in kernels.parts_of(w)]
                with ThreadPoolExecutor(2) as threads:
                    list(threads.map(lambda part: part.view(torch.uint8).max(), parts))
                nbytes += sum(part.nbytes for part in parts)
            rounds.append(nbytes / (time.perf_counter() - started))
    return {name: statistics.median(rounds) for name, rounds in speeds.items()}


def decode(model: Model, sequences: int, greedy: bool) -> dict[str, float]:
    """Tokens a second, and which share of the experts that were asked for was in memory."""
    ids = Ids(model.spec.vocab_size)
    runner = Runner(model, sequences, CONTEXT + STEPS)
    logits = prefill(runner, ids, sequences, CONTEXT)
    queries, hits = (0, 0) if model.residency is None else (model.residency.queries, model.residency.hits)
    started = time.perf_counter()
    for _ in range(STEPS):
        logits = runner.step(logits.argmax(-1)[:, None].tolist() if greedy else ids.draw(sequences))
    seconds = time.perf_counter() - started
    result = {"tokens_per_s": round(sequences * STEPS / seconds, 2)}
    if model.residency is not None:
        result["hit_rate"] = round((model.residency.hits - hits) / (model.residency.queries - queries), 3)
    return result


def measure(
    path: Path, wanted: str, shares: tuple[float, ...], sequences: tuple[int, ...], greedy: bool
) -> Iterator[dict[str, Any]]:
    """One row for each share, count of sequences and state of the cache."""
    checkpoint = open_checkpoint(path)
    held, spec = holding(checkpoint, wanted), model_spec(checkpoint.config)
    of_tensor = held_bytes(checkpoint, spec, held)
    total = sum(of_tensor[name] for name in expert_tensors(spec))
    dtype = getattr(torch, held.dtype)
    for share in (*shares, None):
        for count in sequences:
            limit = None if share is None else int(share * total)
            model = load_model(
                checkpoint, dtype, weight_format=held.format, max_len=CONTEXT + STEPS, expert_memory=limit
            )
            forget(checkpoint, held)
            for cache in ("cold", "warm"):
                row = {"share": share, "expert_memory": limit, "sequences": count, "cache": cache}
                yield row | decode(model, count, greedy)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--format", default="int4", help="one of few bits, whose experts are packed")
    parser.add_argument("--shares", default="0.25,0.5,1")
    parser.add_argument("--sequences", default="1,16")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    kernels.set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    shares, sequences = tuple(map(float, args.shares.split(","))), tuple(map(int, args.sequences.split(",")))
    checkpoint = open_checkpoint(args.model)
    convert.prepare(packed_experts(checkpoint, model_spec(checkpoint.config), holding(checkpoint, args.format).format))
    speeds = read_speeds(args.model, args.format)
    rows = measure(args.model, args.format, shares, sequences, args.greedy)
    if args.json:
        print(json.dumps({"bytes_read_per_s": speeds, "decode": list(rows)}))
        return
    for name, speed in speeds.items():
        print(f"experts read {name}: {speed / 1e6:.0f} MB/s")
    for row in rows:
        share = "no limit" if row["share"] is None else f"{row['share']:.0%} in memory"
        hits = f", {row['hit_rate']:.0%} hits" if "hit_rate" in row else ""
        print(
            f"{share:>14}, {row['sequences']:>2} sequences, {row['cache']}: {row['tokens_per_s']:7.1f} tokens/s{hits}"
        )


if __name__ == "__main__":
    main()
