"""What operators and their machines ask: models, health, readiness, metrics."""

from __future__ import annotations

from fastapi import APIRouter, Response

from barista.errors import EngineFailed, Overloaded, RequestError
from barista.metrics import CONTENT_TYPE
from barista.v1 import controller_pb2 as pb
from router.api.gpu_stats import gpu_stats
from router.api.openapi import GET_ERRORS, TEXT, UNREADY
from router.api.responses import Model, ModelList, Status
from router.api.service import Service, unknown_model


def operations_router(service: Service) -> APIRouter:
    """The routes."""
    router = APIRouter()

    @router.get("/health")
    async def health() -> Status:
        """The process answers. It may not be ready to serve."""
        return {"status": "ok"}

    @router.get("/live", responses=UNREADY)
    async def live() -> Status:
        """The process makes progress, or waits for what it cannot hurry: 503 means that a restart would help."""
        if not await service.engine.makes_progress():
            raise Overloaded("The engine has made no progress for minutes.", code="no_progress", retry_after=5)
        return {"status": "ok"}

    @router.get("/ready", responses=UNREADY)
    async def ready() -> Status:
        """The model is loaded, a worker holds every expert, and new requests are welcome."""
        await service.require_ready()
        return {"status": "ok"}

    @router.get("/metrics", response_class=Response, responses={**GET_ERRORS, 200: TEXT})
    async def metrics() -> Response:
        """Prometheus' text format. The engine's part is missing while there is no engine to ask."""
        try:
            stats = await service.engine.stats() if service.engine.ready else None
        except EngineFailed:
            stats = None
        pool = await _pool(service)
        told = () if pool is None else (pool.moves, gpu_stats(pool))
        return Response(service.metrics.exposition(stats, *told), media_type=CONTENT_TYPE)

    @router.get("/v1/models", responses=GET_ERRORS)
    async def list_models() -> ModelList:
        """The one served model."""
        return {"object": "list", "data": [_model(service)]}

    @router.get("/v1/models/{model_id:path}", responses=GET_ERRORS)
    async def retrieve_model(model_id: str) -> Model:
        """The served model by its name."""
        if model_id != service.settings.model_id:
            raise unknown_model(model_id)
        return _model(service)

    return router


async def _pool(service: Service) -> pb.PoolState | None:
    """The pool as it is; None where there is no controller to ask."""
    if service.pool is None:
        return None
    try:
        return await service.pool.state()
    except RequestError:
        return None


def _model(service: Service) -> Model:
    return {
        "id": service.settings.model_id,
        "object": "model",
        "created": service.created,
        "owned_by": "barista",
        "max_model_len": service.engine.model.max_model_len if service.engine.ready else None,
    }
