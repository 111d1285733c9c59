"""A pool of workers, as an engine uses it: links, placement, on-demand loading and the router, put together."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from barista.errors import ConfigError
from barista.trust import Trust
from experts.attach import Hello, WorkerClient, attach
from experts.expert_model import ExpertModel
from experts.formats import PLAIN
from experts.group import WorkerGroup
from experts.link import Link
from experts.on_demand import OnDemandLoader
from experts.pool import ExpertPool
from experts.pool_view import PoolView, PoolWatch, WorkerView
from experts.roster import Member, Roster

if TYPE_CHECKING:
    from barista.tracer import Tracer

ACKNOWLEDGE_SECONDS = 0.02
# How long the start waits for a pool that says that it cannot cover all experts, and for one that only stands still.
PROBLEM_SECONDS = 5.0
STANDSTILL_SECONDS = 120.0
# How long it waits for the first expert where the workers may have to pack theirs: a file for each layer, unreported.
PACKING_SECONDS = 3600.0

Progress = Callable[[float, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolConfig:
    """controller: host:port. transport: auto, shm or grpc. max_rows: rows of one step at most.

    tracer: None without traces.
    """

    controller: str
    trust: Trust
    transport: str
    numerics_id: str
    max_rows: int
    tracer: Tracer | None = None


class RemotePool:
    """Attached to every worker of a pool for as long as it is open.

    expert_bytes: of one expert, by layer. engine_id: how this engine calls itself towards workers and controller.
    """

    def __init__(self, model: ExpertModel, expert_bytes: Mapping[int, int], config: PoolConfig) -> None:
        self._model = model
        self._config = config
        self.engine_id = secrets.token_hex(8)
        self._trust = config.trust
        self.roster = Roster(self._attach, {layer: spec.num_experts for layer, spec in model.layers.items()})
        self.loader = OnDemandLoader(self.roster, self._control, expert_bytes.__getitem__)
        self.group = WorkerGroup(self.roster, self.loader)
        num_experts = max(spec.num_experts for spec in model.layers.values())
        self.experts = ExpertPool(self.group, max(model.layers) + 1, num_experts)
        self._reported = torch.zeros_like(self.experts.counted_tokens)
        self._watch = PoolWatch(config.controller, config.trust, self.engine_id, self.roster.update, self._new_tokens)
        self._closed = threading.Event()
        self._acknowledger = threading.Thread(target=self._acknowledge, name="acknowledge", daemon=True)

    def start(self) -> None:
        """Begin to watch and attach."""
        self._watch.start()
        self._acknowledger.start()

    def wait_covered(self, on_progress: Progress) -> None:
        """Return once every expert can be reached. Raises ConfigError with the controller's reason if it cannot be."""
        coverage, since = -1.0, time.monotonic()
        while self.roster.view is None or self.roster.uncovered():
            view = self.roster.view
            self._require_our_model(view)
            if view is not None and view.coverage != coverage:
                coverage, since = view.coverage, time.monotonic()
            packing = self._model.format != PLAIN and coverage <= 0
            if time.monotonic() - since > patience(view, packing=packing):
                raise self._standstill(view)
            on_progress(0.9 * max(coverage, 0.0), self._progress(view))
            self.roster.wait_changed(0.2)

    def close(self) -> None:
        """Let go of the workers."""
        self._closed.set()
        self._watch.close()
        self.roster.close()

    def _progress(self, view: PoolView | None) -> str:
        if view is None:
            return "the pool's controller does not answer yet"
        attached = sum(member.up for member in self.roster.members)
        return f"experts on workers ({attached} attached, {view.coverage:.0%} covered)"

    def _standstill(self, view: PoolView | None) -> ConfigError:
        """Why the experts cannot all be reached, as far as anybody has said."""
        said = [view.problem if view is not None and view.problem else "The worker pool makes no progress."]
        if self._watch.complaint:
            said.append(self._watch.complaint)
        away = [member for member in self.roster.members if member.complaint and not member.up]
        said += [f"{member.name} at {member.view.address} cannot be attached: {member.complaint}" for member in away]
        return ConfigError(
            "\n".join(said),
            "Look at `barista status` and at the logs of the workers and of the controller at "
            f"{self._config.controller}; this process must be able to reach all their addresses.",
        )

    def _require_our_model(self, view: PoolView | None) -> None:
        if view is not None and view.model_digest != self._model.digest:
            raise ConfigError(
                f"The pool at {self._config.controller} has experts of another checkpoint than {self._model.path}, "
                f"or in another dtype than {self._model.dtype} or format than {self._model.format}.",
                "Name the model that the pool was made for, in its --format, or use another pool.",
            )

    def _new_tokens(self) -> dict[int, list[int]]:
        """Tokens routed to each expert since the last call, by layer."""
        now = self.experts.counted_tokens.clone()
        new, self._reported = now - self._reported, now
        return {layer: new[layer, : spec.num_experts].tolist() for layer, spec in self._model.layers.items()}

    def _acknowledge(self) -> None:
        """Tell the controller which placement is in use: the newest, once no layer runs under an older one."""
        told = 0, 0
        while not self._closed.wait(ACKNOWLEDGE_SECONDS):
            placement, in_use = self.roster.placement, self.group.placement_in_use
            if placement > told and (in_use is None or in_use >= placement):
                told = placement
                self._watch.acknowledge(*placement)

    def _attach(self, worker: WorkerView) -> Link:
        hello = Hello(
            engine_id=self.engine_id,
            model=self._model,
            numerics_id=self._config.numerics_id,
            max_rows=self._config.max_rows,
        )
        link = attach(worker.address, hello, self._trust, transport=self._config.transport)
        if self._config.tracer is None:
            return link
        from experts.transport.traced import TracedLink  # imported here, because most engines do without

        return TracedLink(link, self._config.tracer, self.engine_id, worker.name)

    def _control(self, member: Member) -> WorkerClient:
        return WorkerClient(member.view.address, self._trust)


def patience(view: PoolView | None, *, packing: bool = False) -> float:
    """Seconds that a start waits for the next progress: less once all workers have settled and it is not enough.

    packing: the workers may be making their packed cache.
    """
    if view is not None and view.problem and not view.settling:
        return PROBLEM_SECONDS
    return PACKING_SECONDS if packing else STANDSTILL_SECONDS
