"""The application: routes, errors and guards around one engine."""

from __future__ import annotations

from fastapi import FastAPI

from barista import __version__
from barista.metrics import Metrics
from router.api.admission import Admission
from router.api.chat import chat_router
from router.api.completions import completions_router
from router.api.errors import install_error_handlers
from router.api.middleware import CheckHost, ReadBody, RequireKey
from router.api.openapi import install_document
from router.api.operations import operations_router
from router.api.pool import pool_router
from router.api.service import Service
from router.api.settings import ApiSettings
from router.api.tokenization import tokenization_router
from router.chat_template import ChatTemplate
from router.engine_client import EngineClient
from router.pool_client import PoolClient
from router.tokenizer import Tokenizer


def create_app(
    engine: EngineClient,
    tokenizer: Tokenizer,
    chat_template: ChatTemplate | None,
    settings: ApiSettings,
    pool: PoolClient | None = None,
) -> FastAPI:
    """The HTTP API around `engine`, which may still be loading. pool: where its experts are, if not in the engine.

    For whoever stops the process: `app.state.drain()` refuses new requests and makes /ready answer 503,
    `await app.state.wait_idle()` returns when no request is open any more. `app.state.service` is what it is about.
    """
    service = Service(engine, tokenizer, chat_template, settings, Admission(settings), Metrics(), pool)
    # No pages that would load their scripts from other hosts.
    app = FastAPI(title="Barista", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    for router in (operations_router, pool_router, chat_router, completions_router, tokenization_router):
        app.include_router(router(service))
    install_error_handlers(app)
    install_document(app, needs_key=bool(settings.api_keys))
    app.add_middleware(ReadBody, settings=settings)
    app.add_middleware(RequireKey, settings=settings)
    if not settings.api_keys:
        app.add_middleware(CheckHost)
    app.state.service = service
    app.state.drain = service.admission.drain
    app.state.wait_idle = service.admission.wait_idle
    return app
