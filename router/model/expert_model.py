"""The experts of a checkpoint as the pool is told of them. Torch-free."""

from __future__ import annotations

from barista.errors import ConfigError
from experts.checkpoint import Checkpoint, checkpoint_digest
from experts.checkpoint.names import check_names
from experts.expert_model import ExpertModel
from experts.formats import Holding
from router.model.families import model_spec
from router.model.spec import MoESpec
from router.model.tensors import expert_tensors, ignored_tensors, trunk_tensors


def expert_model(checkpoint: Checkpoint, held: Holding) -> ExpertModel:
    """What workers must know to hold the checkpoint's experts so.

    Raises ConfigError for a dense model, CheckpointError for an unknown architecture or a missing or misshapen tensor.
    """
    spec = model_spec(checkpoint.config)
    layers = {index: layer for index, layer in enumerate(spec.layers) if isinstance(layer, MoESpec)}
    if not layers:
        raise ConfigError(
            f"{checkpoint.path} has no experts: it is a dense model.",
            "Leave --workers and --pool out, or carve it first: barista carve SOURCE OUT.",
        )
    check_names(trunk_tensors(spec) | expert_tensors(spec), checkpoint, ignored_tensors(spec))
    return ExpertModel(
        path=checkpoint.path.resolve(),
        dtype=held.dtype,
        top_k=max(layer.gate.top_k for layer in layers.values()),
        layers={index: layer.experts for index, layer in layers.items()},
        digest=checkpoint_digest(checkpoint, held.dtype, held.format),
        format=held.format,
    )
