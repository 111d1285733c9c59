"""The engine's process: commands in, one frame of events a step out."""

from __future__ import annotations

import logging
import os
import queue
import secrets
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from barista.errors import BaristaError, ConfigError
from barista.tracing import ENGINE_SERVICE, open_tracer
from experts import kernels
from experts.checkpoint import open_checkpoint
from experts.formats import holding
from router.engine.core import Engine, kv_blocks, kv_bytes_per_token, model_info
from router.engine.load import load_on_cpu, load_on_cuda
from router.framing import frame, read_frame
from router.kv_cache.blocks import BlockPool
from router.messages import (
    Abort,
    Command,
    EngineConfig,
    Event,
    Fatal,
    GetStats,
    Loading,
    Ready,
    Submit,
    decode_command,
    decode_config,
    encode,
)
from router.model.device.cuda import cuda_device
from router.model.load import Model
from router.scheduler import Scheduler

if TYPE_CHECKING:
    from barista.tracer import Tracer
    from router.engine.traces import EngineTraces

log = logging.getLogger(__name__)


def serve(sock: socket.socket) -> None:
    """Load what the first frame asks for, then step while there is work. Returns when the peer has gone."""
    first = read_frame(sock)
    if first is None:
        return
    try:
        engine, ready, traces = _start(decode_config(first), sock)
        _send(sock, ready)
    except ConnectionError:
        return
    except BaristaError as error:
        _send(sock, Fatal(error.message, error.remedy))
        return
    except MemoryError:
        _send(sock, Fatal("There is not enough memory to load the model.", "See `barista inspect`; try --format int4."))
        return
    except torch.OutOfMemoryError:
        _send(sock, Fatal("The GPU has not enough memory for the model.", "Give a smaller --kv-cache-tokens."))
        return
    commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
    reader = threading.Thread(target=_read_commands, args=(sock, commands, traces), daemon=True)
    reader.start()
    try:
        while True:
            _apply_all(engine, commands, sock)
            events = engine.step()
            if events.tokens or events.failed:
                _send(sock, events)
    except ConnectionError:
        reader.join()  # it has seen that the API has gone, too, and ends the process


def _start(config: EngineConfig, sock: socket.socket) -> tuple[Engine, Ready, EngineTraces | None]:
    device = cuda_device() if config.device == "cuda" else None
    tracer = open_tracer(config.trace_to, config.trace_ratio, ENGINE_SERVICE, str(os.getpid()))
    kernels.set_num_threads(config.threads)
    torch.set_num_threads(config.threads)
    checkpoint = open_checkpoint(Path(config.path))
    held = holding(checkpoint, config.format)

    def report(fraction: float, message: str) -> None:
        _send(sock, Loading(fraction, message))

    if device is None:
        loaded = load_on_cpu(config, checkpoint, held, report, tracer)
    else:
        loaded = load_on_cuda(config, checkpoint, held, report, device)
    model = loaded.model
    blocks = kv_blocks(model, config.block_size, config.kv_cache_tokens, config.kv_cache_bytes, loaded.default_kv)
    size = blocks * config.block_size * kv_bytes_per_token(model)
    if size > loaded.free:
        raise ConfigError(
            f"A KV cache of {size:,} bytes does not fit into the {loaded.free:,} bytes that are free.",
            f"Ask for at most {loaded.free // kv_bytes_per_token(model):,} tokens (--kv-cache-tokens).",
        )
    scheduler = Scheduler(
        BlockPool(blocks, config.block_size),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=min(model.trunk.max_len, blocks * config.block_size),
        eos_token_ids=config.eos_token_ids,
    )
    traces = _engine_traces(tracer, model)
    return Engine(model, scheduler, traces), Ready(model_info(model, scheduler, loaded.numerics_id)), traces


def _engine_traces(tracer: Tracer | None, model: Model) -> EngineTraces | None:
    """The engine's own spans, under the id by which the workers know it."""
    if tracer is None:
        return None
    from router.engine.traces import EngineTraces  # imported here, because most engines do without

    return EngineTraces(tracer, secrets.token_hex(8) if model.remote is None else model.remote.engine_id)


def _read_commands(sock: socket.socket, commands: queue.SimpleQueue[Command], traces: EngineTraces | None) -> None:
    try:
        while (payload := read_frame(sock)) is not None:
            commands.put(decode_command(payload))
    except Exception:
        log.exception("The API sent what the engine does not understand.")
        os._exit(1)
    if traces is not None:
        traces.flush()
    os._exit(0)  # The API has gone, however it went. Nothing here outlives it, and a step may be under way.


def _apply_all(engine: Engine, commands: queue.SimpleQueue[Command], sock: socket.socket) -> None:
    """Apply what has arrived; wait for something when there is nothing to do."""
    while True:
        try:
            command = commands.get(block=not engine.has_work)
        except queue.Empty:
            return
        match command:
            case Submit():
                engine.submit(command)
            case Abort():
                engine.abort(command.request_ids)
            case GetStats():
                _send(sock, engine.stats())


def _send(sock: socket.socket, event: Event) -> None:
    sock.sendall(frame(encode(event)))
