"""From a checkpoint to a model that runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from barista.errors import BaristaError
from experts import kernels
from experts.checkpoint import Checkpoint
from experts.checkpoint.names import check_names
from experts.expert_model import ExpertModel, expert_bytes
from experts.expert_weights import ExpertReader, held_as
from experts.formats import PLAIN, Holding
from experts.packed.convert import prepare
from experts.pool import ExpertPool, Transport
from experts.remote import PoolConfig, RemotePool
from experts.residency import Residency
from experts.transport.local import LocalTransport
from experts.transport.resident import ResidentTransport
from experts.weights import WeightReader
from router.model.batch import Batch
from router.model.expert_model import expert_model
from router.model.families import model_spec
from router.model.packed import expert_layers, packed_experts, packed_trunk
from router.model.spec import ModelSpec
from router.model.tensors import expert_tensors, ignored_tensors, trunk_tensors
from router.model.trunk import Trunk

Progress = Callable[[float, str], None]

TRUNK_AT = 0.9  # of the progress, when the experts are there


class Forward(Protocol):
    """What the engine asks of a trunk, be it the CPU's or a device's: router.model.trunk.Trunk says more."""

    max_len: int

    def allocate_cache(self, num_blocks: int, block_size: int) -> torch.Tensor:
        """A KV cache as forward takes it."""
        ...

    def forward(self, batch: Batch, cache: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One step; logits and failed rows, on the CPU."""
        ...


class Model:
    """A loaded model: its spec, its trunk and, where it has experts, their pool.

    remote: the workers that hold the experts. residency: which of them are in memory, where a limit says how many.
    """

    def __init__(
        self,
        spec: ModelSpec,
        trunk: Forward,
        pool: ExpertPool | None,
        dtype: torch.dtype,
        remote: RemotePool | None = None,
        residency: Residency | None = None,
    ) -> None:
        self.spec = spec
        self.trunk = trunk
        self.pool = pool
        self.dtype = dtype
        self.remote = remote
        self.residency = residency


def load_model(
    checkpoint: Checkpoint,
    model_dtype: torch.dtype,
    max_len: int | None = None,
    on_progress: Progress | None = None,
    *,
    weight_format: str = PLAIN,
    pool: PoolConfig | None = None,
    expert_memory: int | None = None,
) -> Model:
    """Load every tensor that the model needs, memory-mapped where it is stored as it is held, or packed.

    max_len: positions to prepare for; the model's own limit if None. weight_format: as in `Holding`; matrices of few
    bits are packed first, unless they are already. pool: where the experts are, if not here; returns once all of them
    can be reached. expert_memory: bytes of experts to keep in memory, which router.expert_memory has checked; None for
    all of them. Raises CheckpointError: an unknown architecture, a missing, unexpected or misshapen tensor, or a
    shape that the format cannot take; CacheError: there is no room to pack it; ConfigError: the pool cannot hold all
    experts.
    """
    spec = model_spec(checkpoint.config)
    shapes = trunk_tensors(spec)
    check_names(shapes | expert_tensors(spec), checkpoint, ignored_tensors(spec))
    report = on_progress or (lambda fraction, message: None)
    remote: RemotePool | None = None
    residency: Residency | None = None
    experts: ExpertPool | None = None
    if pool is not None:
        remote = RemotePool(*_as_workers_know_it(checkpoint, model_dtype, weight_format), pool)
        remote.start()
        experts = remote.experts
    elif spec.num_experts:
        experts, residency = _local_pool(spec, checkpoint, model_dtype, weight_format, report, expert_memory)
    report(TRUNK_AT, "trunk")
    part = packed_trunk(checkpoint, spec, weight_format)
    prepare(part, lambda fraction, message: report(TRUNK_AT + (1 - TRUNK_AT) * fraction, message))
    packed = part.over(checkpoint)
    reader = WeightReader(packed)

    def load(name: str, dtype: torch.dtype | None = None) -> Any:
        shape, info = shapes[name], packed.tensors[name]
        if len(shape) == 2 and dtype is None:
            return reader.weight(name, (shape[0], shape[1]), held_as(info, model_dtype))
        return reader.get(name, shape, dtype or held_as(info, model_dtype))

    trunk = Trunk(spec, load, experts, min(max_len or spec.max_position, spec.max_position))
    if remote is not None:
        try:
            remote.wait_covered(report)
        except BaristaError:
            remote.close()  # its threads must not outlive the failure
            raise
    return Model(spec, trunk, experts, model_dtype, remote, residency)


def _local_pool(
    spec: ModelSpec,
    checkpoint: Checkpoint,
    model_dtype: torch.dtype,
    weight_format: str,
    report: Progress,
    expert_memory: int | None,
) -> tuple[ExpertPool, Residency | None]:
    """The experts in this process, and which of them are in memory where expert_memory limits them."""
    part = packed_experts(checkpoint, spec, weight_format)
    prepare(part, lambda fraction, message: report(TRUNK_AT * fraction, message))
    reader = ExpertReader(part.over(checkpoint), model_dtype)
    layers = expert_layers(spec)
    tables, sizes = {}, {}  # sizes: bytes of one expert
    for index, layer in layers.items():
        report(TRUNK_AT * index / spec.num_layers, f"experts of layer {index}")
        weights = {expert: reader.read(layer, index, expert) for expert in range(layer.num_experts)}
        tables[index] = kernels.ExpertTable(weights, layer.num_experts, dtype=model_dtype)
        sizes[index] = sum(part.nbytes for weight in weights[0] for part in kernels.parts_of(weight))
    transport: Transport = LocalTransport(tables)
    residency: Residency | None = None
    if expert_memory is not None:
        total = sum(layers[index].num_experts * nbytes for index, nbytes in sizes.items())
        residency = Residency(min(expert_memory, total), sizes)
        transport = ResidentTransport(transport, residency, reader, layers)
    return ExpertPool(transport, spec.num_layers, spec.num_experts), residency


def _as_workers_know_it(
    checkpoint: Checkpoint, model_dtype: torch.dtype, weight_format: str
) -> tuple[ExpertModel, dict[int, int]]:
    """The experts, and the bytes of one by layer."""
    model = expert_model(checkpoint, Holding(str(model_dtype).removeprefix("torch."), weight_format))
    return model, expert_bytes(checkpoint, model)
