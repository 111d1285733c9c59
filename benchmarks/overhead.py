"""What a decoder layer costs beyond its bytes: a decode step of a model whose weights stay in the cache.

    python -m benchmarks.overhead [--threads 1 2] [--rows 1] [--steps 3000]

The same small layer stands 4 and 12 times in a model; what a step of the second takes longer, divided by 8, is what
one layer costs. The rest of the step is embedding, last norm, head and counters. All layers share one layer's weights,
a quarter of a megabyte, just large enough for every product to be given to all threads. Microseconds, as the median
and as the best hundredth of the steps: on a machine that others use too, only the latter tells of us.
"""

from __future__ import annotations

import argparse
import re
import time
from typing import Any

import torch

from experts import kernels
from experts.pool import ExpertPool
from experts.transport.local import LocalTransport
from router.kv_cache.storage import allocate_cache
from router.model.batch import Batch
from router.model.families import model_spec
from router.model.spec import ModelSpec, MoESpec
from router.model.tensors import expert_tensors, trunk_tensors
from router.model.trunk import Trunk

FEW, MANY = 4, 12  # layers
BLOCK_SIZE, CONTEXT = 16, 32

COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "dtype": "bfloat16",
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_moe": COMMON
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": 8,
        "norm_topk_prob": True,
    },
    "deepseek_v3": COMMON
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 16,
        "v_head_dim": 64,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 0,
    },
}


def main() -> None:
    """One line for each shape and number of threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rows", type=int, default=1, help="sequences that decode together")
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, config in SHAPES.items():
        few, many = (Decode(config | {"num_hidden_layers": layers}, args.rows) for layers in (FEW, MANY))
        for threads in args.threads:
            kernels.set_num_threads(threads)
            layer, rest = costs(few, many, args.steps)
            print(
                f"{name:12} {threads} threads, {args.rows} rows: "
                f"a layer {layer[0]:.1f} us (best {layer[1]:.1f}), the rest {rest[0]:.1f} us (best {rest[1]:.1f})"
            )


def costs(few: Decode, many: Decode, steps: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """Microseconds of one layer, and of all of a step that is no layer: each the median, and of the best steps.

    The models take turns, so that what else runs on the machine meets both.
    """
    seconds: dict[Decode, list[float]] = {few: [], many: []}
    for step in range(steps + 20):
        for model, measured in seconds.items():
            started = time.perf_counter()
            model.step(step)
            measured.append(time.perf_counter() - started)

    def at(share: float) -> tuple[float, float]:
        short, long = (1e6 * sorted(measured[20:])[int(share * steps)] for measured in seconds.values())
        layer = (long - short) / (MANY - FEW)
        return layer, short - FEW * layer

    (layer, rest), (best_layer, best_rest) = at(0.5), at(0.01)
    return (layer, best_layer), (rest, best_rest)


class Decode:
    """A random model in memory, and the batch of one decode step."""

    def __init__(self, config: dict[str, Any], rows: int) -> None:
        spec = model_spec(config)
        torch.manual_seed(0)
        self.trunk = random_trunk(spec)
        blocks = CONTEXT // BLOCK_SIZE
        self.cache = allocate_cache(spec, rows * blocks, BLOCK_SIZE, torch.bfloat16)
        tables = torch.arange(rows * blocks, dtype=torch.int32).view(rows, blocks)
        ids = torch.arange(rows, dtype=torch.int32)
        self.batch = Batch(
            token_ids=ids,
            positions=torch.full((rows,), CONTEXT - 1, dtype=torch.int32),
            seq_ids=ids,
            slots=tables[:, -1] * BLOCK_SIZE + BLOCK_SIZE - 1,
            block_tables=tables,
            sample_rows=ids.long(),
        )

    @torch.inference_mode()
    def step(self, step: int) -> None:
        """One forward pass."""
        self.trunk.forward(self.batch, self.cache, step)


def random_trunk(spec: ModelSpec) -> Trunk:
    """A trunk with its experts in this process. The weights are random, and the same in every layer."""
    shapes = trunk_tensors(spec) | expert_tensors(spec)
    loaded: dict[str, torch.Tensor] = {}

    def load(name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        shape, once = shapes[name], re.sub(r"layers\.\d+", "layers", name)
        if once not in loaded:
            values = torch.randn(shape) * shape[-1] ** -0.5 if len(shape) > 1 else torch.ones(shape)
            loaded[once] = values.to(dtype or torch.bfloat16)
        return loaded[once]

    tables = {
        index: kernels.ExpertTable(
            {
                expert: tuple(load(name) for name in layer.experts.tensors(index, expert))
                for expert in range(layer.gate.num_experts)
            },
            layer.gate.num_experts,
        )
        for index, layer in enumerate(spec.layers)
        if isinstance(layer, MoESpec)
    }
    pool = ExpertPool(LocalTransport(tables), spec.num_layers, spec.num_experts)
    return Trunk(spec, load, pool, spec.max_position)


if __name__ == "__main__":
    main()
