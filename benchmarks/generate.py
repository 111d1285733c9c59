"""Barista beside transformers' generate on one checkpoint, in one run.

    python -m benchmarks.generate [MODEL] [--format F] [--sequences 1,16] [--prompt 32] [--tokens 64] [--rounds 3]
                                  [--json]

Both read the checkpoint in the same dtype, unless --format holds our weights in fewer bits, on the same threads, and
decode greedily; a figure is generated tokens divided by the wall time of the whole call, prompt included. transformers
runs its fastest experts implementation, chosen by measuring each first. Rounds alternate between the two, and the ratio
is the median of the rounds' ratios.
The limit is active bytes a token over the read bandwidth measured in the same run: what one sequence cannot exceed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from typing import Any

import torch
import transformers

from barista.machine import available_memory, usable_cores
from benchmarks.bandwidth import read_bandwidth
from experts.checkpoint import open_checkpoint
from router.engine_process import EngineProcess
from router.inspect import inspect_checkpoint
from router.messages import EngineConfig, Failed, SamplingParams, Submit
from router.models import BUILT_IN, prepare_built_in, resolve

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=BUILT_IN)
    parser.add_argument("--format", default="auto", help="of our weights")
    parser.add_argument("--sequences", default="1,16")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print_table(asyncio.run(measure(args)), as_json=args.json)


async def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each number of sequences."""
    threads = usable_cores()
    path = resolve(args.model) if args.model != BUILT_IN else prepare_built_in(lambda fraction, message: None)
    torch.set_num_threads(threads)
    engine = EngineProcess(EngineConfig(path=str(path), threads=threads, format=args.format))
    await engine.start()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, engine.model.dtype))
    theirs.eval()
    bandwidth = read_bandwidth(threads)
    limit = (
        bandwidth / inspect_checkpoint(open_checkpoint(path), available_memory(), args.format).active_bytes_per_token
    )
    rows = []
    for num_sequences in map(int, args.sequences.split(",")):
        prompts = random_prompts(num_sequences, args.prompt, engine.model.vocab_size)
        fastest = fastest_implementation(theirs, prompts)
        await generate_ours(engine, prompts, 4)
        ours, peer = [], []
        for round_index in range(args.rounds):
            prompts = random_prompts(num_sequences, args.prompt, engine.model.vocab_size, seed=round_index + 1)
            ours.append(num_sequences * args.tokens / await generate_ours(engine, prompts, args.tokens))
            peer.append(num_sequences * args.tokens / generate_theirs(theirs, prompts, args.tokens))
            progress(f"{num_sequences} sequences, round {round_index + 1}: {ours[-1]:.1f} and {peer[-1]:.1f} tokens/s")
        rows.append(
            {
                "sequences": num_sequences,
                "barista": statistics.median(ours),
                "transformers": statistics.median(peer),
                "experts_implementation": fastest,
                "ratio": statistics.median(a / b for a, b in zip(ours, peer, strict=True)),
                "limit": limit if num_sequences == 1 else None,
                "read_gb_s": bandwidth / 1e9,
                "format": args.format,
                "dtype": engine.model.dtype,
                "threads": threads,
            }
        )
    await engine.close()
    return rows


def random_prompts(count: int, length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Random token ids; equal lengths, so that transformers needs no padding."""
    generator = random.Random(seed)
    return [[generator.randrange(10, vocab_size) for _ in range(length)] for _ in range(count)]


async def generate_ours(engine: EngineProcess, prompts: list[list[int]], tokens: int) -> float:
    """Seconds until every prompt has its tokens."""
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)

    async def one(index: int) -> None:
        submit = Submit(f"{time.monotonic_ns()}-{index}", tuple(prompts[index]), sampling)
        async for event in engine.submit(submit):
            assert not isinstance(event, Failed), event

    started = time.perf_counter()
    await asyncio.gather(*map(one, range(len(prompts))))
    return time.perf_counter() - started


@torch.inference_mode()
def generate_theirs(model: transformers.PreTrainedModel, prompts: list[list[int]], tokens: int) -> float:
    """Seconds of one call of generate."""
    ids = torch.tensor(prompts)
    started = time.perf_counter()
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    assert out.shape[1] == ids.shape[1] + tokens
    return seconds


def fastest_implementation(model: transformers.PreTrainedModel, prompts: list[list[int]]) -> str:
    """Leave the model with its fastest experts implementation for these prompts; dense models have none to choose."""
    if not hasattr(model, "set_experts_implementation"):
        return "dense"
    seconds: dict[str, float] = {}
    # Two tokens each: batched_mm copies the chosen experts' weights for every token, and a long prompt would not fit.
    probe = [prompt[:2] for prompt in prompts]
    for name in IMPLEMENTATIONS:
        model.set_experts_implementation(name)
        generate_theirs(model, probe, 2)
        seconds[name] = generate_theirs(model, probe, 8)
    fastest = min(seconds, key=seconds.__getitem__)
    model.set_experts_implementation(fastest)
    return fastest


def print_table(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    """Markdown, or JSON alone."""
    if as_json:
        print(json.dumps(rows))
        return
    print("| sequences | Barista, tokens/s | transformers, tokens/s | ratio | share of the limit |")
    print("|---|---|---|---|---|")
    for row in rows:
        share = f"{row['barista'] / row['limit']:.0%} of {row['limit']:.0f}" if row["limit"] else ""
        peer = f"{row['transformers']:.1f} ({row['experts_implementation']})"
        print(f"| {row['sequences']} | {row['barista']:.1f} | {peer} | {row['ratio']:.2f}x | {share} |")
    form = rows[0]["format"] if rows[0]["format"] != "auto" else rows[0]["dtype"]
    print(f"\nBarista in {form}, transformers in {rows[0]['dtype']}; {rows[0]['threads']} threads.")
    print(f"Read bandwidth {rows[0]['read_gb_s']:.1f} GB/s.")


def progress(message: str) -> None:
    """A line on stderr."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
