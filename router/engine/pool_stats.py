"""The expert pool's counters as the engine reports them."""

from __future__ import annotations

import time

from experts.link import Link
from experts.remote import RemotePool
from experts.roster import Member
from router.messages import LinkStats, PoolStats


def pool_stats(remote: RemotePool) -> PoolStats:
    """Counters and gauges of now."""
    counters, view = remote.group.counters, remote.roster.view
    names = view.names if view else ()
    return PoolStats(
        epoch=remote.roster.epoch,
        experts_uncovered=len(remote.roster.uncovered()),
        resends=counters.resends,
        hedges=counters.hedges,
        stale_epochs=counters.stale_epochs,
        nonfinite_rows=counters.nonfinite_rows,
        on_demand_loads=remote.loader.loads,
        layers=counters.layers,
        dispatch_seconds=counters.dispatch_seconds,
        combine_seconds=counters.combine_seconds,
        links=tuple(_link_stats(member) for member in remote.roster.members if member.name in names),
    )


def _link_stats(member: Member) -> LinkStats:
    link = member.link
    return LinkStats(
        worker=member.name,
        transport="none" if link is None else link.transport,
        state=_state(member, link),
        dispatches=member.requests,
        rows=member.rows,
        bytes_sent=0 if link is None else link.counters.bytes_sent,
        bytes_received=0 if link is None else link.counters.bytes_received,
        exchange_seconds=member.exchange_seconds,
        compute_seconds=member.compute_seconds,
    )


def _state(member: Member, link: Link | None) -> str:
    if link is None or link.down:
        return "down"
    # Between two steps nobody is asked anything: who owes an answer now is late, even if a hedge covered for it.
    late = link.outstanding > 0 or member.liveness.suspect(time.monotonic(), link.outstanding)
    return "suspect" if late else "ready"
