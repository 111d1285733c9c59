"""GET /pool, and what operators ask of the pool: drain, scale, rebalance."""

from __future__ import annotations

from fastapi import APIRouter, Request

from barista.errors import EngineFailed, InvalidRequest
from router.api.json_body import StrictJsonRoute
from router.api.openapi import GET_POOL_ERRORS, POOL_ERRORS
from router.api.pool_report import LOCAL, pool_report, rebalance_report
from router.api.responses import PoolReport, RebalanceReport
from router.api.schemas import DrainRequest, RebalanceRequest, ScaleRequest
from router.api.service import Service
from router.messages import Stats
from router.pool_client import PoolClient


def pool_router(service: Service) -> APIRouter:
    """The routes. Those that change the pool ask for an admin key wherever API keys are asked for."""
    router = APIRouter()
    commands = APIRouter(route_class=StrictJsonRoute)

    @router.get("/pool", responses=GET_POOL_ERRORS)
    async def show() -> PoolReport:
        """The workers, their health and load, and which of them holds which expert."""
        return LOCAL if service.pool is None else await _report(service, service.pool)

    @commands.post("/pool/drain", responses=POOL_ERRORS)
    async def drain(request: Request, body: DrainRequest) -> PoolReport:
        """Move every expert off one worker. Answers when that is done; serving goes on meanwhile."""
        pool = _commanded(service, request)
        return pool_report(await pool.drain(body.worker), await _stats(service))

    @commands.post("/pool/scale", responses=POOL_ERRORS)
    async def scale(request: Request, body: ScaleRequest) -> PoolReport:
        """Start workers, or drain and stop them, until there are so many. Answers when that is done."""
        pool = _commanded(service, request)
        return pool_report(await pool.scale(body.workers), await _stats(service))

    @commands.post("/pool/rebalance", responses=POOL_ERRORS)
    async def rebalance(request: Request, body: RebalanceRequest) -> RebalanceReport:
        """Spread replicas by the load that was seen. Answers with the moves, which dry_run only plans."""
        pool = _commanded(service, request)
        dry_run = bool(body.dry_run)
        return rebalance_report(await pool.rebalance(dry_run=dry_run), dry_run=dry_run)

    router.include_router(commands)
    return router


async def _report(service: Service, pool: PoolClient) -> PoolReport:
    """Both sides' views; one alone while the other does not answer."""
    stats = await _stats(service)
    try:
        return pool_report(await pool.state(), stats)
    except EngineFailed:
        if stats is None:
            raise
        return pool_report(None, stats)


async def _stats(service: Service) -> Stats | None:
    """The engine's view; None while it does not answer."""
    try:
        return await service.engine.stats()
    except EngineFailed:
        return None


def _commanded(service: Service, request: Request) -> PoolClient:
    """The pool, for a caller who may change it. Raises InvalidRequest: 403, or 400 where there is no pool."""
    settings = service.settings
    if settings.admin_keys and request.scope["barista.key"] not in settings.admin_keys:
        raise InvalidRequest(
            "Changing the pool asks for an admin key: one from the file that the server was started with.",
            status=403,
            code="admin_key_required",
        )
    if settings.api_keys and not settings.admin_keys:
        raise InvalidRequest(
            "This server was started with API keys but without admin keys, so nobody may change its pool. Start it "
            "with --admin-key-file FILE.",
            status=403,
            code="no_admin_keys",
        )
    if service.pool is None:
        raise InvalidRequest(
            "This server has no pool: its experts are in the engine, or on workers of its own on GPUs. Start it with "
            "--workers N, on CPUs, for a pool.",
            code="no_workers",
        )
    return service.pool
