"""From a checkpoint to a model that runs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from experts import kernels
from experts.checkpoint import Checkpoint
from experts.checkpoint.names import check_names
from experts.expert_model import expert_bytes
from experts.expert_weights import ExpertReader, held_as
from experts.pool import ExpertPool
from experts.remote import PoolConfig, RemotePool
from experts.transport.local import LocalTransport
from experts.weights import WeightReader
from router.model.expert_model import expert_model
from router.model.families import model_spec
from router.model.spec import ModelSpec, MoESpec
from router.model.tensors import expert_tensors, ignored_tensors, trunk_tensors
from router.model.trunk import Trunk

Progress = Callable[[float, str], None]


class Model:
    """A loaded model: its spec, its trunk and, where it has experts, their pool; remote: the workers that hold them."""

    def __init__(
        self,
        spec: ModelSpec,
        trunk: Trunk,
        pool: ExpertPool | None,
        dtype: torch.dtype,
        remote: RemotePool | None = None,
    ) -> None:
        self.spec = spec
        self.trunk = trunk
        self.pool = pool
        self.dtype = dtype
        self.remote = remote


def load_model(
    checkpoint: Checkpoint,
    model_dtype: torch.dtype,
    max_len: int | None = None,
    on_progress: Progress | None = None,
    *,
    pool: PoolConfig | None = None,
) -> Model:
    """Load every tensor that the model needs, memory-mapped where the checkpoint stores `model_dtype` already.

    max_len: positions to prepare for; the model's own limit if None. pool: where the experts are, if not here; returns
    once all of them can be reached. Raises CheckpointError: an unknown architecture, or a missing, unexpected or
    misshapen tensor; ConfigError: the pool cannot hold all experts.
    """
    spec = model_spec(checkpoint.config)
    shapes = trunk_tensors(spec)
    check_names(shapes | expert_tensors(spec), checkpoint, ignored_tensors(spec))
    reader = WeightReader(checkpoint)
    report = on_progress or (lambda fraction, message: None)

    def load(name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return reader.get(name, shapes[name], dtype or held_as(checkpoint.tensors[name], model_dtype))

    remote: RemotePool | None = None
    experts: ExpertPool | None
    if pool is not None:
        remote = _remote_pool(checkpoint, model_dtype, pool)
        remote.start()
        experts = remote.experts
    else:
        experts = _local_pool(spec, checkpoint, model_dtype, report) if spec.num_experts else None
    report(0.9, "trunk")
    trunk = Trunk(spec, load, experts, min(max_len or spec.max_position, spec.max_position))
    if remote is not None:
        remote.wait_covered(report)
    return Model(spec, trunk, experts, model_dtype, remote)


def _local_pool(spec: ModelSpec, checkpoint: Checkpoint, model_dtype: torch.dtype, report: Progress) -> ExpertPool:
    reader = ExpertReader(checkpoint, model_dtype)
    tables = {}
    for index, layer in enumerate(spec.layers):
        if isinstance(layer, MoESpec):
            report(0.9 * index / spec.num_layers, f"experts of layer {index}")
            weights = {e: reader.read(layer.experts, index, e) for e in range(layer.experts.num_experts)}
            tables[index] = kernels.ExpertTable(weights, layer.experts.num_experts)
    return ExpertPool(LocalTransport(tables), spec.num_layers, spec.num_experts)


def _remote_pool(checkpoint: Checkpoint, model_dtype: torch.dtype, config: PoolConfig) -> RemotePool:
    model = expert_model(checkpoint, str(model_dtype).removeprefix("torch."))
    return RemotePool(model, expert_bytes(checkpoint, model), config)
