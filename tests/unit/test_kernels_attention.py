"""Paged attention and the scatter into its cache, in every variant that this machine runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from experts import kernels
from experts.kernels import reference
from tests.kernel_variants import DTYPES, close, few, values, variant  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("variant")


class Cache:
    """Random keys and values of some sequences, in blocks that lie in random order."""

    def __init__(self, dtype, *, num_seqs=3, max_tokens=100, block_size=16, kv_heads=2, key_dim=24, value_dim=24):
        self.block_size, self.key_dim = block_size, key_dim
        blocks = -(-max_tokens // block_size)
        order = torch.randperm(num_seqs * blocks, generator=torch.Generator().manual_seed(5))
        self.block_tables = order.view(num_seqs, blocks).to(torch.int32)
        shape = (num_seqs * blocks, block_size, kv_heads)
        self.keys = values(*shape, key_dim, dtype=dtype, seed=1)
        self.values = values(*shape, value_dim, dtype=dtype, seed=2)

    def attend(self, q: Tensor, seq_ids: list[int], positions: list[int], function=kernels.attention) -> Tensor:
        ids, where = torch.tensor(seq_ids, dtype=torch.int32), torch.tensor(positions, dtype=torch.int32)
        scale = self.key_dim**-0.5
        return function(q, self.keys, self.values, self.block_tables, ids, where, scale, block_size=self.block_size)


@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(
    data=st.data(),
    block_size=st.sampled_from([1, 8, 16, 48]),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    key_dim=st.integers(1, 80),
    value_dim=st.integers(1, 80),
)
def test_attention_equals_its_reference(dtype, data, block_size, kv_heads, group, key_dim, value_dim):
    cache = Cache(dtype, block_size=block_size, kv_heads=kv_heads, key_dim=key_dim, value_dim=value_dim)
    rows = data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 99)), min_size=1, max_size=30))
    rows += [(1, position) for position in range(20)] if data.draw(st.booleans()) else []
    q = values(len(rows), kv_heads * group, key_dim, dtype=dtype) * 2
    seq_ids, positions = [row[0] for row in rows], [row[1] for row in rows]
    close(cache.attend(q, seq_ids, positions), cache.attend(q, seq_ids, positions, reference.attention))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_over_one_latent_cache_reads_strided_views(dtype):
    cache = Cache(dtype, kv_heads=1, key_dim=96, value_dim=1)
    cache.values = cache.keys[..., :64]
    q = values(40, 16, 96, dtype=dtype)
    arguments = (q, [0] * 40, list(range(40, 80)))
    close(cache.attend(*arguments), cache.attend(*arguments, reference.attention))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(9, 3), (2, 2), (16, 1)])
def test_prefill_chunked_prefill_and_decode_agree_to_the_byte(dtype, heads):
    cache = Cache(dtype, kv_heads=heads[1], key_dim=40, value_dim=72)
    q = values(100, heads[0], 40, dtype=dtype)
    whole = cache.attend(q, [1] * 100, list(range(100)))
    for threads in (1, 2):
        kernels.set_num_threads(threads)
        for step in (1, 7, 32, 99):
            chunks = [
                cache.attend(q[at : at + step], [1] * len(q[at : at + step]), list(range(at, min(at + step, 100))))
                for at in range(0, 100, step)
            ]
            assert torch.equal(torch.cat(chunks), whole)
    kernels.set_num_threads(2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_attention_has_the_same_bytes_among_other_sequences(dtype):
    cache = Cache(dtype)
    generator = torch.Generator().manual_seed(3)
    seq_ids = torch.randint(3, (60,), generator=generator).sort().values.tolist()
    positions = torch.randint(100, (60,), generator=generator).tolist()
    q = values(60, 4, 24, dtype=dtype)
    together = cache.attend(q, seq_ids, positions)
    for t in range(60):
        assert torch.equal(cache.attend(q[t : t + 1], seq_ids[t : t + 1], positions[t : t + 1])[0], together[t])


def test_no_rows_attend_to_nothing():
    assert Cache(torch.float32).attend(values(0, 4, 24), [], []).shape == (0, 4, 24)


def test_keys_and_values_after_a_row_do_not_touch_it():
    """Not even when they are not finite: zero times NaN is NaN."""
    cache = Cache(torch.float32, num_seqs=1, max_tokens=64, block_size=16, kv_heads=1)
    cache.block_tables = torch.arange(4, dtype=torch.int32)[None]
    q = values(6, 2, 24)
    clean = cache.attend(q, [0] * 6, [35, 36, 37, 38, 39, 40])
    cache.keys.view(64, 24)[38:] = torch.nan
    cache.values.view(64, 24)[38:] = torch.inf
    dirty = cache.attend(q, [0] * 6, [35, 36, 37, 38, 39, 40])
    assert torch.equal(dirty[:3], clean[:3])
    assert dirty[3:].isnan().all()


def test_large_scores_do_not_overflow():
    cache = Cache(torch.float32, kv_heads=1)
    q = values(5, 1, 24) * 1e4
    arguments = (q, [0] * 5, [99] * 5)
    torch.testing.assert_close(
        cache.attend(*arguments), cache.attend(*arguments, reference.attention), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_store_kv_writes_the_named_slots_and_no_others(dtype):
    fused = values(7, 5, 24, dtype=dtype)  # a projection's output: the rows are its heads 1..2
    both = values(6, 16, 2, 2, 24, dtype=dtype, seed=1)
    slots = torch.tensor([5, 0, 95, 16, 17, 33, 40], dtype=torch.int32)
    expected = both.clone()
    reference.store_kv(expected[:, :, 0], fused[:, 1:3], slots)
    kernels.store_kv(both[:, :, 0], fused[:, 1:3], slots)
    assert torch.equal(both, expected)
    assert torch.equal(both[5, 15, 0], fused[2, 1:3])
