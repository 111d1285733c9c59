"""What GET /pool shows: the controller's view of the pool and the engine's own, as one."""

from __future__ import annotations

from barista.metrics import load_imbalance
from barista.v1 import controller_pb2 as pb
from router.api.responses import LayerReport, MoveReport, PoolReport, RebalanceReport, WorkerReport
from router.messages import LinkStats, PoolStats, Stats

LOCAL: PoolReport = {"epoch": 0, "coverage": 1.0, "workers": []}
NO_WIRE = "none"
NO_LINK = LinkStats(worker="", transport=NO_WIRE, state="ready")
NO_CONTROLLER = "The pool's controller does not answer; the workers serve without it, but none is replaced."
NO_ENGINE = "The engine does not answer; it may be in a long step."


def pool_report(state: pb.PoolState | None, stats: Stats | None) -> PoolReport:
    """The pool as one value. state: None if the controller, stats: None if the engine does not answer.

    Where the two disagree, as for a moment after a worker's death, the report shows the worse.
    """
    pool = PoolStats() if stats is None or stats.pool is None else stats.pool
    tokens = () if stats is None else stats.expert_tokens
    known = _without_controller(pool) if state is None else state
    problems = [known.problem, NO_CONTROLLER if state is None else "", NO_ENGINE if stats is None else ""]
    total = sum(len(layer.experts) for layer in known.layers) or sum(map(len, tokens))
    reached = 1 - pool.experts_uncovered / total if total else known.coverage
    return {
        "epoch": known.epoch,
        "coverage": min(known.coverage, reached),
        "workers": _workers(known, pool.links),
        "experts_uncovered": max(known.experts_uncovered, pool.experts_uncovered),
        "imbalance": load_imbalance([link.rows for link in pool.links]),
        "moves": known.moves,
        "resends": pool.resends,
        "hedges": pool.hedges,
        "engines": known.engines,
        "problem": " ".join(filter(None, problems)),
        "pool": known.pool,
        "layers": [_layer(layer, tokens) for layer in known.layers],
    }


def rebalance_report(reply: pb.RebalanceReply, *, dry_run: bool) -> RebalanceReport:
    """The controller's answer to a rebalance."""
    return {
        "moves": [_move(move) for move in reply.moves],
        "imbalance_before": reply.imbalance_before,
        "imbalance_after": reply.imbalance_after,
        "dry_run": dry_run,
    }


def _without_controller(pool: PoolStats) -> pb.PoolState:
    """What the engine would say in the controller's place."""
    workers = [pb.Worker(name=link.worker, state=pb.WORKER_STATE_READY) for link in pool.links]
    return pb.PoolState(epoch=pool.epoch, coverage=1.0, workers=workers)


def _workers(state: pb.PoolState, links: tuple[LinkStats, ...]) -> list[WorkerReport]:
    """Every worker of the pool, worker-2 before worker-10. The engine may still count those that have left."""
    by_link = {link.worker: link for link in links}
    workers = sorted(state.workers, key=lambda worker: _by_number(worker.name))
    return [_worker(worker, by_link.get(worker.name, NO_LINK)) for worker in workers]


def _worker(worker: pb.Worker, link: LinkStats) -> WorkerReport:
    ready = worker.state == pb.WORKER_STATE_READY
    return {
        "name": worker.name,
        "pid": worker.pid,
        "address": worker.address,
        "state": link.state if ready else _state_name(worker.state),
        "numerics_id": worker.numerics_id,
        "bytes": worker.held_bytes,
        "capacity_bytes": worker.capacity_bytes,
        "node": worker.node,
        "restarts": worker.restarts,
        "transport": None if link.transport == NO_WIRE else link.transport,
        "dispatches": link.dispatches,
        "rows": link.rows,
        "latency_ms": round(1e3 * link.exchange_seconds / link.dispatches, 3) if link.dispatches else 0.0,
        "detail": worker.detail,
    }


def _state_name(state: pb.WorkerState) -> str:
    return str(pb.WorkerState.Name(state)).removeprefix("WORKER_STATE_").lower()


def _layer(layer: pb.LayerPlacement, tokens: tuple[tuple[int, ...], ...]) -> LayerReport:
    counts = tokens[layer.layer] if layer.layer < len(tokens) else ()
    return {
        "layer": layer.layer,
        "tokens": list(counts),
        "replicas": [list(expert.workers) for expert in layer.experts],
    }


def _move(move: pb.Move) -> MoveReport:
    source = str(getattr(move, "from"))  # a keyword of Python
    return {"layer": move.layer, "expert": move.expert, "from": source or None, "to": move.to or None}


def _by_number(name: str) -> tuple[str, int]:
    stem, _, number = name.rpartition("-")
    return (stem, int(number)) if number.isdecimal() else (name, -1)
