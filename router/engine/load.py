"""The engine's model, in memory or on a GPU, with what is left there for its KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from barista.machine import available_memory
from barista.trust import Trust
from experts.checkpoint import Checkpoint
from experts.expert_parallel.gpus import Fitness, choose_gpus, visible_uuids
from experts.expert_parallel.pool import GroupConfig
from experts.formats import Holding
from experts.numerics import device_numerics_id, numerics_id
from experts.remote import PoolConfig
from router.device_memory import kv_budget, on_device, require_room_on_device
from router.engine.core import default_kv_bytes, kv_bytes_per_token
from router.expert_memory import check_expert_memory, require_room_for_experts
from router.memory import require_room_for_trunk
from router.messages import EngineConfig
from router.model.device.graphs import padded_rows
from router.model.device.load import load_device_model
from router.model.families import model_spec
from router.model.load import Model, Progress, load_model

if TYPE_CHECKING:
    from barista.tracer import Tracer


@dataclass(frozen=True, slots=True)
class Loaded:
    """numerics_id: what bytes depend on. free: bytes that a KV cache may take; default_kv: that one takes unasked."""

    model: Model
    numerics_id: str
    free: int
    default_kv: int


def load_on_cpu(
    config: EngineConfig, checkpoint: Checkpoint, held: Holding, report: Progress, tracer: Tracer | None
) -> Loaded:
    """The model by the CPU's kernels. Raises BaristaError."""
    require_room_for_trunk(checkpoint, held, available_memory())
    if config.expert_memory is not None:
        _check_expert_memory(checkpoint, held, config.expert_memory)
    dtype = getattr(torch, held.dtype)
    numerics = numerics_id(dtype, held.format)
    model = load_model(
        checkpoint,
        dtype,
        config.max_model_len,
        report,
        weight_format=held.format,
        pool=_pool_config(config, numerics, tracer),
        expert_memory=config.expert_memory,
    )
    free = available_memory() - (0 if model.residency is None else model.residency.limit)  # not read yet
    return Loaded(model, numerics, free, default_kv_bytes(model, free))


def load_on_cuda(
    config: EngineConfig, checkpoint: Checkpoint, held: Holding, report: Progress, device: torch.device
) -> Loaded:
    """The model on one GPU, or its experts on workers. Raises BaristaError."""
    held = on_device(held)
    group = _group_config(config) if config.gpu_workers else None
    if group is not None:
        device = group.engine
        torch.cuda.set_device(device)
    spec = model_spec(checkpoint.config)
    require_room_on_device(checkpoint, spec, held, torch.cuda.mem_get_info(device)[0], with_experts=group is None)
    dtype = getattr(torch, held.dtype)
    model = load_device_model(
        checkpoint, dtype, device, config.max_model_len, report, weight_format=held.format, group=group
    )
    torch.cuda.empty_cache()  # what loading needed beside the weights
    free, total = torch.cuda.mem_get_info(device)
    wanted = config.max_num_seqs * model.trunk.max_len * kv_bytes_per_token(model)
    return Loaded(model, device_numerics_id(device, dtype, held.format), free, kv_budget(free, total, wanted))


def _group_config(config: EngineConfig) -> GroupConfig:
    """The GPUs of the engine and its workers, watched from now on."""
    uuids = visible_uuids()
    gpus = choose_gpus(uuids, config.gpu_workers)
    return GroupConfig(
        engine=torch.device("cuda", gpus.engine),
        workers=tuple(torch.device("cuda", gpu) for gpu in gpus.workers),
        max_tokens=max(config.max_num_batched_tokens, padded_rows(config.max_num_seqs)),
        unfit=Fitness(gpus.workers, uuids).unfit,
    )


def _check_expert_memory(checkpoint: Checkpoint, held: Holding, limit: int) -> None:
    """Before anything is packed or loaded. Raises ConfigError."""
    spec = model_spec(checkpoint.config)
    check_expert_memory(checkpoint, spec, held, limit)
    require_room_for_experts(checkpoint, spec, held, limit, available_memory())


def _pool_config(config: EngineConfig, engine_numerics: str, tracer: Tracer | None) -> PoolConfig | None:
    if config.pool is None:
        return None
    tls_dir = config.pool.tls_dir
    return PoolConfig(
        controller=config.pool.controller,
        trust=Trust(config.pool.token, None if tls_dir is None else Path(tls_dir)),
        transport=config.pool.transport,
        numerics_id=engine_numerics,
        max_rows=config.max_num_batched_tokens,
        tracer=tracer,
    )
