"""What the routed experts of a transformers model are, in the words of the pool."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn

from barista.errors import CheckpointError, ConfigError
from experts.checkpoint import Checkpoint, checkpoint_digest
from experts.expert_model import ExpertModel
from experts.formats import PLAIN
from experts.spec import FFNSpec

_LAYER = re.compile(r"(.*\blayers)\.(\d+)\.(?:(.*)\.)?\w+")
# transformers may rename what it reads: a checkpoint's own folder of the experts, and its names of gate, up and down.
_FOLDERS = ("{module}", "block_sparse_moe")
_ROLES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


def expert_model(model: transformers.PreTrainedModel, checkpoint: Checkpoint) -> ExpertModel:
    """The model's experts as workers are told of them. dtype: the model's.

    Raises ConfigError for experts that the pool cannot stand in for, CheckpointError if they are not in the checkpoint.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    return ExpertModel(
        path=checkpoint.path.resolve(),
        dtype=dtype,
        top_k=model.config.get_text_config().num_experts_per_tok,
        layers={layer: _ffn_spec(name, module, checkpoint) for layer, name, module in experts_modules(model)},
        digest=checkpoint_digest(checkpoint, dtype, PLAIN),
    )


def experts_modules(model: nn.Module) -> Iterator[tuple[int, str, Any]]:
    """The layer, name and module of each layer's experts. Raises ConfigError if there are none, or none of ours."""
    found = False
    for name, module in model.named_modules():
        match = _LAYER.fullmatch(name)
        if match is None or not hasattr(module, "is_transposed"):  # which use_experts_implementation sets
            continue
        if not _is_swiglu(module):
            raise ConfigError(
                f"{name} ({type(module).__name__}) is not down(silu(gate(x)) * up(x)).",
                "The pool computes no other experts.",
            )
        found = True
        yield int(match[2]), name, module
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no experts that transformers' experts interface can serve.",
            "Take a MoE model that transformers implements, not quantised.",
        )


def _is_swiglu(module: Any) -> bool:
    """Does this experts module compute down(silu(gate(x)) * up(x)), and nothing else? Asks it, by example."""
    if module.has_bias or module.has_post_expert_norm or not module.has_gate:
        return False
    with torch.device("cpu"), torch.no_grad():
        gate, up = torch.linspace(-20, 20, 64).view(1, -1), torch.linspace(30, -30, 64).view(1, -1)
        return torch.allclose(module._apply_gate(torch.cat([gate, up], dim=-1)), nn.functional.silu(gate) * up)


def _ffn_spec(name: str, module: Any, checkpoint: Checkpoint) -> FFNSpec:
    """The shapes of one layer's experts, and what the checkpoint calls their weights."""
    match = _LAYER.fullmatch(name)
    assert match is not None
    layer = int(match[2])
    for folder in _FOLDERS:
        prefix = f"{match[1]}.{{layer}}.{folder.format(module=match[3])}.experts.{{expert}}."
        for gate, up, down in _ROLES:
            spec = FFNSpec(
                hidden_size=module.hidden_dim,
                intermediate_size=module.intermediate_dim,
                num_experts=module.num_experts,
                gate_name=f"{prefix}{gate}.weight",
                up_name=f"{prefix}{up}.weight",
                down_name=f"{prefix}{down}.weight",
            )
            if spec.tensors(layer, 0).keys() <= checkpoint.tensors.keys():
                return spec
    raise CheckpointError(
        f"{checkpoint.path}: no weights of the experts of {name}.",
        "Give the checkpoint that the model was loaded from.",
    )


def drop_experts(model: nn.Module) -> None:
    """Free the experts' weights: their modules stay, without parameters."""
    for _, _, module in experts_modules(model):
        for name in [name for name, _ in module.named_parameters(recurse=False)]:
            module.register_parameter(name, None)
        vars(module)["_is_hf_initialized"] = True  # there is nothing for from_pretrained to initialise
