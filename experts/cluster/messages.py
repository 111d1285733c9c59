"""What the parent and the keeper of a pool say to each other: one JSON object a line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from barista.tracing import TRACE_RATIO
from experts.expert_model import ExpertModel


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """The first line, from the parent.

    pool: the name of a pool that outlives its servers; None for a pool of one server. workers: how many. threads: of
    each. worker_memory: bytes of experts in each; None for its share of the node's free memory. expert_bytes: of one
    expert, by layer. trace_to, trace_ratio: where workers send traces, if anywhere, and of what share of the steps.
    controller_port: of the controller; 0 takes a free one. engines, engine_command: how many engines to keep beside a
    pool that has a name, and what each of them runs (experts.cluster.engines).
    """

    pool: str | None
    workers: int
    threads: int
    redundancy: int
    worker_memory: int | None
    tls_dir: str | None
    model: ExpertModel
    expert_bytes: dict[int, int]
    trace_to: str | None = None
    trace_ratio: float = TRACE_RATIO
    controller_port: int = 0
    engines: int = 0
    engine_command: tuple[str, ...] = ()

    def to_json(self) -> str:
        """For from_json in another process."""
        value: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps(value | {"model": json.loads(self.model.to_json())})

    @classmethod
    def from_json(cls, text: str) -> PoolConfig:
        """What to_json wrote. The model may be an object or a string of JSON."""
        value = json.loads(text)
        model = value["model"]
        value["model"] = ExpertModel.from_json(model if isinstance(model, str) else json.dumps(model))
        value["engine_command"] = tuple(value.get("engine_command", ()))
        value["expert_bytes"] = {int(layer): size for layer, size in value["expert_bytes"].items()}
        return cls(**value)


def progress(fraction: float, message: str) -> str:
    """The pool is starting. fraction: 0..1."""
    return json.dumps({"event": "progress", "fraction": fraction, "message": message})


def ready(controller: str, token: str, pool: str) -> str:
    """The controller serves at host:port; the workers may still be on their way. pool: empty without a name."""
    return json.dumps({"event": "ready", "controller": controller, "token": token, "pool": pool})


def fatal(message: str, remedy: str = "") -> str:
    """There is no pool, or there is none any more."""
    return json.dumps({"event": "fatal", "message": message, "remedy": remedy})
