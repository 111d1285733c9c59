"""python -m tests.distributed.faulty_worker: a real worker, but for the fault that a file names at the moment.

Flags as experts.worker has them. The file is called after the worker's pid, in the folder that FAULTS_VARIABLE names:

    nan EXPERT       this expert's rows are not numbers
    not_held         it denies every expert
    raise            it cannot compute
    slow SECONDS     each answer takes so much longer
    refuse FIELD     it takes this field of Attach for another than it is: protocol_version, numerics_id, model_digest
    no_window        it opens no window
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from barista.v1 import experts_pb2 as pb
from experts.link import RowsStatus
from experts.worker import server, service
from experts.worker.__main__ import main
from experts.worker.store import Computed, ExpertStore

FAULTS_VARIABLE = "FAULTY_WORKER_FAULTS"


def set_fault(folder: Path, pid: int, fault: str = "") -> None:
    """From now on this process does wrong what `fault` says; nothing if it is empty."""
    draft = folder / f"{pid}.draft"
    draft.write_text(fault)
    draft.rename(folder / str(pid))


def _fault() -> tuple[str, str]:
    """What to do wrong, and its argument."""
    try:
        words = (Path(os.environ[FAULTS_VARIABLE]) / str(os.getpid())).read_text().split()
    except FileNotFoundError:
        words = []
    return (words[0] if words else "", words[1] if len(words) > 1 else "")


class FaultyStore(ExpertStore):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.tables = None  # every request comes by `compute`

    def compute(self, layer: int, hidden_states: torch.Tensor, topk_ids: torch.Tensor, out: torch.Tensor) -> Computed:
        fault, argument = _fault()
        if fault == "not_held":
            asked = sorted(set(topk_ids.flatten().tolist()) - {-1})
            return Computed(RowsStatus.NOT_HELD, self.epoch, tuple(asked))
        if fault == "raise":
            raise RuntimeError("a fault that a test asked for")
        if fault == "slow":
            time.sleep(float(argument))
        computed = super().compute(layer, hidden_states, topk_ids, out)
        if fault == "nan" and computed.status is RowsStatus.OK:
            experts = topk_ids[topk_ids >= 0]
            out[: len(experts)][experts == int(argument)] = float("nan")
        return computed


class FaultyService(service.ExpertsService):
    def _refusal(self, attach: pb.Attach) -> str:
        fault, field = _fault()
        if fault == "refuse":
            seen = getattr(attach, field)
            setattr(attach, field, seen + 1 if isinstance(seen, int) else seen + type(seen)(seen[:1]))
        return super()._refusal(attach)


def _window(attach: pb.Attach) -> Any:
    return (None, "a fault that a test asked for") if _fault()[0] == "no_window" else _real_window(attach)


_real_window = service._window

if __name__ == "__main__":
    server.ExpertStore = FaultyStore  # type: ignore[misc]
    server.ExpertsService = FaultyService  # type: ignore[misc]
    service._window = _window
    main()
