"""One step's tensors on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from router.model.batch import Batch
from router.model.device.contexts import Context, Run, runs_of


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What a step is computed from, on the device. All but runs are integers.

    token_ids, positions, slots: [num_rows]; a row that pads the step has the slot `nowhere`. block_tables: [num_seqs,
    width]. runs: how the rows lie beside one another, on the host.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    block_tables: Tensor
    runs: list[Run]


@dataclass(frozen=True, slots=True)
class Rows:
    """What every layer takes of a step.

    residual: [num_rows, hidden], updated in place by every layer. cache: as router.kv_cache.storage lays it out. cos,
    sin: [num_rows, half] float32. slots: [num_rows] int64. padding: [num_rows] bool. contexts: of the rows, in order.
    """

    residual: Tensor
    cache: Tensor
    cos: Tensor
    sin: Tensor
    slots: Tensor
    padding: Tensor
    contexts: list[Context]


def to_device(batch: Batch, device: torch.device) -> StepInputs:
    """The batch, moved as it is."""
    num_rows = batch.seq_ids.bincount(minlength=len(batch.block_tables))
    lengths = batch.positions.index_select(0, num_rows.cumsum(0) - 1) + 1
    return StepInputs(
        batch.token_ids.to(device),
        batch.positions.to(device),
        batch.slots.to(device),
        batch.block_tables.to(device),
        runs_of(num_rows.tolist(), lengths.tolist()),
    )
