"""python -m experts.expert_parallel.worker: one rank with experts, the child of an engine that it takes orders from.

Orders come as lines of JSON on the standard input, answers go to the standard output. It ends with its input.

    {"do": "leave"}                                                        -> {"left": true}
    {"do": "load", "rank", "device", "shape", "ranks", "timeout"}     -> {"window"}
    {"do": "join", "windows": [hexadecimal handle of each rank]}           -> {"joined": true}
    {"do": "step", "tokens": n}                                             no answer; windows tell the rest

Every answer says what it is to, in "do"; the first one, to "start", comes unasked. Whatever fails is answered by
{"error", "remedy"}, and the worker waits for the next order; but where a step fails, it ends.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from barista.errors import BaristaError, ConfigError
from experts.checkpoint import open_checkpoint
from experts.device.experts import DeviceExperts
from experts.expert_model import ExpertModel
from experts.expert_parallel.library import Library
from experts.expert_parallel.machine import library_for, memory_for, on_device
from experts.expert_parallel.memory import Block
from experts.expert_parallel.rank import Rank, Ranks
from experts.expert_parallel.shape import ExpertMap, shape_from_json
from experts.expert_weights import ExpertReader
from experts.packed.experts import expert_part
from experts.transport.cuda import WorkerStep

log = logging.getLogger(__name__)

Order = dict[str, Any]


class Worker:
    """The experts of one rank, and its part of the group that it is in. A new group keeps the experts that stay."""

    def __init__(self, model: ExpertModel) -> None:
        self._model = model
        checkpoint = open_checkpoint(model.path)
        packed = expert_part(checkpoint, model.layers, model.format).over(checkpoint)  # the engine has packed it
        self._reader = ExpertReader(packed, getattr(torch, model.dtype))
        self._held: tuple[int, ...] = ()
        self._experts: dict[int, DeviceExperts] = {}
        self._library: Library | None = None
        self._rank: Rank | None = None
        self._windows: list[Block] = []
        self._step: WorkerStep | None = None

    def obey(self, order: Order) -> Order | None:
        """Carry an order out; its answer, if it has one. Raises BaristaError."""
        match order["do"]:
            case "leave":
                return self._leave()
            case "load":
                return self._load(order)
            case "join":
                return self._join([bytes.fromhex(handle) for handle in order["windows"]])
            case "step":
                if self._step is None:
                    raise ConfigError("A step was ordered before a group was joined.", "This is a mistake of ours.")
                self._step.run(order["tokens"])
                return None
        raise ConfigError(f"The order {order['do']!r} is not known.", "Run one version on all ranks.")

    def abort(self) -> None:
        """End the waits of the step under way. From any thread."""
        if self._library is not None and self._rank is not None:
            with on_device(self._rank.device):
                self._library.call("ep_window_abort", self._rank.window.address)

    def _load(self, order: Order) -> Order:
        if self._rank is not None:
            self._rank.close()
            self._rank = None
        device = torch.device(order["device"])
        if device.type == "cuda":
            torch.cuda.set_device(device)
        shape = shape_from_json(order["shape"])
        experts = ExpertMap.of(order["ranks"], shape.num_ranks)
        self._hold(experts.local(order["rank"]), device)
        self._library = library_for(device)
        memory = memory_for(device, self._library)
        self._rank = Rank(self._library, memory, device, shape, experts, order["rank"], timeout=order["timeout"])
        return {"window": self._rank.window.handle.hex()}

    def _hold(self, experts: tuple[int, ...], device: torch.device) -> None:
        if experts == self._held:
            return
        self._experts = {}  # first, so that the old ones and the new ones need not both fit
        dtype = getattr(torch, self._model.dtype)
        for layer, spec in self._model.layers.items():
            weights = [self._reader.read(spec, layer, expert) for expert in experts]
            self._experts[layer] = DeviceExperts(weights, device=device, dtype=dtype)
        self._held = experts

    def _join(self, handles: list[bytes]) -> Order:
        rank = self._rank
        if rank is None or self._library is None:
            raise ConfigError("A group was to be joined before its experts were loaded.", "This is a mistake of ours.")
        memory = memory_for(rank.device, self._library)
        self._windows = [
            rank.window if number == rank.rank else memory.open(handle, rank.window_size)
            for number, handle in enumerate(handles)
        ]
        rank.join(self._windows)
        capturable = rank.device.type == "cuda" and all(experts.capturable for experts in self._experts.values())
        self._step = WorkerStep(Ranks(self._library, [rank]), self._experts, may_capture=capturable)
        return {"joined": True}

    def _leave(self) -> Order:
        """Let go of the others' windows. They do the same, and only then may this one's memory be given back."""
        for number, window in enumerate(self._windows):
            if self._rank is not None and number != self._rank.rank:
                window.close()
        self._windows, self._step = [], None
        return {"left": True}


def main() -> None:
    """Obey until the input ends. Ctrl-C in a terminal reaches the whole group; the engine decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    torch.set_num_threads(int(sys.argv[2]))
    worker = Worker(ExpertModel.from_json(Path(sys.argv[1]).read_text()))
    orders: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(orders, worker), daemon=True).start()
    _write({"do": "start"})
    while line := orders.get():
        order = json.loads(line)
        try:
            answer = worker.obey(order)
        except BaristaError as error:
            answer = {"error": error.message, "remedy": error.remedy}
        except Exception as error:
            log.exception("an order could not be carried out")
            if order["do"] == "step":  # its peers wait for it; its death is what they notice soonest
                os._exit(1)
            answer = {"error": f"{type(error).__name__}: {error}", "remedy": "The worker's log says more."}
        if answer is not None:
            _write({"do": order["do"]} | answer)


def _read(orders: queue.SimpleQueue[str], worker: Worker) -> None:
    """Its end is the engine's: nobody is waited for any more."""
    for line in iter(sys.stdin.readline, ""):
        orders.put(line)
    worker.abort()
    os._exit(0)


def _write(answer: Order) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
