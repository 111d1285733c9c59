"""What the API process and the engine say to each other: plain values, msgpack, never pickle.

On a socket pair a frame is a 4-byte little-endian length and that many bytes of msgpack; between hosts it is a message
of a gRPC stream (proto/barista/v1/engine.proto). The API sends `Command`s; the engine answers
with `Event`s, one `StepEvents` frame a step.
"""

from __future__ import annotations

import msgspec

from barista.tracing import TRACE_RATIO


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to draw one sequence's tokens. Every field is validated at the edge, so the engine trusts it.

    temperature: 0 is greedy. top_k: 0 is off. seed: draws are a function of (seed, index of the token) alone.
    logit_bias: token id -> added to its logit. max_tokens: at least 1, prompt included it fits the context.
    stop_token_ids: end the sequence, in addition to the model's own EOS ids unless ignore_eos.
    logprobs: None, or how many alternatives to report beside the drawn token (0 is allowed).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    max_tokens: int = 16
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None


class PoolAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where the experts are when they are not in the engine. controller: host:port. token: of the deployment.

    transport: auto (shared memory on one host, gRPC elsewhere), shm or grpc.
    """

    controller: str
    token: str
    tls_dir: str | None = None
    transport: str = "auto"


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The first frame: what to load and how much to hold. None: the engine decides and says so in `Ready`.

    path: a checkpoint's directory or GGUF file. device: cpu or cuda. gpu_workers: of the engine's own,
    with the experts; 0: they are on its device. format: as `--format`, auto meaning: as stored.
    lengths in tokens. expert_memory: bytes of experts to keep in memory; None for all of them.
    eos_token_ids: what ends a sequence; the tokenizer, which the engine does not have, knows them.
    trace_to, trace_ratio: where traces go, if anywhere, and the share of the steps that is traced.
    """

    path: str
    eos_token_ids: tuple[int, ...] = ()
    device: str = "cpu"
    gpu_workers: int = 0
    format: str = "auto"
    threads: int = 1
    expert_memory: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    kv_cache_tokens: int | None = None
    kv_cache_bytes: int | None = None
    block_size: int = 16
    pool: PoolAddress | None = None
    trace_to: str | None = None
    trace_ratio: float = TRACE_RATIO


# ---------------------------------------------------------------- API -> engine


class Submit(msgspec.Struct, frozen=True, tag=True):
    """One sequence. `n` choices are `n` submissions. salt: prefix-cache blocks are shared within one salt only.

    drawn_token_ids: its first tokens, which another engine has drawn before it was lost: the next ones follow, these
    are not reported again.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    salt: bytes = b""
    drawn_token_ids: tuple[int, ...] = ()


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Forget these requests and free their blocks before the next step. No event follows."""

    request_ids: tuple[str, ...]


class GetStats(msgspec.Struct, frozen=True, tag=True):
    """Ask for one `Stats` event."""


# ---------------------------------------------------------------- engine -> API


class ModelInfo(msgspec.Struct, frozen=True):
    """What the API must know of a loaded model. lengths in tokens, sizes in bytes."""

    vocab_size: int
    max_model_len: int
    kv_capacity_tokens: int
    kv_bytes_per_token: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    num_layers: int
    num_experts: int
    numerics_id: str


class Greeting(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The first event of an engine that runs apart (barista.v1.Engine): what an API must know before it sends anything.

    version: of this package; the messages of two versions may differ. tokenizer: Tokenizer.digest. controller:
    host:port of the controller of its pool, empty while the experts are in the engine.
    """

    version: str
    model: ModelInfo
    tokenizer: str
    controller: str = ""


class Loading(msgspec.Struct, frozen=True, tag=True):
    """Progress of the start: 0..1."""

    fraction: float
    message: str


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine serves."""

    model: ModelInfo


class Fatal(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot start or go on; it exits after this."""

    message: str
    remedy: str = ""


class Token(msgspec.Struct, frozen=True):
    """One drawn token. index counts from 0 within the request, without gaps.

    logprob and top_logprobs are of the raw logits, natural logarithm; top_logprobs is [(token id, logprob)] best first.
    finish_reason: None, "stop" (EOS or a stop token; that token is the last one reported) or "length".
    """

    request_id: str
    index: int
    token_id: int
    finish_reason: str | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    num_cached_tokens: int = 0


class Failed(msgspec.Struct, frozen=True):
    """The request ends without an answer. code: see router.api.errors."""

    request_id: str
    code: str
    message: str


class LinkStats(msgspec.Struct, frozen=True):
    """The wire to one worker. Counters count from the start; seconds and bytes. transport: shm, grpc, or none if down.

    state: "ready", "suspect" (late; used only where nobody else holds the expert) or "down". rows: (token, expert)
    pairs sent. exchange_seconds: from a dispatch to its rows; compute_seconds: of that, what the worker computed.
    """

    worker: str
    transport: str
    state: str
    dispatches: int = 0
    rows: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    exchange_seconds: float = 0.0
    compute_seconds: float = 0.0


class PoolStats(msgspec.Struct, frozen=True):
    """The expert pool as this engine sees it. experts_uncovered: experts that no reachable worker holds.

    resends: dispatches sent again after a failure; hedges: because of a slow worker. stale_epochs: answers from a
    worker that knew a newer placement. nonfinite_rows: expert rows that were not finite. on_demand_loads: experts that
    a survivor loaded at this engine's demand. dispatch_seconds, combine_seconds: sums over `layers` layers run.
    """

    epoch: int = 0
    experts_uncovered: int = 0
    resends: int = 0
    hedges: int = 0
    stale_epochs: int = 0
    nonfinite_rows: int = 0
    on_demand_loads: int = 0
    layers: int = 0
    dispatch_seconds: float = 0.0
    combine_seconds: float = 0.0
    links: tuple[LinkStats, ...] = ()


class ExpertCacheStats(msgspec.Struct, frozen=True):
    """The experts in memory where only some of them are. resident_bytes: of them now.

    queries: experts that the layers have asked for, each once a step; hits: those of them that were in memory.
    """

    queries: int = 0
    hits: int = 0
    resident_bytes: int = 0


class Stats(msgspec.Struct, frozen=True, tag=True):
    """The engine's state. Counters count from the start. expert_tokens: [layer][expert], empty for dense models.

    group_workers, group_workers_lost, recomputed_steps: of an engine with workers of its own on GPUs, those that it
    has, those that it has lost, and the steps that were computed again for that. pool: None while the experts are in
    the engine's own process, or on such workers. expert_cache: None while all of them are in memory.
    """

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_preemptions: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    iteration_tokens: int = 0
    group_workers: int = 0
    group_workers_lost: int = 0
    recomputed_steps: int = 0
    expert_tokens: tuple[tuple[int, ...], ...] = ()
    pool: PoolStats | None = None
    expert_cache: ExpertCacheStats | None = None


class StepEvents(msgspec.Struct, frozen=True, tag=True):
    """All that one step produced."""

    tokens: tuple[Token, ...] = ()
    failed: tuple[Failed, ...] = ()


Command = Submit | Abort | GetStats
Event = Greeting | Loading | Ready | Fatal | StepEvents | Stats

encode = msgspec.msgpack.Encoder().encode
decode_config = msgspec.msgpack.Decoder(EngineConfig).decode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_event = msgspec.msgpack.Decoder(Event).decode
