"""The one configuration of a server: a frozen value, read from a TOML file, the environment and flags.

A later source wins over an earlier one. A field `max_num_seqs` is the key `max_num_seqs` of the file, the variable
`BARISTA_MAX_NUM_SEQS` and the flag `--max-num-seqs`. Nothing unknown is ignored: a mistyped key is an error.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, get_args, get_type_hints

from barista.addresses import is_host_port
from barista.errors import ConfigError
from barista.machine import usable_cores
from barista.tracing import TRACE_RATIO

ENV_PREFIX = "BARISTA_"
# Variables that belong to a command, a worker or the cache rather than to a server.
OTHER_VARIABLES = frozenset({"BARISTA_CACHE", "BARISTA_CONFIG", "BARISTA_API_KEY", "BARISTA_POOL_TOKEN"})
POOL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")  # it becomes part of the names of Ray actors
# Settings of the workers, which say nothing while the experts are in the engine.
OF_THE_POOL = ("redundancy", "worker_threads", "worker_memory", "transport", "controller_port")
# Settings of an engine, which say nothing to an API whose engines run elsewhere.
OF_THE_ENGINE = (
    "workers",
    "pool",
    "controller",
    "expert_memory",
    "format",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "kv_cache_tokens",
    "kv_cache_bytes",
    "block_size",
    "device",
)
FORMATS = ("auto", "float32", "bf16", "fp8", "int8", "int4", "mxfp4")
MAX_GPU_WORKERS = 15  # one rank fewer than cuda/ep_window.h has room for: the engine is one too
FORMATS_ON_GPU = ("auto", "float32", "bf16", "fp8")
KINDS = {int: "an integer", float: "a number", str: "a string", Path: "a path"}


def option(
    default: Any, doc: str, *, shown: str = "", minimum: float | None = None, choices: tuple[str, ...] = ()
) -> Any:
    """One field: its only default (called where it is a function), help text, and what its values must satisfy.

    shown: the default in words, where the value itself says nothing.
    """
    metadata = {"doc": doc, "shown": shown or str(default), "minimum": minimum, "choices": choices}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Everything that `barista serve` can be told. Sizes in bytes, lengths in tokens, times in seconds."""

    model: str = option("house-blend", "A checkpoint's path, house-blend, or the name of a pulled model.")
    served_model_id: str | None = option(None, "The id that /v1/models reports.", shown="the model's name")
    host: str = option("127.0.0.1", "Address to listen on; beyond loopback only with --api-key-file.")
    port: int = option(8000, "Port to listen on; 0 takes a free one.", minimum=0)
    grpc_port: int | None = option(
        None, "Port of the same API over gRPC; 0 takes a free one.", shown="no gRPC", minimum=0
    )
    api_key_file: Path | None = option(None, "File of accepted API keys, one a line.", shown="no keys")
    admin_key_file: Path | None = option(
        None, "File of the keys that may change the pool, one a line; they open every other route too.", shown="no keys"
    )
    engines: str | None = option(
        None,
        "Engines that run elsewhere (barista engine): HOST:PORT with commas between, kubernetes:NAMESPACE/SERVICE, or "
        "ray:URL of a Ray cluster's dashboard.",
        shown="one of its own",
    )
    workers: int = option(0, "Expert worker processes; 0 keeps the experts in the engine.", minimum=0)
    pool: str | None = option(
        None,
        "Join, or make, the worker pool of this name, which outlives the server, on the Ray cluster at RAY_ADDRESS.",
        shown="a pool of its own",
    )
    controller: str | None = option(
        None, "HOST:PORT of the controller of a pool that others keep (for barista engine).", shown="none"
    )
    controller_port: int = option(0, "Port of the pool's controller; 0 takes a free one.", minimum=0)
    redundancy: int = option(2, "Workers that hold each expert, where memory allows.", minimum=1)
    worker_threads: int | None = option(None, "Threads of each worker.", shown="its share of the cores", minimum=1)
    worker_memory: int | None = option(
        None, "Bytes of experts that each worker may hold.", shown="its share of the free memory", minimum=1
    )
    expert_memory: int | None = option(
        None,
        "Bytes of experts that the engine keeps in memory; the others are read from the disk as they are needed.",
        shown="all experts",
        minimum=1,
    )
    transport: str = option("auto", "Wire between engine and workers.", choices=("auto", "shm", "grpc"))
    tls_dir: Path | None = option(None, "Folder of ca.pem, cert.pem and key.pem for mutual TLS.", shown="no TLS")
    device: str = option("cpu", "Where experts and trunk compute.", choices=("cpu", "cuda"))
    format: str = option(
        "auto",
        "Weight format in memory.",
        shown="as stored, or int8 or int4 if only that fits",
        choices=FORMATS,
    )
    threads: int = option(usable_cores, "Threads of the engine.", shown="the usable cores", minimum=1)
    max_model_len: int | None = option(
        None, "Longest context.", shown="the model's own, as far as memory allows", minimum=1
    )
    max_num_seqs: int = option(64, "Sequences in one step.", minimum=1)
    max_num_batched_tokens: int = option(512, "Tokens in one step.", minimum=1)
    kv_cache_tokens: int | None = option(None, "Size of the KV cache in tokens.", shown="from free memory", minimum=1)
    kv_cache_bytes: int | None = option(None, "Size of the KV cache in bytes.", shown="from free memory", minimum=1)
    block_size: int = option(16, "Tokens in one block of the KV cache.", minimum=1)
    max_waiting_requests: int = option(256, "Sequences that may wait; more are answered 503.", minimum=0)
    max_waiting_tokens: int = option(262_144, "Prompt tokens that may wait; more are answered 503.", minimum=0)
    drain_timeout: float = option(30.0, "How long SIGTERM lets open streams finish.", minimum=0)
    trace_to: str | None = option(
        None,
        "Where OpenTelemetry traces go: an OTLP/HTTP endpoint such as http://127.0.0.1:4318, or a file of JSON lines.",
        shown="no traces",
    )
    trace_ratio: float = option(
        TRACE_RATIO, "Share of the steps that is traced, 0 to 1; requests always are.", minimum=0
    )
    log_level: str = option("info", "Least severe log line to show.", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        for entry in fields(self):
            _check(entry, getattr(self, entry.name))
        for name in ("port", "grpc_port"):
            if (getattr(self, name) or 0) > 65535:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}, which no port is.",
                    "Give one from 1 to 65535, or 0 for a free one.",
                )
        if self.kv_cache_tokens is not None and self.kv_cache_bytes is not None:
            raise ConfigError("kv_cache_tokens and kv_cache_bytes are both given.", "Give one of them.")
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ConfigError(
                f"max_num_seqs is {self.max_num_seqs}, but a step of {self.max_num_batched_tokens} tokens "
                "(max_num_batched_tokens) cannot give each sequence one.",
                "Lower --max-num-seqs or raise --max-num-batched-tokens.",
            )
        self._check_device()
        self._check_engines()
        self._check_pool()
        self._check_traces()

    @property
    def has_pool(self) -> bool:
        """True if the experts are on workers that a controller looks after. Those on GPUs are the engine's own."""
        return self.device == "cpu" and (self.workers > 0 or self.pool is not None or self.controller is not None)

    def _check_device(self) -> None:
        if self.device == "cpu":
            return
        if self.format not in FORMATS_ON_GPU:
            raise ConfigError(
                f"format is {self.format}, which a GPU does not compute with.",
                f"Give one of {', '.join(FORMATS_ON_GPU)}, or --device cpu.",
            )
        for name in ("pool", "controller"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"device is {self.device!r}, but {name} is {getattr(self, name)}: pools compute on CPUs alone.",
                    "Give --device cpu; with GPUs `barista serve --device cuda --workers N` has workers of its own.",
                )
        if self.workers > MAX_GPU_WORKERS:
            raise ConfigError(
                f"workers is {self.workers}, but an engine on GPUs has at most {MAX_GPU_WORKERS}.",
                f"Give --workers {MAX_GPU_WORKERS} or fewer.",
            )
        for name in OF_THE_POOL:
            if getattr(self, name) != _default(name):
                raise ConfigError(
                    f"{name} is {getattr(self, name)}, but workers on GPUs have no such setting.",
                    f"Leave {name} out, or give --device cpu.",
                )
        if self.expert_memory is not None:
            raise ConfigError(
                f"expert_memory is {self.expert_memory}, but a GPU holds all experts.",
                "Leave --expert-memory out, or give --device cpu.",
            )

    def _check_engines(self) -> None:
        if self.engines is None:
            return
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name in OF_THE_ENGINE and value != entry.default:
                raise ConfigError(
                    f"{entry.name} is {value}, but the engines run elsewhere ({self.engines}).",
                    f"Give {entry.name} to the engines, or leave --engines out.",
                )

    def _check_pool(self) -> None:
        if self.controller is not None and not is_host_port(self.controller):
            raise ConfigError(f"controller is {self.controller!r}, which is no HOST:PORT.", "Give one, 10.0.0.5:50052.")
        if self.pool is not None and POOL_NAME.fullmatch(self.pool) is None:
            raise ConfigError(
                f"pool is {self.pool!r}, which is no name.", "Give up to 63 letters, digits, dashes and underscores."
            )
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name in OF_THE_POOL and value != entry.default and not self.has_pool:
                raise ConfigError(
                    f"{entry.name} is {value}, but there are no workers: the experts are in the engine.",
                    f"Give --workers N or --pool NAME with it, or leave {entry.name} out.",
                )
        if self.expert_memory is not None and self.has_pool:
            raise ConfigError(
                f"expert_memory is {self.expert_memory}, but the experts are on workers.",
                "Give --worker-memory, which limits each worker, or leave --workers and --pool out.",
            )

    def _check_traces(self) -> None:
        if self.trace_ratio > 1:
            raise ConfigError(f"trace_ratio is {self.trace_ratio}, which is more than all.", "Give 0 to 1.")
        if self.trace_to is None and self.trace_ratio != TRACE_RATIO:
            raise ConfigError(
                f"trace_ratio is {self.trace_ratio}, but there are no traces.",
                "Give --trace-to with it, or leave trace_ratio out.",
            )


