"""One account of several engines, for whoever asks an API that serves from all of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import msgspec

from router.messages import ExpertCacheStats, LinkStats, PoolStats, Stats

# Of a worker that engines see differently, the worst is told.
STATES = ("ready", "suspect", "down")


def merged(all_stats: Sequence[Stats]) -> Stats:
    """Counters and sizes are added. Of a pool that they share: the newest epoch, and the worst that anyone sees."""
    if len(all_stats) == 1:
        return all_stats[0]
    pools = [stats.pool for stats in all_stats if stats.pool is not None]
    caches = [stats.expert_cache for stats in all_stats if stats.expert_cache is not None]
    sums = {name: sum(getattr(stats, name) for stats in all_stats) for name in _numbers(Stats)}
    return Stats(
        **sums,
        expert_tokens=_expert_tokens([stats.expert_tokens for stats in all_stats]),
        pool=_pool(pools) if pools else None,
        expert_cache=_expert_cache(caches) if caches else None,
    )


def _expert_tokens(counts: Sequence[tuple[tuple[int, ...], ...]]) -> tuple[tuple[int, ...], ...]:
    layers = zip_longest(*counts, fillvalue=())
    return tuple(tuple(map(sum, zip_longest(*layer, fillvalue=0))) for layer in layers)


def _pool(pools: Sequence[PoolStats]) -> PoolStats:
    sums = {name: sum(getattr(pool, name) for pool in pools) for name in _numbers(PoolStats)}
    sums |= {name: max(getattr(pool, name) for pool in pools) for name in ("epoch", "experts_uncovered")}
    links: dict[str, LinkStats] = {}
    for pool in pools:
        for link in pool.links:
            links[link.worker] = link if link.worker not in links else _link(links[link.worker], link)
    return PoolStats(**sums, links=tuple(links.values()))


def _link(first: LinkStats, second: LinkStats) -> LinkStats:
    sums = {name: getattr(first, name) + getattr(second, name) for name in _numbers(LinkStats)}
    return msgspec.structs.replace(first, state=max(first.state, second.state, key=STATES.index), **sums)


def _expert_cache(caches: Sequence[ExpertCacheStats]) -> ExpertCacheStats:
    return ExpertCacheStats(**{name: sum(getattr(c, name) for c in caches) for name in _numbers(ExpertCacheStats)})


def _numbers(kind: type[msgspec.Struct]) -> list[str]:
    return [entry.name for entry in msgspec.structs.fields(kind) if entry.type in (int, float)]
