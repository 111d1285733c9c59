"""The weights of one expert, as they are held in memory."""

from __future__ import annotations

import torch

from experts.checkpoint import Checkpoint, TensorInfo
from experts.checkpoint.names import SCALE_SUFFIX
from experts.formats import held_dtype_of
from experts.kernels.expert_table import ExpertWeights
from experts.kernels.weight import Weight
from experts.pages import Span, give_back, read_ahead, spans_of
from experts.spec import FFNSpec
from experts.weights import WeightReader


def held_as(info: TensorInfo, model_dtype: torch.dtype) -> torch.dtype:
    """torch's dtype for what experts/formats/held.py says of this tensor."""
    dtype: torch.dtype = getattr(torch, held_dtype_of(info, str(model_dtype).removeprefix("torch.")))
    return dtype


class ExpertReader:
    """Reads experts from a checkpoint, packed or not: views of the mapped files where that is how they are held."""

    def __init__(self, checkpoint: Checkpoint, model_dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._model_dtype = model_dtype
        self._reader = WeightReader(checkpoint)

    def read(self, spec: FFNSpec, layer: int, expert: int) -> ExpertWeights:
        """gate [intermediate, hidden], up [intermediate, hidden] and down [hidden, intermediate], contiguous.

        Raises CheckpointError for a missing or misshapen tensor.
        """
        gate, up, down = (self._get(name, shape) for name, shape in spec.tensors(layer, expert).items())
        return gate, up, down

    def prefetch(self, spec: FFNSpec, layer: int, expert: int) -> None:
        """Have the system read an expert's bytes into its cache, where it can, without waiting for them."""
        for span in self._spans(spec, layer, expert):
            read_ahead(self._reader.map(span.file), span)

    def release(self, spec: FFNSpec, layer: int, expert: int) -> None:
        """Give back the memory of a mapped expert. It stays valid, and is read again when it is used."""
        for span in self._spans(spec, layer, expert):
            give_back(self._reader.map(span.file), span)

    def _spans(self, spec: FFNSpec, layer: int, expert: int) -> tuple[Span, ...]:
        """Where an expert lies, with its scales where those are apart."""
        tensors = self._checkpoint.tensors
        names = [name + suffix for name in spec.tensors(layer, expert) for suffix in ("", SCALE_SUFFIX)]
        return spans_of(tensors[name] for name in names if name in tensors)

    def _get(self, name: str, shape: tuple[int, int]) -> Weight:
        info = self._checkpoint.tensors.get(name)
        dtype = self._model_dtype if info is None else held_as(info, self._model_dtype)
        return self._reader.weight(name, shape, dtype)
