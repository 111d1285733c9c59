"""One decoder layer on a device: attention, then a dense FFN or the gate, the pool's experts and the shared ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from experts import kernels
from experts.device.rows import zero_if_not_finite
from experts.kernels import reference
from experts.pool import ExpertPool
from experts.spec import GateSpec
from router.model.attention import attention_parts
from router.model.device.attention import GQA, MLA
from router.model.device.rows import Rows
from router.model.spec import DenseFFNSpec, ModelSpec, MoESpec
from router.model.trunk import Load


class DeviceLayer:
    """Pre-norm attention and FFN, as router.model.trunk.DecoderLayer. load: gives tensors on the device."""

    def __init__(self, spec: ModelSpec, index: int, load: Load, pool: ExpertPool | None) -> None:
        prefix = f"model.layers.{index}."
        parts = attention_parts(spec, index, lambda name: load(prefix + name))
        self._attention = GQA(parts) if isinstance(parts, kernels.GQAParts) else MLA(parts)
        layer = spec.layers[index]
        self._ffn: DeviceSwiGLU | DeviceMoE
        if isinstance(layer, DenseFFNSpec):
            self._ffn = DeviceSwiGLU(load, prefix + "mlp.")
        else:
            assert pool is not None
            self._ffn = DeviceMoE(layer, index, load, pool)

    def __call__(self, update: Tensor | None, rows: Rows, step: int) -> tuple[Tensor, Tensor]:
        """residual += update, then attention and FFN; returns the FFN's output, not yet added, and the failed rows."""
        x = self._attention(update, rows)
        return self._ffn(x) if isinstance(self._ffn, DeviceSwiGLU) else self._ffn(x, rows.padding, step)


class DeviceSwiGLU:
    """A dense or shared FFN: down(silu(gate(x)) * up(x))."""

    def __init__(self, load: Load, prefix: str) -> None:
        self._gate_up = torch.cat([load(f"{prefix}{name}_proj.weight") for name in ("gate", "up")])
        self._down: Tensor = load(f"{prefix}down_proj.weight")

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[num_rows, hidden] -> [num_rows, hidden], and failed [num_rows] bool: a row that is not finite is zeros."""
        gate, up = functional.linear(x, self._gate_up).chunk(2, dim=1)
        return zero_if_not_finite(functional.linear(reference.silu_mul(gate, up), self._down))


class DeviceGate:
    """weight: [num_experts, hidden], float32 where the spec asks for float32 logits, else in the rows' dtype.

    select_bias: [num_experts] float32, or None. experts.kernels.gate_layer says the same for the CPU.
    """

    def __init__(self, spec: GateSpec, weight: Tensor, select_bias: Tensor | None) -> None:
        self._spec, self._weight, self._select_bias = spec, weight, select_bias

    def __call__(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """[num_rows, hidden] -> topk_ids [num_rows, k] int32, topk_weights [num_rows, k] float32."""
        logits = functional.linear(hidden_states.to(self._weight.dtype), self._weight)
        topk_ids, topk_weights = reference.gate(logits.float(), self._spec, self._select_bias)
        if not self._spec.float32_weights:
            topk_weights = topk_weights.to(logits.dtype).float()
        return topk_ids, topk_weights


class DeviceMoE:
    """The gate, the pool's routed experts and the shared experts, which are queued while the pool works."""

    def __init__(self, spec: MoESpec, index: int, load: Load, pool: ExpertPool) -> None:
        bias = load(spec.select_bias_name.format(layer=index), torch.float32) if spec.gate.select_bias else None
        weight = load(spec.gate_name.format(layer=index))
        self._gate = DeviceGate(spec.gate, weight.float() if spec.gate.float32_logits else weight, bias)
        has_shared = bool(spec.shared_intermediate_size)
        self._shared = DeviceSwiGLU(load, f"model.layers.{index}.mlp.shared_experts.") if has_shared else None
        self._index, self._pool = index, pool

    def __call__(self, x: Tensor, padding: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """[num_rows, hidden] -> [num_rows, hidden] and failed [num_rows]. A row of padding asks for no expert."""
        topk_ids, topk_weights = self._gate(x)
        pending = self._pool.begin(step, self._index, x, topk_ids.masked_fill(padding[:, None], -1), topk_weights)
        if self._shared is None:
            return pending.wait()
        shared, shared_failed = self._shared(x)
        rows, failed = pending.wait()
        return rows + shared, failed | shared_failed
