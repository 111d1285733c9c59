"""What clients receive, as typed dictionaries: free at run time, checked by the type checker, shown in the OpenAPI.

Field for field OpenAI's objects (platform documentation, chat and legacy completions), plus `max_model_len` on a model.
typing_extensions' TypedDict, because pydantic asks for it below Python 3.12.
"""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

FinishReason = Literal["stop", "length"]


class Model(TypedDict):
    """max_model_len: tokens; None while the model loads."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None


class ModelList(TypedDict):
    """GET /v1/models."""

    object: Literal["list"]
    data: list[Model]


class PromptTokensDetails(TypedDict):
    """cached_tokens: prompt tokens whose KV blocks were already there."""

    cached_tokens: int


class Usage(TypedDict):
    """Token counts. completion_tokens counts every drawn token, the one that ended the text included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(TypedDict):
    """One alternative. bytes: the UTF-8 bytes of the token, which may be a part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """The drawn token with its alternatives, best first."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """One entry per drawn token."""

    content: list[ChatLogprob]


class ChatMessage(TypedDict):
    """The answer of one choice."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    """One of the n answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    """POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(TypedDict):
    """What a chunk adds to its choice. The first chunk of a choice carries the role."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


class ChatChunkChoice(TypedDict):
    """finish_reason is set in the last chunk of a choice only."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class CompletionLogprobs(TypedDict):
    """Parallel lists, one item per drawn token. text_offset: characters into the choice's text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """One text; in a stream, what a chunk adds to it, with finish_reason in the last one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(TypedDict):
    """POST /v1/completions, whole or as one event of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class Tokenized(TypedDict):
    """POST /tokenize. max_model_len in tokens."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(TypedDict):
    """POST /detokenize."""

    prompt: str


class Status(TypedDict):
    """GET /health and /ready."""

    status: Literal["ok"]


class WorkerReport(TypedDict):
    """One worker of GET /pool. bytes, capacity_bytes: of experts, held and at most. restarts: by Ray.

    state: the controller's word (starting, loading, ready, draining, drained, lost, refused), or suspect or down where
    this engine cannot rely on a worker that the controller calls ready. detail: why. transport: None while the engine
    has no wire to it. dispatches, rows, latency_ms (mean): of this engine, since its start.
    """

    name: str
    pid: int
    address: str
    state: str
    numerics_id: str
    bytes: int
    capacity_bytes: int
    node: str
    restarts: int
    transport: str | None
    dispatches: int
    rows: int
    latency_ms: float
    detail: str


class LayerReport(TypedDict):
    """One layer of GET /pool. tokens: routed to each expert since the start; replicas: names of its workers."""

    layer: int
    tokens: list[int]
    replicas: list[list[str]]


class PoolReport(TypedDict):
    """GET /pool. With the experts in the engine: epoch, coverage and no workers alone.

    coverage: share of the experts that a live worker holds, 0..1. imbalance: busiest over average worker, by rows.
    moves: replicas loaded or released. problem: why coverage is not complete. pool: its name, if it has one.
    """

    epoch: int
    coverage: float
    workers: list[WorkerReport]
    experts_uncovered: NotRequired[int]
    imbalance: NotRequired[float]
    moves: NotRequired[int]
    resends: NotRequired[int]
    hedges: NotRequired[int]
    engines: NotRequired[int]
    problem: NotRequired[str]
    pool: NotRequired[str]
    layers: NotRequired[list[LayerReport]]


MoveReport = TypedDict("MoveReport", {"layer": int, "expert": int, "from": str | None, "to": str | None})
"""One replica's way. from: None for a new replica; to: None for one that is released."""


class RebalanceReport(TypedDict):
    """POST /pool/rebalance. imbalance: busiest over average worker, by the load that engines reported."""

    moves: list[MoveReport]
    imbalance_before: float
    imbalance_after: float
    dry_run: bool