def _default(name: str) -> object:
    return next(entry.default for entry in fields(ServeConfig) if entry.name == name)


TYPES: Mapping[str, Any] = get_type_hints(ServeConfig)


def load(
    file: Path | None,
    environ: Mapping[str, str],
    flags: Mapping[str, object],
    defaults: Mapping[str, object] = MappingProxyType({}),
) -> ServeConfig:
    """The configuration from a TOML file (None: no file), then the environment, then the flags that were given.

    defaults: of a command that has others than ServeConfig. Raises ConfigError, which names the key and its source.
    """
    values: dict[str, object] = dict(defaults)
    if file is not None:
        values |= _from_file(file)
    values |= _from_environment(environ)
    values |= flags
    return ServeConfig(**values)  # type: ignore[arg-type]  # each value was checked against TYPES


def _from_file(file: Path) -> dict[str, object]:
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}.", "Correct --config.") from error
    except ValueError as error:  # TOML or UTF-8
        raise ConfigError(f"{file} is not TOML: {error}.", "Correct the file.") from error
    for key in table:
        if key not in TYPES:
            raise _unknown(f"{file}: key {key!r}", key, TYPES)
    return {key: _typed(f"{file}: {key}", key, value) for key, value in table.items()}


def _from_environment(environ: Mapping[str, str]) -> dict[str, object]:
    names = {ENV_PREFIX + key.upper(): key for key in TYPES}
    values: dict[str, object] = {}
    for name, text in environ.items():
        if name in names:
            values[names[name]] = _typed(name, names[name], _parse(text, names[name]))
        elif name.startswith(ENV_PREFIX) and name not in OTHER_VARIABLES:
            raise _unknown(f"environment variable {name}", name, [*names, *OTHER_VARIABLES])
    return values


