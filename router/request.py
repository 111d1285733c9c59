"""One sequence on its way through the engine: what was asked, what was drawn, what of it is in the KV cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from router.messages import SamplingParams


class Status(Enum):
    """WAITING holds no blocks; RUNNING does; the others are final."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()
    FAILED = auto()
    ABORTED = auto()


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """The engine's record of one submitted sequence; the scheduler alone changes it.

    arrival: the scheduler's serial number. output_token_ids: the tokens drawn so far.
    block_table: the KV blocks of positions [0, block_size), [block_size, 2 * block_size), ... in order.
    block_keys: the prefix-cache keys of the full blocks hashed so far (router.kv_cache.blocks.chain_keys).
    num_computed_tokens: positions whose keys and values are in the KV cache.
    num_cached_tokens: prompt tokens that were found in the prefix cache when the sequence was first admitted.
    num_preemptions: times that its blocks were taken from it.
    finish_reason: "stop" or "length" once FINISHED.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    salt: bytes = b""
    arrival: int = -1
    status: Status = Status.WAITING
    output_token_ids: list[int] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    finish_reason: str | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens in the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known: the prompt and what was drawn."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Known tokens that are not in the KV cache: 1 in decode, more in prefill."""
        return self.num_tokens - self.num_computed_tokens

    def token_ids(self, start: int, stop: int) -> list[int]:
        """The token ids at positions [start, stop)."""
        num_prompt = len(self.prompt_token_ids)
        if start >= num_prompt:
            return self.output_token_ids[start - num_prompt : stop - num_prompt]
        return [*self.prompt_token_ids[start:stop], *self.output_token_ids[: max(0, stop - num_prompt)]]
