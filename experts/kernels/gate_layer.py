"""One layer's gate with its weight, in one call."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from experts.kernels import ops
from experts.kernels.dtypes import DTYPES
from experts.kernels.library import GateSpecStruct, current, gate_parameters
from experts.kernels.structs import WeightStruct, pointer, weight_struct
from experts.kernels.weight import Weight
from experts.spec import GateSpec


class _GateStruct(ctypes.Structure):
    """bk_gate_layer of src/barista_kernels.h."""

    _fields_ = (
        ("size", ctypes.c_int64),
        ("weight", WeightStruct),
        ("select_bias", ctypes.c_void_p),
        ("spec", GateSpecStruct),
        ("dtype", ctypes.c_int32),
        ("float32_logits", ctypes.c_int32),
        ("float32_weights", ctypes.c_int32),
    )


class GateLayer:
    """weight: [num_experts, hidden], float32 where the spec asks for float32 logits, else as rows of dtype take it.

    select_bias: [num_experts] float32, or None. dtype: of the hidden states.
    """

    def __init__(self, spec: GateSpec, weight: Weight, select_bias: Tensor | None, dtype: torch.dtype) -> None:
        self.spec, self.weight, self.select_bias, self.dtype = spec, weight, select_bias, dtype
        assert select_bias is None or select_bias.dtype is torch.float32
        self._struct = _GateStruct(
            size=ctypes.sizeof(_GateStruct),
            weight=weight_struct(weight, torch.float32 if spec.float32_logits else dtype),
            select_bias=pointer(select_bias),
            spec=gate_parameters(spec).contents,
            dtype=DTYPES[dtype],
            float32_logits=spec.float32_logits,
            float32_weights=spec.float32_weights,
        )
        self.address = ctypes.addressof(self._struct)

    def __call__(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """[num_tokens, hidden] contiguous -> topk_ids [num_tokens, k] int32, topk_weights [num_tokens, k] float32."""
        functions = current()
        if functions is None:
            return choose_in_steps(self, hidden_states)
        assert hidden_states.dtype is self.dtype
        num_tokens, top_k = hidden_states.shape[0], self.spec.top_k
        topk_ids = torch.empty(num_tokens, top_k, dtype=torch.int32)
        topk_weights = torch.empty(num_tokens, top_k, dtype=torch.float32)
        status = functions.bk_choose(
            self.address, pointer(hidden_states), topk_ids.data_ptr(), topk_weights.data_ptr(), num_tokens
        )
        assert status == 0
        return topk_ids, topk_weights


def choose_in_steps(gate: GateLayer, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """The same, to the byte, one kernel after another: what GateLayer means."""
    x = hidden_states.float() if gate.spec.float32_logits else hidden_states
    router_logits = ops.linear(x, gate.weight)
    topk_ids, topk_weights = ops.gate(router_logits.float(), gate.spec, gate.select_bias)
    if not gate.spec.float32_weights:
        topk_weights = topk_weights.to(router_logits.dtype).float()
    return topk_ids, topk_weights
