"""From a request's fields to the engine's SamplingParams: defaults, seeds and the token budget.

Everything the engine trusts and a schema cannot state is checked here, because it needs the loaded model.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence

from barista.errors import InvalidRequest
from router.api.schemas import INT64_MAX, GenerateRequest
from router.messages import ModelInfo, SamplingParams

GREEDY_BELOW = 1e-5  # as vLLM: dividing logits by less overflows float32, and the largest one wins anyway


def sampling_params(
    body: GenerateRequest,
    model: ModelInfo,
    *,
    num_prompt_tokens: int,
    max_tokens: int | None,
    default_max_tokens: int | None,
    logprobs: int | None,
) -> list[SamplingParams]:
    """One SamplingParams per choice of one prompt.

    max_tokens: as asked, or None for default_max_tokens as far as the context has room; None there is all the room.
    logprobs: alternatives to report, or None.
    Raises InvalidRequest: the prompt and max_tokens exceed the context, a token id is out of the vocabulary, or n > 1
    with greedy decoding.
    """
    temperature = 1.0 if body.temperature is None else body.temperature
    temperature = 0.0 if temperature < GREEDY_BELOW else temperature
    n = body.n or 1
    if n > 1 and temperature == 0:
        raise InvalidRequest("n must be 1 with temperature 0: every choice would be the same", param="n")
    seed = secrets.randbits(63) if body.seed is None else body.seed & INT64_MAX
    first = SamplingParams(
        temperature=temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=_logit_bias(body, model.vocab_size),
        max_tokens=_token_budget(num_prompt_tokens, max_tokens, default_max_tokens, model),
        stop_token_ids=tuple(check_token_ids(body.stop_token_ids or (), model.vocab_size, "stop_token_ids")),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
    )
    return [_with_seed(first, choice_seed(seed, choice)) for choice in range(n)]


def choice_seed(seed: int, choice: int) -> int:
    """The seed of one choice, 0..2^63-1: `seed` itself for choice 0, so that n does not change the first answer."""
    if choice == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}:{choice}".encode()).digest()[:8], "little") & INT64_MAX


def check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str) -> Sequence[int]:
    """Returns token_ids. Raises InvalidRequest if one is not below vocab_size."""
    if token_ids and max(token_ids) >= vocab_size:
        raise InvalidRequest(
            f"{param}: {max(token_ids)} is not a token id; the largest is {vocab_size - 1}", param=param
        )
    return token_ids


def _with_seed(params: SamplingParams, seed: int) -> SamplingParams:
    return SamplingParams(**{name: getattr(params, name) for name in params.__struct_fields__} | {"seed": seed})


def _logit_bias(body: GenerateRequest, vocab_size: int) -> dict[int, float]:
    bias = {int(token_id): value for token_id, value in (body.logit_bias or {}).items()}
    check_token_ids(tuple(bias), vocab_size, "logit_bias")
    return bias


def _token_budget(num_prompt_tokens: int, max_tokens: int | None, default: int | None, model: ModelInfo) -> int:
    """How many tokens may be drawn: what was asked, or what fits of the default."""
    limit = min(model.max_model_len, model.kv_capacity_tokens)
    room = limit - num_prompt_tokens
    if room < (max_tokens or 1):
        raise InvalidRequest(
            f"The maximum context length is {limit} tokens, but {num_prompt_tokens + (max_tokens or 1)} are needed: "
            f"{num_prompt_tokens} in the prompt and {max_tokens or 1} for the answer. Shorten one of them.",
            param="max_tokens" if room > 0 else None,
            code="context_length_exceeded",
        )
    if max_tokens is not None:
        return max_tokens
    return room if default is None else min(default, room)
