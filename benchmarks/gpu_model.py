"""Decode steps of a whole model on one GPU beside what its memory allows, as benchmarks.gpu shows them.

The model is random, of the layer shapes of Qwen3-30B-A3B (random_model.py), because no real one can be had offline.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.random_model import SHAPES, write_model
from experts.checkpoint import open_checkpoint
from experts.formats import holding
from router.device_memory import device_bytes
from router.model.batch import Batch
from router.model.device.load import load_device_model
from router.model.load import Model
from router.model.packed import EMBEDDING

BLOCK_SIZE, CONTEXT, STEPS, WARM_UP = 16, 64, 30, 5
LAYERS = 4
SEQUENCES = (1, 16, 128)


class Steps(NamedTuple):
    """Of one number of sequences: the median step in seconds, and the bytes of weights that it must read."""

    sequences: int
    seconds: float
    nbytes: float


def write_random_model(directory: Path) -> str:
    """A checkpoint; what it is, in words."""
    write_model(directory, SHAPES["qwen3-30b-a3b"] | {"num_hidden_layers": LAYERS})
    return f"random {LAYERS} layers of Qwen3-30B-A3B, bf16"


def decode_steps(directory: Path, device: torch.device) -> Iterator[Steps]:
    """One model, stepped with ever more sequences. The KV cache counts for nothing at these contexts."""
    checkpoint = open_checkpoint(directory)
    model = load_device_model(checkpoint, torch.bfloat16, device, max_len=CONTEXT + STEPS + WARM_UP)
    held = holding(checkpoint, "bf16")
    spec = model.spec
    trunk = device_bytes(checkpoint, spec, held, with_experts=False) - checkpoint.tensors[EMBEDDING].nbytes
    config = json.loads((directory / "config.json").read_text())
    expert = 3 * config["hidden_size"] * config["moe_intermediate_size"] * 2
    for sequences in SEQUENCES:
        times, distinct = _run(model, sequences)
        yield Steps(sequences, statistics.median(times), trunk + statistics.mean(distinct) * expert)


def _run(model: Model, sequences: int) -> tuple[list[float], list[int]]:
    """Seconds of each step after the first ones, and the experts that each has woken, over all layers."""
    blocks = -(-(CONTEXT + STEPS + WARM_UP) // BLOCK_SIZE)
    cache = model.trunk.allocate_cache(sequences * blocks, BLOCK_SIZE)
    tables = torch.arange(sequences * blocks, dtype=torch.int32).view(sequences, blocks)
    generator = torch.Generator().manual_seed(0)
    assert model.pool is not None
    times, distinct = [], []
    for step in range(WARM_UP + STEPS):
        position = CONTEXT + step
        before = model.pool.expert_tokens.clone()
        batch = Batch(
            token_ids=torch.randint(3, 1000, (sequences,), generator=generator, dtype=torch.int32),
            positions=torch.full((sequences,), position, dtype=torch.int32),
            seq_ids=torch.arange(sequences, dtype=torch.int32),
            slots=tables[:, position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE,
            block_tables=tables,
            sample_rows=torch.arange(sequences),
        )
        started = time.perf_counter()
        with torch.inference_mode():
            model.trunk.forward(batch, cache, step)  # it returns when the logits are on the host
        if step >= WARM_UP:
            times.append(time.perf_counter() - started)
            distinct.append(int((model.pool.expert_tokens - before).count_nonzero()))
    return times, distinct