def _kind(key: str) -> type:
    """The type of a field's values, None aside."""
    kinds: tuple[type, ...] = get_args(TYPES[key]) or (TYPES[key],)
    return next(kind for kind in kinds if kind is not NoneType)


def _parse(text: str, key: str) -> object:
    """The text as the field's number where it is one; otherwise as it is, for `_typed` to judge."""
    kind = _kind(key)
    if kind not in (int, float):
        return text
    try:
        return kind(text)
    except ValueError:
        return text


def _typed(source: str, key: str, value: object) -> object:
    """`value` as the field's type. An integer is a number and a string is a path; nothing else is converted."""
    kind = _kind(key)
    if kind is Path and isinstance(value, str) and value:
        return Path(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:  # not isinstance: TOML's true is no integer
        raise ConfigError(f"{source} is {value!r}, which is not {KINDS[kind]}.", "Correct it or leave it out.")
    return value


def _check(entry: Field[Any], value: Any) -> None:
    minimum, choices = entry.metadata["minimum"], entry.metadata["choices"]
    if choices and value not in choices:
        raise ConfigError(f"{entry.name} is {value!r}, which is unknown.", f"Give one of {', '.join(choices)}.")
    if minimum is not None and value is not None and not value >= minimum:  # "not >=" also refuses NaN
        raise ConfigError(f"{entry.name} is {value}, which is too small.", f"Give at least {minimum}.")


def _unknown(what: str, name: str, known: Iterable[str]) -> ConfigError:
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0)
    return ConfigError(f"{what} is not known.", f"The nearest known one is {nearest[0]}.")
