"""Which KV block holds which tokens: reference counts, reuse of common prefixes, eviction. No tensors, no clocks.

A block holds the keys and values of `block_size` consecutive positions of one sequence. A full, computed block may be
registered under a key that names everything its contents depend on:

    key(block) = blake2b(key(previous block), token ids of the block)      key(before the first) = blake2b(salt)

A later sequence whose tokens give the same keys shares the blocks instead of computing them. Kernels give a position
the same bytes whatever else is in the step, so it does not matter whether a block was computed in a prefill, in any
chunks, or token by token in decode. The chain of hashes is vLLM's and SGLang's; keys are computed here from the tokens,
never taken from a client, and 256 bits keep one client from forging another's prefix.

Every block is either referenced (by one sequence or more) or free. A free block keeps its key, and can be matched,
until it is allocated again. The block freed longest ago goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from struct import pack

KEY_BYTES = 32


def chain_keys(keys: list[bytes], token_ids: Sequence[int], block_size: int, salt: bytes) -> None:
    """Extend `keys`, in place, to one key for every full block of `token_ids`.

    keys: the keys of the first len(keys) blocks of the same tokens and salt; may be empty.
    token_ids: the sequence from its first token on. salt: sequences share blocks within one salt only.
    """
    # The personalisation keeps a salt from being chosen so that it reads as some block's contents.
    parent = keys[-1] if keys else blake2b(salt, digest_size=KEY_BYTES, person=b"salt").digest()
    for start in range(len(keys) * block_size, len(token_ids) - block_size + 1, block_size):
        contents = pack(f"<{block_size}q", *token_ids[start : start + block_size])
        parent = blake2b(parent + contents, digest_size=KEY_BYTES).digest()
        keys.append(parent)


class BlockPool:
    """`num_blocks` reference-counted KV blocks of `block_size` tokens, named 0 to num_blocks - 1.

    queries, hits: tokens that were looked up in the prefix cache, and those of them that were found.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.queries = 0
        self.hits = 0
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # the next to be evicted first
        self._block_of_key: dict[bytes, int] = {}
        self._key_of_block: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` could give; cached ones that nobody references count among them."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks with at least one reference."""
        return self.num_blocks - len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that can be matched, referenced or not."""
        return len(self._block_of_key)

    def match_prefix(self, keys: Sequence[bytes], num_tokens: int) -> list[int]:
        """The longest run of cached blocks at the start of a sequence, with a reference taken on each.

        keys: from `chain_keys`. num_tokens: the sequence's length. At least one of its tokens is never matched,
        because its logits must be computed.
        """
        matched: list[int] = []
        for key in keys[: (num_tokens - 1) // self.block_size]:
            block_id = self._block_of_key.get(key)
            if block_id is None:
                break
            matched.append(block_id)
        for block_id in matched:
            self._references[block_id] += 1
            self._free.pop(block_id, None)
        return matched

    def count_query(self, num_tokens: int, num_hits: int) -> None:
        """Count one sequence admitted with `num_tokens` tokens, `num_hits` of them from the cache."""
        self.queries += num_tokens
        self.hits += num_hits

    def allocate(self, num_blocks: int) -> list[int] | None:
        """`num_blocks` blocks with one reference each and no contents, or None (and no change) if too few are free."""
        if num_blocks > len(self._free):
            return None
        block_ids = [self._free.popitem(last=False)[0] for _ in range(num_blocks)]
        for block_id in block_ids:
            self._references[block_id] = 1
            key = self._key_of_block.pop(block_id, None)
            if key is not None:
                del self._block_of_key[key]
        return block_ids

    def register(self, block_id: int, key: bytes) -> None:
        """Let a full, computed, referenced block be matched under its key.

        When another block has the key already, this one stays private to its sequence.
        """
        if key not in self._block_of_key and block_id not in self._key_of_block:
            self._block_of_key[key] = block_id
            self._key_of_block[block_id] = key

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop one reference on each block of a sequence's table, given in the table's order.

        The table's end is freed first and so evicted first: a cached block is of no use without those before it.
        """
        for block_id in reversed(block_ids):
            self._references[block_id] -= 1
            if self._references[block_id] > 0:
                continue
            self._free[block_id] = None
            if block_id not in self._key_of_block:
                self._free.move_to_end(block_id, last=False)  # nothing to lose: use it before any cached block

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert the pool's invariants. tables: the block tables of all sequences that hold references.

        Raises AssertionError.
        """
        references = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), f"a table holds a block twice: {table}"
            for block_id in table:
                references[block_id] += 1
        assert references == self._references, "reference counts differ from the tables"
        assert set(self._free) == {block_id for block_id, count in enumerate(references) if count == 0}
        inverse = {block_id: key for key, block_id in self._block_of_key.items()}
        assert inverse == self._key_of_block, "keys and blocks do not map one to one"
