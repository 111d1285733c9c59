"""The laws of the KV block pool, under every order of operations that hypothesis finds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.kv_cache.blocks import BlockPool, chain_keys

BLOCK_SIZE = 2
tokens = st.lists(st.integers(0, 1), min_size=1, max_size=9)


def keys_of(token_ids: list[int], salt: bytes = b"", block_size: int = BLOCK_SIZE) -> list[bytes]:
    keys: list[bytes] = []
    chain_keys(keys, token_ids, block_size, salt)
    return keys


def fill(pool: BlockPool, token_ids: list[int], salt: bytes = b"") -> list[int]:
    """Allocate and register the blocks of a sequence, as a finished prefill does."""
    keys = keys_of(token_ids, salt, pool.block_size)
    table = pool.allocate(-(-len(token_ids) // pool.block_size))
    assert table is not None
    for block_id, key in zip(table, keys, strict=False):
        pool.register(block_id, key)
    return table


class PoolMachine(RuleBasedStateMachine):
    """Sequences come, share what is cached, write the rest, register it and go. `contents` plays the KV tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(num_blocks=7, block_size=BLOCK_SIZE)
        self.contents: dict[int, tuple[bytes, tuple[int, ...]]] = {}
        self.tables: list[list[int]] = []

    @rule(token_ids=tokens, salt=st.sampled_from([b"", b"a"]), registers=st.booleans())
    def admit(self, token_ids: list[int], salt: bytes, registers: bool) -> None:
        keys = keys_of(token_ids, salt)
        matched = self.pool.match_prefix(keys, len(token_ids))
        assert len(matched) * BLOCK_SIZE < len(token_ids)
        for index, block_id in enumerate(matched):
            assert self.contents[block_id] == (salt, tuple(token_ids[: (index + 1) * BLOCK_SIZE]))
        free = self.pool.num_free
        fresh = self.pool.allocate(-(-len(token_ids) // BLOCK_SIZE) - len(matched))
        if fresh is None:
            assert self.pool.num_free == free
            self.pool.release(matched)
            return
        table = matched + fresh
        for block_id in fresh:
            self.contents.pop(block_id, None)
        for index in range(len(matched), len(keys) if registers else 0):
            self.contents[table[index]] = (salt, tuple(token_ids[: (index + 1) * BLOCK_SIZE]))
            self.pool.register(table[index], keys[index])
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @invariant()
    def holds(self) -> None:
        self.pool.check(self.tables)
        assert self.pool.num_used + self.pool.num_free == self.pool.num_blocks
        assert self.pool.num_used == len({block_id for table in self.tables for block_id in table})


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestPool = PoolMachine.TestCase


def test_a_prompt_matches_its_cached_blocks_but_never_its_last_token():
    pool = BlockPool(8, 2)
    table = fill(pool, [1, 2, 3, 4])
    assert pool.match_prefix(keys_of([1, 2, 3, 4]), 4) == table[:1]
    assert pool.match_prefix(keys_of([1, 2, 3, 4, 5]), 5) == table


def test_a_block_behind_a_different_prefix_does_not_match():
    pool = BlockPool(8, 2)
    fill(pool, [1, 2, 3, 4])
    assert pool.match_prefix(keys_of([9, 2, 3, 4, 5]), 5) == []


def test_salts_do_not_share():
    pool = BlockPool(8, 2)
    fill(pool, [1, 2, 3], salt=b"one key")
    assert pool.match_prefix(keys_of([1, 2, 3], b"another"), 3) == []


@given(tokens, tokens, st.binary(max_size=3), st.binary(max_size=3))
def test_keys_are_equal_exactly_for_equal_prefixes_and_salts(left, right, left_salt, right_salt):
    for index, (a, b) in enumerate(zip(keys_of(left, left_salt), keys_of(right, right_salt), strict=False), start=1):
        same = left[: index * BLOCK_SIZE] == right[: index * BLOCK_SIZE] and left_salt == right_salt
        assert (a == b) == same


@given(tokens, tokens)
def test_extending_a_chain_equals_hashing_it_at_once(head, tail):
    keys = keys_of(head, b"s")
    chain_keys(keys, head + tail, BLOCK_SIZE, b"s")
    assert keys == keys_of(head + tail, b"s")


def test_a_salt_cannot_imitate_the_contents_of_a_block():
    (first,) = keys_of([1, 2], b"s")
    imitation = first + b"".join(token.to_bytes(8, "little") for token in (3, 4))
    assert keys_of([5, 6], imitation)[0] != keys_of([1, 2, 3, 4, 5, 6], b"s")[2]


def test_the_block_freed_longest_ago_is_evicted_first_and_a_table_from_its_end():
    pool = BlockPool(4, 2)
    old, new = fill(pool, [1, 1, 1, 1]), fill(pool, [2, 2, 2, 2])
    pool.release(old)
    pool.release(new)
    assert pool.allocate(4) == [old[1], old[0], new[1], new[0]]


def test_a_free_block_without_a_key_is_used_before_a_cached_one():
    pool = BlockPool(3, 2)
    cached = fill(pool, [1, 1])
    pool.release(cached)
    blank = pool.allocate(2)
    assert blank is not None
    pool.release(blank)
    assert set(pool.allocate(2) or []) == set(blank)


def test_a_matched_block_is_not_evicted():
    pool = BlockPool(2, 2)
    table = fill(pool, [1, 1])
    pool.release(table)
    assert pool.match_prefix(keys_of([1, 1, 1]), 3) == table
    assert pool.allocate(2) is None


def test_the_second_block_under_a_key_stays_private():
    pool = BlockPool(4, 2)
    first, second = fill(pool, [1, 1]), fill(pool, [1, 1])
    assert pool.match_prefix(keys_of([1, 1, 1]), 3) == first
    pool.release(second)
    assert pool.num_cached == 1


def test_check_notices_a_lost_reference():
    pool = BlockPool(2, 2)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="reference counts"):
        pool.check([])


def test_queries_and_hits_count_tokens():
    pool = BlockPool(2, 2)
    pool.count_query(10, 4)
    pool.count_query(3, 0)
    assert (pool.queries, pool.hits) == (13, 4)
