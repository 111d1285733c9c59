"""A transformers MoE model whose routed experts are computed by the expert pool.

transformers lets each experts module choose its forward by name from ALL_EXPERTS_FUNCTIONS (integrations/moe.py). Here
is one more, "barista": it hands a layer's rows to experts.pool. docs/transformers.md shows its use.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from barista.errors import BaristaError, ConfigError
from barista.trust import Trust
from experts.adapters.transformers_model import drop_experts, expert_model, experts_modules
from experts.checkpoint import open_checkpoint
from experts.expert_model import expert_bytes
from experts.numerics import numerics_id
from experts.pool import ExpertPool
from experts.remote import PoolConfig, RemotePool

IMPLEMENTATION = "barista"
CONNECT_SECONDS = 60.0


class RowsFailed(BaristaError):
    """The pool has no finite answer for some rows of a layer."""


# ---------------------------------------------------------------- the experts function


class _Caller:
    """Calls the pool, layer after layer, and counts the model's steps."""

    def __init__(self, pool: ExpertPool) -> None:
        self._pool = pool
        self._step = 0
        self._layer = -1

    def __call__(self, layer: int, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """[num_tokens, hidden], like hidden_states."""
        if hidden_states.requires_grad and torch.is_grad_enabled():
            raise BaristaError(
                "The pool computes no gradients.", "Call the model in torch.inference_mode() or torch.no_grad()."
            )
        self._step += layer <= self._layer
        self._layer = layer
        pending = self._pool.begin(
            self._step,
            layer,
            hidden_states.detach().cpu().contiguous(),
            topk_ids.to("cpu", torch.int32).contiguous(),
            topk_weights.detach().to("cpu", torch.float32).contiguous(),
        )
        rows, failed = pending.wait()
        if failed.any():
            names = failed.nonzero().flatten().tolist()
            raise RowsFailed(
                f"Layer {layer}: no finite answer from the pool for {len(names)} of {len(failed)} rows "
                f"({', '.join(map(str, names[:8]))}{', ...' if len(names) > 8 else ''}).",
                "Either an expert is on no worker, or the model's own values are not finite.",
            )
        return rows.to(hidden_states.device)


_callers: WeakKeyDictionary[nn.Module, tuple[_Caller, int]] = WeakKeyDictionary()


def _pooled_experts(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts function: [num_tokens, hidden] and twice [num_tokens, k] to [num_tokens, hidden]."""
    if module not in _callers:
        raise ConfigError(
            f"The model's experts implementation is {IMPLEMENTATION!r}, but no pool serves it.",
            "Use `with PooledExperts(model, pool):` or `with connect(model, ...):` around its calls.",
        )
    caller, layer = _callers[module]
    return caller(layer, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _pooled_experts)


# ---------------------------------------------------------------- a model and its pool


class PooledExperts:
    """Has a model's routed experts computed by a pool, until closed; a context manager.

    model: in float32 or bfloat16, as the pool's rows are. pool: of the same checkpoint, for this model alone: one
    thread and one forward at a time. Raises ConfigError for a model whose experts the pool cannot stand in for.
    """

    def __init__(self, model: transformers.PreTrainedModel, pool: ExpertPool, remote: RemotePool | None = None) -> None:
        if model.dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(f"The model is in {model.dtype}.", "Load it with dtype=torch.bfloat16 or torch.float32.")
        self._model = model
        self._remote = remote
        self._modules = {layer: module for layer, _, module in experts_modules(model)}
        if any(module in _callers for module in self._modules.values()):
            raise ConfigError("A pool serves this model already.", "Close that one first.")
        self._before = model.get_experts_implementation()
        model.set_experts_implementation(IMPLEMENTATION)
        if any(module.config._experts_implementation != IMPLEMENTATION for module in self._modules.values()):
            raise ConfigError(
                f"transformers does not let {type(model).__name__} change its experts implementation.",
                "Load the model as transformers' own class.",
            )
        caller = _Caller(pool)
        for layer, module in self._modules.items():
            _callers[module] = (caller, layer)

    def release_weights(self) -> None:
        """Free the memory of the model's own experts. From then on it runs with a pool only, and cannot be saved."""
        drop_experts(self._model)

    def close(self) -> None:
        """Give the model its own experts back, and let go of the workers. Idempotent."""
        if self._modules:
            self._model.set_experts_implementation(self._before)
        for module in self._modules.values():
            _callers.pop(module, None)
        self._modules = {}
        if self._remote is not None:
            self._remote.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def connect(
    model: transformers.PreTrainedModel,
    path: str | Path,
    controller: str,
    token: str,
    *,
    tls_dir: Path | None = None,
    transport: str = "auto",
    max_rows: int = 512,
    timeout: float = CONNECT_SECONDS,
) -> PooledExperts:
    """Have the model's experts computed by the workers of a running pool.

    path: the checkpoint that the model was loaded from, and the pool too. controller: host:port of the pool's.
    transport: auto, shm or grpc. max_rows: a longer batch travels in parts. timeout: seconds until every expert must be
    in reach. Raises ConfigError for another checkpoint or dtype than the pool's, and when the time is over;
    CheckpointError for a path without the model's experts.
    """
    checkpoint = open_checkpoint(Path(path))
    experts = expert_model(model, checkpoint)
    config = PoolConfig(
        controller=controller,
        trust=Trust(token, tls_dir),
        transport=transport,
        numerics_id=numerics_id(model.dtype),
        max_rows=max_rows,
    )
    remote = RemotePool(experts, expert_bytes(checkpoint, experts), config)
    try:
        remote.start()
        remote.wait_covered(_give_up_at(time.monotonic() + timeout, controller))
        return PooledExperts(model, remote.experts, remote)
    except BaseException:
        remote.close()
        raise


def _give_up_at(deadline: float, controller: str) -> Callable[[float, str], None]:
    """A progress callback that raises ConfigError once `time.monotonic()` passes the deadline."""

    def check(_: float, progress: str) -> None:
        if time.monotonic() > deadline:
            raise ConfigError(
                f"The pool at {controller} is not ready: {progress}.",
                "Is that its address, and the token its own? The log says what each worker answers.",
            )

    return check


# ---------------------------------------------------------------- a model without its experts


def load_without_experts(path: str | Path, **options: Any) -> transformers.PreTrainedModel:
    """As AutoModelForCausalLM.from_pretrained, but no routed expert is read or held: they are in the pool.

    options: as from_pretrained takes.
    """
    config = transformers.AutoConfig.from_pretrained(path)
    whole: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]

    def init(self: transformers.PreTrainedModel, *args: Any, **keywords: Any) -> None:
        whole.__init__(self, *args, **keywords)
        drop_experts(self)

    # from_pretrained makes the model without memory and then reads what it has places for.
    body = {"__init__": init, "__module__": whole.__module__, "_keys_to_ignore_on_load_unexpected": [r"\.experts\."]}
    trunk: Any = type(whole.__name__, (whole,), body)
    model: transformers.PreTrainedModel = trunk.from_pretrained(path, **options)
    model.__class__ = whole
    return model
