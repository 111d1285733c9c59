"""The parts of a server put together: engine, tokenizer, chat template, API. Imports no torch, but all of the API."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

from barista.config import ServeConfig
from barista.machine import available_memory
from barista.tracing import check_target
from barista.trust import Trust, deployment_token
from experts.checkpoint import open_checkpoint
from experts.checkpoint.names import check_names
from router.announce import Announcement
from router.api.app import create_app
from router.api.settings import ApiSettings
from router.chat_template import ChatTemplate
from router.device_memory import on_device
from router.engine_process import EngineChild, EngineProcess
from router.engine_sources import engine_source
from router.engines import Engines
from router.format_choice import FormatChoice, choose_format
from router.keys import Keys
from router.messages import EngineConfig
from router.model.families import model_spec
from router.model.tensors import expert_tensors, ignored_tensors, trunk_tensors
from router.models import BUILT_IN, existing_path
from router.pool_client import PoolClient
from router.pool_order import RAY_ADDRESS, pool_process, trace_target, worker_threads
from router.server import Server
from router.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def assemble_api(config: ServeConfig, path: Path, keys: Keys, url: str) -> tuple[Server, Announcement]:
    """As `assemble`, with the engines that `config.engines` names. Of the model, the tokenizer alone is read.

    Raises ConfigError for a source that names none, or without the deployment's token.
    """
    assert config.engines is not None
    token = deployment_token(os.environ)
    source = engine_source(config.engines, os.environ)
    tokenizer = Tokenizer.from_checkpoint(path)
    chat_template = chat_template_of(tokenizer)
    engines = Engines(source, Trust(token, config.tls_dir), token, tokenizer.digest)
    app = create_app(engines, tokenizer, chat_template, api_settings(config, keys), PoolClient(engines.pool_address))
    announcement = Announcement(
        url=url,
        model_id=model_id(config),
        path=path,
        engines=config.engines,
        has_chat=chat_template is not None,
        needs_key=bool(keys.api),
    )
    return Server(app, engines, drain_timeout=config.drain_timeout, grpc_port=config.grpc_port), announcement


def assemble(config: ServeConfig, path: Path, keys: Keys, url: str, child: EngineChild) -> tuple[Server, Announcement]:
    """A server of the model at `path` that is not running yet, and what to print once it is ready.

    url: where it will be reached; child: the engine's process. Raises CheckpointError for the tokenizer, chat template,
    tensors or their format, ConfigError for workers of a dense model, or when traces cannot go where they shall.
    """
    if config.trace_to is not None:
        check_target(config.trace_to)
    tokenizer = Tokenizer.from_checkpoint(path)
    chat_template = chat_template_of(tokenizer)
    choice = format_choice(config, path)
    config = replace(config, format=choice.format)
    engine = EngineProcess(engine_config(config, path, tokenizer.eos_token_ids), child)
    pool = pool_process(config, path) if config.has_pool else None
    app = create_app(
        engine, tokenizer, chat_template, api_settings(config, keys), None if pool is None else pool.client
    )
    announcement = Announcement(
        url=url,
        model_id=model_id(config),
        path=path,
        format=str(choice),
        device="" if config.device == "cpu" else config.device,
        threads=config.threads,
        has_chat=chat_template is not None,
        workers=workers_line(config),
        needs_key=bool(keys.api),
    )
    server = Server(app, engine, pool, drain_timeout=config.drain_timeout, grpc_port=config.grpc_port)
    return server, announcement


def format_choice(config: ServeConfig, path: Path) -> FormatChoice:
    """The weights' format, decided once for engine and workers. What is not this machine's memory decides nothing."""
    on_workers = config.pool is not None or (config.has_pool and bool(os.environ.get(RAY_ADDRESS)))
    elsewhere = on_workers or config.device != "cpu"
    checkpoint = open_checkpoint(path)
    spec = model_spec(checkpoint.config)
    check_names(trunk_tensors(spec) | expert_tensors(spec), checkpoint, ignored_tensors(spec))
    free = None if elsewhere else available_memory()
    choice = choose_format(checkpoint, spec, config.format, free, config.expert_memory)
    if choice.reason:
        log.warning("Weights are held in %s.", choice)
    return choice if config.device == "cpu" else replace(choice, held=on_device(choice.held))


def chat_template_of(tokenizer: Tokenizer) -> ChatTemplate | None:
    """The model's own chat template. Without one the server says so and answers completions only."""
    if tokenizer.chat_template is None:
        log.warning("The model has no chat template: /v1/completions works, /v1/chat/completions does not.")
        return None
    return ChatTemplate(tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token)


def api_settings(config: ServeConfig, keys: Keys) -> ApiSettings:
    """The part of the configuration that the API needs."""
    return ApiSettings(
        model_id=model_id(config),
        api_keys=keys.api,
        admin_keys=keys.admin,
        max_waiting_requests=config.max_waiting_requests,
        max_waiting_tokens=config.max_waiting_tokens,
    )


def workers_line(config: ServeConfig) -> str:
    """Where the experts are, for people; empty while they are in the engine."""
    if config.device == "cuda" and config.workers:
        return f"{config.workers}, on GPUs"
    if not config.has_pool:
        return ""
    name = "" if config.pool is None else f"pool {config.pool}"
    threads = worker_threads(config)
    count = f"{config.workers}, {threads} thread{'s' * (threads > 1)} each" if config.workers else ""
    return ", ".join(part for part in (count, name) if part)


def model_id(config: ServeConfig) -> str:
    """The id that clients see: as configured, or the model's name, or the last part of its path."""
    if config.served_model_id is not None:
        return config.served_model_id
    path = existing_path(config.model)
    return path.name if path is not None and config.model != BUILT_IN else config.model


def engine_config(config: ServeConfig, path: Path, eos_token_ids: tuple[int, ...]) -> EngineConfig:
    """The part of the configuration that the engine needs."""
    return EngineConfig(
        path=str(path),
        eos_token_ids=eos_token_ids,
        device=config.device,
        gpu_workers=config.workers if config.device == "cuda" else 0,
        format=config.format,
        threads=config.threads,
        expert_memory=config.expert_memory,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        kv_cache_tokens=config.kv_cache_tokens,
        kv_cache_bytes=config.kv_cache_bytes,
        block_size=config.block_size,
        trace_to=trace_target(config),
        trace_ratio=config.trace_ratio,
    )
