"""The pool and its workers as messages of barista.v1, and back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from barista.placement import ExpertKey
from barista.v1 import controller_pb2 as controller_pb
from barista.v1 import experts_pb2 as experts_pb
from experts.controller.commands import MovedReplica
from experts.controller.member import Description, Member, Reach
from experts.controller.planning import problem
from experts.controller.state import Pool
from experts.health.verdict import HEALTHY
from experts.health.wire import health_message, verdict_of

_PROBE_SEED = 20


def pool_state(pool: Pool) -> controller_pb.PoolState:
    """The pool as it is."""
    uncovered = len(pool.placement.uncovered())
    return controller_pb.PoolState(
        term=pool.term,
        epoch=pool.epoch,
        workers=[_worker(pool, member) for member in pool.sorted_members()],
        layers=[_layer(pool, layer) for layer in sorted(pool.settings.layers)],
        coverage=1 - uncovered / len(pool.target) if pool.target else 1.0,
        experts_uncovered=uncovered,
        moves=pool.moves,
        pool=pool.settings.name or "",
        problem=problem(pool),
        model_digest=pool.settings.model_digest,
        engines=len(pool.engines),
    )


def state_of(pool: Pool, member: Member) -> controller_pb.WorkerState:
    """The member's state in one word."""
    match member.reach:
        case Reach.STARTING:
            return controller_pb.WORKER_STATE_STARTING
        case Reach.LOST:
            return controller_pb.WORKER_STATE_LOST
        case Reach.REFUSED:
            return controller_pb.WORKER_STATE_REFUSED
    if member.draining:
        return controller_pb.WORKER_STATE_DRAINING if member.held else controller_pb.WORKER_STATE_DRAINED
    if not pool.planned_for or pool.pending(member):
        return controller_pb.WORKER_STATE_LOADING
    return controller_pb.WORKER_STATE_READY


def description_of(reply: experts_pb.DescribeReply) -> Description:
    """A worker's account of itself."""
    return Description(
        pid=reply.pid,
        incarnation=reply.incarnation,
        numerics_id=reply.numerics_id,
        model_digest=reply.model_digest,
        protocol_version=reply.protocol_version,
        capacity_bytes=reply.capacity_bytes,
        held=digests_of(reply.held),
        draining=reply.draining,
        term=reply.term,
        epoch=reply.epoch,
        verdict=verdict_of(reply.health),
        gpus=tuple(reply.health.gpus),
    )


def digests_of(held: Iterable[experts_pb.HeldExpert]) -> dict[ExpertKey, bytes]:
    """The digest of each expert."""
    return {(expert.layer, expert.expert): expert.digest for expert in held}


def by_layer(keys: Iterable[ExpertKey]) -> list[experts_pb.LayerExperts]:
    """The experts of each layer, in order."""
    layers: dict[int, list[int]] = {}
    for layer, expert in sorted(keys):
        layers.setdefault(layer, []).append(expert)
    return [experts_pb.LayerExperts(layer=layer, experts=experts) for layer, experts in layers.items()]


def move(moved: MovedReplica) -> controller_pb.Move:
    """`from` is a keyword of Python, so that it takes a dictionary."""
    fields: dict[str, Any] = {
        "layer": moved.layer,
        "expert": moved.expert,
        "from": moved.source,
        "to": moved.destination,
    }
    return controller_pb.Move(**fields)


def probe_row(hidden_size: int, dtype: str) -> bytes:
    """One row [hidden_size] of normal draws, the same each time, as float32 or bfloat16 (cut off, not rounded)."""
    row = np.random.default_rng(_PROBE_SEED).standard_normal(hidden_size).astype("<f4")
    return row.tobytes() if dtype == "float32" else row.view("<u2")[1::2].tobytes()


def _worker(pool: Pool, member: Member) -> controller_pb.Worker:
    return controller_pb.Worker(
        name=member.name,
        address=member.address,
        pid=member.pid,
        node=member.node,
        state=state_of(pool, member),
        numerics_id=member.numerics_id,
        capacity_bytes=member.capacity_bytes,
        held_bytes=pool.bytes_of(member.held) if member.live else 0,
        incarnation=member.incarnation,
        detail=" ".join(filter(None, (member.verdict.reason, member.detail))),
        restarts=member.restarts,
        health=health_message(member.verdict, member.gpus) if member.gpus or member.verdict != HEALTHY else None,
    )


def _layer(pool: Pool, layer: int) -> controller_pb.LayerPlacement:
    replicas, digests = pool.placement.replicas, pool.placement.digests
    keys = [(layer, expert) for expert in range(pool.settings.layers[layer])]
    return controller_pb.LayerPlacement(
        layer=layer,
        experts=[controller_pb.ExpertReplicas(workers=replicas[key], digest=digests.get(key, b"")) for key in keys],
    )
