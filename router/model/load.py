"""From a checkpoint to a model that runs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from experts import kernels
from experts.checkpoint import Checkpoint, TensorInfo
from experts.checkpoint.names import check_names
from experts.formats import held_dtype_of
from experts.pool import ExpertPool
from experts.transport.local import LocalTransport
from experts.weights import WeightReader
from router.model.families import model_spec
from router.model.spec import ModelSpec, MoESpec
from router.model.tensors import expert_tensors, ignored_tensors, trunk_tensors
from router.model.trunk import Trunk

Progress = Callable[[float, str], None]


class Model:
    """A loaded model: its spec, its trunk and, where it has experts, their pool."""

    def __init__(self, spec: ModelSpec, trunk: Trunk, pool: ExpertPool | None, dtype: torch.dtype) -> None:
        self.spec = spec
        self.trunk = trunk
        self.pool = pool
        self.dtype = dtype


def load_model(
    checkpoint: Checkpoint, model_dtype: torch.dtype, max_len: int | None = None, on_progress: Progress | None = None
) -> Model:
    """Load every tensor that the model needs, memory-mapped where the checkpoint stores `model_dtype` already.

    max_len: positions to prepare for; the model's own limit if None. Raises CheckpointError: an unknown architecture,
    or a missing, unexpected or misshapen tensor.
    """
    spec = model_spec(checkpoint.config)
    shapes = trunk_tensors(spec)
    check_names(shapes | expert_tensors(spec), checkpoint, ignored_tensors(spec))
    reader = WeightReader(checkpoint)
    report = on_progress or (lambda fraction, message: None)

    def load(name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return reader.get(name, shapes[name], dtype or held_as(checkpoint.tensors[name], model_dtype))

    pool = _local_pool(spec, checkpoint, reader, model_dtype, report)
    report(0.9, "trunk")
    trunk = Trunk(spec, load, pool, min(max_len or spec.max_position, spec.max_position))
    return Model(spec, trunk, pool, model_dtype)


def held_as(info: TensorInfo, model_dtype: torch.dtype) -> torch.dtype:
    """torch's dtype for what experts/formats.py says of this tensor."""
    dtype: torch.dtype = getattr(torch, held_dtype_of(info, str(model_dtype).removeprefix("torch.")))
    return dtype


def _local_pool(
    spec: ModelSpec, checkpoint: Checkpoint, reader: WeightReader, model_dtype: torch.dtype, report: Progress
) -> ExpertPool | None:
    if not spec.num_experts:
        return None

    def get(name: str, shape: tuple[int, int]) -> torch.Tensor:
        return reader.get(name, shape, held_as(checkpoint.tensors[name], model_dtype))

    tables = {}
    for index, layer in enumerate(spec.layers):
        if isinstance(layer, MoESpec):
            report(0.9 * index / spec.num_layers, f"experts of layer {index}")
            tables[index] = _table(layer, index, get)
    return ExpertPool(LocalTransport(tables), spec.num_layers, spec.num_experts)


def _table(layer: MoESpec, index: int, get: Callable[[str, tuple[int, int]], torch.Tensor]) -> kernels.ExpertTable:
    weights = {}
    for expert in range(layer.experts.num_experts):
        gate, up, down = (get(name, shape) for name, shape in layer.experts.tensors(index, expert).items())
        weights[expert] = gate, up, down
    return kernels.ExpertTable(weights, layer.experts.num_experts)
