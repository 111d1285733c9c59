"""The same cup wherever the experts sit: logits of a step are those of local experts, to the byte.

Hypothesis draws the placement (who may be asked for each expert), the number of workers in it, the wire and the batch.
The workers are processes that hold every expert; a placement decides whom the router asks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experts.checkpoint import open_checkpoint
from router.kv_cache.storage import allocate_cache
from router.model.batch import Batch
from router.model.load import Model, load_model
from tests.distributed.static_pool import StaticPool, everything, static_pool
from tests.distributed.workers import tiny_expert_model

WORKERS = ("worker-0", "worker-1", "worker-2")
NUM_EXPERTS, NUM_LAYERS, BLOCK = 6, 2, 16
Holders = list[list[set[int]]]  # layer, expert -> workers


@dataclass
class Bench:
    pool: StaticPool
    local: Model
    remote: dict[str, Model]
    step: int = 0

    def place(self, holders: Holders) -> None:
        """Publish, and wait until both routers go by it."""
        self.pool.publish(
            {
                name: {
                    layer: [e for e in range(NUM_EXPERTS) if number in holders[layer][e]] for layer in range(NUM_LAYERS)
                }
                for number, name in enumerate(WORKERS)
            }
        )
        limit = time.monotonic() + 10
        for model in self.remote.values():
            assert model.remote is not None
            while model.remote.roster.epoch < self.pool.epoch:
                assert time.monotonic() < limit
                model.remote.roster.wait_changed(0.01)

    def logits(self, model: Model, token_ids: list[int]) -> bytes:
        """Of every position of one sequence, computed in one step."""
        self.step += 1
        n = len(token_ids)
        cache = allocate_cache(model.spec, -(-n // BLOCK), BLOCK, model.dtype)
        batch = Batch(
            token_ids=torch.tensor(token_ids, dtype=torch.int32),
            positions=torch.arange(n, dtype=torch.int32),
            seq_ids=torch.zeros(n, dtype=torch.int32),
            slots=torch.arange(n, dtype=torch.int32),
            block_tables=torch.arange(-(-n // BLOCK), dtype=torch.int32)[None],
            sample_rows=torch.arange(n),
        )
        with torch.inference_mode():
            logits, failed = model.trunk.forward(batch, cache, self.step)
        assert not failed.any()
        return logits.numpy().tobytes()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    # In bfloat16 every rounding shows; tests/distributed/test_faults.py runs in float32.
    folder = tmp_path_factory.mktemp("model") / "tiny"
    model = tiny_expert_model(folder, "bfloat16", num_experts=NUM_EXPERTS, num_experts_per_tok=3)
    with static_pool(model, *WORKERS) as pool:
        pool.assign(everything(model, *WORKERS))
        checkpoint, dtype = open_checkpoint(folder), torch.bfloat16
        remote = {
            wire: load_model(checkpoint, dtype, pool=pool.config("bfloat16", transport=wire))
            for wire in ("shm", "grpc")
        }
        yield Bench(pool, load_model(checkpoint, dtype), remote)
        for each in remote.values():
            assert each.remote is not None
            each.remote.close()


def placements(num_workers: int) -> st.SearchStrategy[Holders]:
    who = st.sets(st.integers(0, num_workers - 1), min_size=1)
    return st.lists(st.lists(who, min_size=NUM_EXPERTS, max_size=NUM_EXPERTS), min_size=NUM_LAYERS, max_size=NUM_LAYERS)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    holders=st.integers(1, len(WORKERS)).flatmap(placements),
    token_ids=st.lists(st.integers(0, 255), min_size=1, max_size=60),
    wire=st.sampled_from(["shm", "grpc"]),
)
def test_logits_do_not_depend_on_where_the_experts_are(
    bench: Bench, holders: Holders, token_ids: list[int], wire: str
) -> None:
    bench.place(holders)
    assert bench.logits(bench.remote[wire], token_ids) == bench.logits(bench.local, token_ids)
