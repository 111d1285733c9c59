"""From a checkpoint to a model that runs on a device."""

from __future__ import annotations

from typing import Any

import torch

from experts.checkpoint import Checkpoint
from experts.checkpoint.names import check_names
from experts.device.experts import DeviceExperts
from experts.device.pool import DevicePool
from experts.expert_parallel.group_pool import GroupPool
from experts.expert_parallel.pool import GroupConfig, ParallelPool
from experts.expert_weights import ExpertReader
from experts.formats import PLAIN, Holding
from experts.packed.convert import prepare
from experts.transport.device import DeviceTransport
from experts.weights import WeightReader
from router.model.device.graphs import Capture, CudaCapture
from router.model.device.trunk import DeviceTrunk
from router.model.expert_model import expert_model
from router.model.families import model_spec
from router.model.load import TRUNK_AT, Model, Progress
from router.model.packed import expert_layers, packed_experts
from router.model.spec import ModelSpec
from router.model.tensors import expert_tensors, ignored_tensors, trunk_tensors


def load_device_model(
    checkpoint: Checkpoint,
    model_dtype: torch.dtype,
    device: torch.device,
    max_len: int | None = None,
    on_progress: Progress | None = None,
    *,
    weight_format: str = PLAIN,
    capture: Capture | None = None,
    group: GroupConfig | None = None,
) -> Model:
    """Copy every tensor that the model needs to the device: in the model's dtype, but experts in FP8 if that is asked.

    max_len, on_progress: as of router.model.load.load_model. weight_format: as in `Holding`, of
    router.device_memory.on_device. capture: of decode steps; None: CUDA graphs, where the device has them and its
    experts never wait for the host. group: where the experts are, if not on this device: workers that are started here.
    Raises CheckpointError: an unknown architecture, a missing, unexpected or misshapen tensor; CacheError: there is no
    room to pack FP8; BaristaError: the workers cannot hold the experts, or the GPUs cannot reach one another.
    """
    spec = model_spec(checkpoint.config)
    shapes = trunk_tensors(spec)
    check_names(shapes | expert_tensors(spec), checkpoint, ignored_tensors(spec))
    report = on_progress or (lambda fraction, message: None)
    pool: DevicePool | None = None
    if group is not None:
        pool = _group_pool(spec, checkpoint, model_dtype, weight_format, report, group)
    elif spec.num_experts:
        transport = _transport(spec, checkpoint, model_dtype, device, weight_format, report)
        pool = DevicePool(transport, spec.num_layers, spec.num_experts, device)
    if capture is None and device.type == "cuda" and (pool is None or pool.capturable):
        capture = CudaCapture(device)
    report(TRUNK_AT, "trunk")
    reader = WeightReader(checkpoint)

    def load(name: str, dtype: torch.dtype | None = None) -> Any:
        return reader.get(name, shapes[name], dtype or model_dtype).to(device)

    trunk = DeviceTrunk(spec, load, pool, min(max_len or spec.max_position, spec.max_position), device, capture)
    return Model(spec, trunk, pool, model_dtype)


def _group_pool(
    spec: ModelSpec,
    checkpoint: Checkpoint,
    model_dtype: torch.dtype,
    weight_format: str,
    report: Progress,
    config: GroupConfig,
) -> GroupPool:
    """All experts of all layers, on workers that have been started."""
    model = expert_model(checkpoint, Holding(str(model_dtype).removeprefix("torch."), weight_format))
    prepare(packed_experts(checkpoint, spec, weight_format), lambda fraction, message: report(fraction / 2, message))
    report(TRUNK_AT / 2, f"experts on {len(config.workers)} workers")
    group = ParallelPool(model, config)
    try:
        group.start()
    except BaseException:
        group.close()  # its processes must not outlive the failure
        raise
    return GroupPool(group, spec.num_layers, spec.num_experts, config.engine)


def _transport(
    spec: ModelSpec,
    checkpoint: Checkpoint,
    model_dtype: torch.dtype,
    device: torch.device,
    weight_format: str,
    report: Progress,
) -> DeviceTransport:
    """All experts of all layers, on the device."""
    part = packed_experts(checkpoint, spec, weight_format)
    prepare(part, lambda fraction, message: report(TRUNK_AT * fraction, message))
    reader = ExpertReader(part.over(checkpoint), model_dtype)
    experts: dict[int, DeviceExperts] = {}
    for index, layer in expert_layers(spec).items():
        report(TRUNK_AT * index / spec.num_layers, f"experts of layer {index}")
        weights = [reader.read(layer, index, expert) for expert in range(layer.num_experts)]
        experts[index] = DeviceExperts(weights, device=device, dtype=model_dtype)
    return DeviceTransport(experts)
