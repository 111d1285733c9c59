"""What the unquantised model said of each window, kept on disk, and how far another model is from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import BinaryIO

import torch

from router.precision.compare import (
    Distances,
    distances,
    mean_over_windows,
    perplexity,
    perplexity_change,
    share_of_other_choices,
)
from router.precision.figures import Loss
from router.precision.run import WindowRead


class Reference:
    """Logits in a file, because those of a few thousand tokens take gigabytes; the gates' choices in memory."""

    def __init__(self, stream: BinaryIO, windows: Sequence[Sequence[int]]) -> None:
        """stream: an empty file, to be written and read back. windows: token ids, all of one length."""
        self._stream = stream
        self._windows = torch.tensor(windows)
        self._topk_ids: list[torch.Tensor] = []

    def record(self, reads: Iterable[WindowRead]) -> Loss:
        """Keep the reference's reading of every window; its own loss, at distance 0."""
        compared = []
        for read, window in zip(reads, self._windows, strict=True):
            self._stream.write(read.logits.numpy().data)
            self._topk_ids.append(read.topk_ids)
            compared.append(distances(read.logits[:-1], read.logits[:-1], window[1:]))
        return loss(compared, self._topk_ids, self._topk_ids)

    def compare(self, reads: Iterable[WindowRead]) -> Loss:
        """How far another model's reading of the same windows is from what was recorded."""
        self._stream.seek(0)
        compared, topk_ids = [], []
        for read, window in zip(reads, self._windows, strict=True):
            data = bytearray(self._stream.read(read.logits.nbytes))
            reference = torch.frombuffer(data, dtype=torch.float32).view_as(read.logits)
            topk_ids.append(read.topk_ids)
            compared.append(distances(reference[:-1], read.logits[:-1], window[1:]))
        return loss(compared, self._topk_ids, topk_ids)


def loss(
    compared: Sequence[Distances], reference_topk_ids: Sequence[torch.Tensor], topk_ids: Sequence[torch.Tensor]
) -> Loss:
    """The figures of all windows: one value of each sequence per window, as Distances and WindowRead say."""
    losses = torch.stack([window.loss for window in compared])
    reference_losses = torch.stack([window.reference_loss for window in compared])
    other = share_of_other_choices(torch.cat(list(reference_topk_ids), 1), torch.cat(list(topk_ids), 1))
    return Loss(
        perplexity=perplexity(losses),
        perplexity_change=perplexity_change(losses, reference_losses),
        kl=mean_over_windows(torch.stack([window.kl for window in compared])),
        same_top1=mean_over_windows(torch.stack([window.same_top1 for window in compared])),
        other_experts=other,
    )
