"""A step of a model in one call, where every expert is in this process."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.kernels.dtypes import DTYPES
from experts.kernels.expert_table import ExpertTable
from experts.kernels.gate_layer import GateLayer
from experts.kernels.gqa import GQALayer
from experts.kernels.library import current
from experts.kernels.mla import MLALayer
from experts.kernels.step_rows import StepStruct, step_struct
from experts.kernels.structs import ExpertsStruct, WeightStruct, pointer, weight_struct
from experts.kernels.weight import Weight

_P, _L = ctypes.c_void_p, ctypes.c_int64


@dataclass(frozen=True, slots=True)
class LayerParts:
    """One layer. routed: the gate's experts; shared: one expert that every token takes, the dense FFN where there is no
    gate. expert_tokens: [num_experts] int64 contiguous, the tokens routed to each expert, which are counted up.
    """

    attention: GQALayer | MLALayer
    gate: GateLayer | None
    routed: ExpertTable | None
    shared: ExpertTable | None
    expert_tokens: Tensor | None


class _LayerStruct(ctypes.Structure):
    """bk_decoder_layer of src/barista_kernels.h."""

    _fields_ = (
        ("size", _L),
        ("gqa", _P),
        ("mla", _P),
        ("gate", _P),
        ("routed", ExpertsStruct),
        ("shared", ExpertsStruct),
        ("expert_tokens", _P),
    )


class _ModelStruct(ctypes.Structure):
    """bk_model of src/barista_kernels.h."""

    _fields_ = (
        ("size", _L),
        ("embedding", WeightStruct),
        ("head", WeightStruct),
        ("final_norm", _P),
        ("cos", _P),
        ("sin", _P),
        ("half", _L),
        ("max_len", _L),
        ("num_layers", _L),
        ("layers", _P),
        ("eps", ctypes.c_float),
        ("dtype", ctypes.c_int32),
    )


class _BatchStruct(ctypes.Structure):
    """bk_batch of src/barista_kernels.h."""

    _fields_ = (
        ("size", _L),
        ("num_samples", _L),
        ("token_ids", _P),
        ("sample_rows", _P),
        ("step", StepStruct),
    )


class WholeModel:
    """Gives, to the byte, what its parts compute one after another. Needs the compiled kernels.

    embedding, head: [vocab, hidden]; final_norm: [hidden], of the dtype of all rows; cos, sin: [max_len, half] float32.
    """

    def __init__(
        self,
        layers: Sequence[LayerParts],
        embedding: Weight,
        head: Weight,
        final_norm: Tensor,
        eps: float,
        cos: Tensor,
        sin: Tensor,
    ) -> None:
        self._parts = tuple(layers), embedding, head, final_norm, cos, sin  # whose memory the structs point to
        self._layers = [_layer_struct(layer) for layer in layers]
        self._addresses = (_P * len(layers))(*map(ctypes.addressof, self._layers))
        dtype = final_norm.dtype
        self._struct = _ModelStruct(
            size=ctypes.sizeof(_ModelStruct),
            embedding=weight_struct(embedding, dtype),
            head=weight_struct(head, dtype),
            final_norm=pointer(final_norm),
            cos=pointer(cos),
            sin=pointer(sin),
            half=cos.shape[1],
            max_len=len(cos),
            num_layers=len(layers),
            layers=ctypes.addressof(self._addresses),
            eps=eps,
            dtype=DTYPES[dtype],
        )

    def forward(
        self,
        cache: Tensor,
        *,
        token_ids: Tensor,
        positions: Tensor,
        seq_ids: Tensor,
        slots: Tensor,
        block_tables: Tensor,
        sample_rows: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """A step. token_ids: [num_rows] int32; sample_rows: [num_samples] int64; the rest as in StepRows.

        Returns logits [num_samples, vocab] float32, and failed [num_rows] bool: rows whose experts gave no finite
        answer in some layer. Raises IndexError: a token or a position is out of range.
        """
        functions = current()
        assert functions is not None
        num_rows, num_samples = len(token_ids), len(sample_rows)
        assert token_ids.dtype is torch.int32
        assert sample_rows.dtype is torch.int64
        batch = _BatchStruct(
            size=ctypes.sizeof(_BatchStruct),
            num_samples=num_samples,
            token_ids=pointer(token_ids),
            sample_rows=pointer(sample_rows),
            step=step_struct(cache, slots=slots, seq_ids=seq_ids, positions=positions, block_tables=block_tables),
        )
        logits = torch.empty(num_samples, self._struct.head.out)
        failed = torch.empty(num_rows, dtype=torch.bool)
        status = functions.bk_forward(
            ctypes.addressof(self._struct), ctypes.addressof(batch), logits.data_ptr(), failed.data_ptr()
        )
        if status != 0:
            raise IndexError("a token id or a position of the batch is outside of the model's")
        return logits, failed


def _layer_struct(layer: LayerParts) -> _LayerStruct:
    attention = layer.attention.address
    return _LayerStruct(
        size=ctypes.sizeof(_LayerStruct),
        gqa=attention if isinstance(layer.attention, GQALayer) else None,
        mla=attention if isinstance(layer.attention, MLALayer) else None,
        gate=layer.gate.address if layer.gate else None,
        routed=layer.routed.struct if layer.routed else ExpertsStruct(),
        shared=layer.shared.struct if layer.shared else ExpertsStruct(),
        expert_tokens=pointer(layer.expert_tokens),
    )
