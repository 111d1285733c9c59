"""python -m experts.expert_parallel.worker: one rank with experts, the child of an engine that it takes orders from.

Orders come as lines of JSON on the standard input, after a first line with the model (ExpertModel.to_json); answers go
to the standard output, which nothing else writes to. It ends with its input.

    {"do": "leave"}                                                        -> {"left": true}
    {"do": "load", "rank", "device", "shape", "ranks", "timeout"}     -> {"window"}
    {"do": "join", "engine": hexadecimal handle, "size"}                   -> {"joined": true}
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
from typing import IO, Any

import torch

from barista.errors import BaristaError, ConfigError
from experts.checkpoint import open_checkpoint
from experts.device.experts import DeviceExperts
from experts.expert_model import ExpertModel
from experts.expert_parallel.library import Library
from experts.expert_parallel.machine import library_for, memory_for
from experts.expert_parallel.memory import Block
from experts.expert_parallel.rank import Rank, Ranks
from experts.expert_parallel.shape import ExpertMap, shape_from_json
from experts.expert_weights import ExpertReader
from experts.packed.experts import expert_part
from experts.transport.cuda import ENGINE, WorkerStep

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
        self._engine: Block | None = None  # its window: workers have nothing to do with one another
        self._step: WorkerStep | None = None

    def obey(self, order: Order) -> Order | None:
        """Carry an order out; its answer, if it has one. Raises BaristaError."""
        match order["do"]:
            case "leave":
                return self._leave()
            case "load":
                return self._load(order)
            case "join":
                return self._join(bytes.fromhex(order["engine"]), order["size"])
            case "step":
                if self._step is None:
                    raise ConfigError("A step was ordered before a group was joined.", "This is a mistake of ours.")
                self._step.run(order["tokens"])
                return None
        raise ConfigError(f"The order {order['do']!r} is not known.", "Run one version on all ranks.")

    def _load(self, order: Order) -> Order:
        if self._rank is not None:
            self._rank.close()
            self._rank = None
        device = torch.device(order["device"])
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # as the engine has it
        shape = shape_from_json(order["shape"])
        experts = ExpertMap.of(order["ranks"], shape.num_ranks)
        self._hold(experts.local(order["rank"]), device)
        self._library = library_for(device)
        memory = memory_for(device, self._library)
        self._rank = Rank(self._library, memory, device, shape, experts, order["rank"], timeout=order["timeout"])
        return {"window": self._rank.window.handle().hex(), "size": self._rank.window.size}

    def _hold(self, experts: tuple[int, ...], device: torch.device) -> None:
        """Hold these experts of every layer. Only those that are new are read; one layer at a time exists twice."""
        if experts == self._held:
            return
        dtype = getattr(torch, self._model.dtype)
        place = {expert: index for index, expert in enumerate(self._held)}
        for layer, spec in self._model.layers.items():
            weights = [
                self._experts[layer].weights(place[expert])
                if expert in place
                else self._reader.read(spec, layer, expert)
                for expert in experts
            ]
            self._experts[layer] = DeviceExperts(weights, device=device, dtype=dtype)
        self._held = experts

    def _join(self, handle: bytes, size: int) -> Order:
        rank = self._rank
        if rank is None or self._library is None:
            raise ConfigError("A group was to be joined before its experts were loaded.", "This is a mistake of ours.")
        self._engine = memory_for(rank.device, self._library).open(handle, size)
        peers: dict[int, Block] = {ENGINE: self._engine, rank.rank: rank.window}
        rank.join([peers.get(number) for number in range(rank.shape.num_ranks)])
        capturable = rank.device.type == "cuda" and all(experts.capturable for experts in self._experts.values())
        self._step = WorkerStep(Ranks(self._library, [rank]), self._experts, may_capture=capturable)
        return {"joined": True}

    def _leave(self) -> Order:
        """Let go of the engine's window. It does the same, and only then may this one's memory be given back."""
        if self._rank is not None and self._rank.device.type == "cuda":
            torch.cuda.synchronize(self._rank.device)  # an aborted step still walks through its layers
        if self._engine is not None:
            self._engine.close()
        self._engine, self._step = None, None
        return {"left": True}


def main() -> None:
    """Obey until the input ends. Ctrl-C in a terminal reaches the whole group; the engine decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    torch.set_num_threads(int(sys.argv[1]))
    answers = _answers()
    worker = Worker(ExpertModel.from_json(sys.stdin.readline()))
    orders: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(orders,), daemon=True).start()
    _write(answers, {"do": "start"})
    while line := orders.get():
        order = json.loads(line)
        try:
            answer = worker.obey(order)
        except Exception as error:
            log.exception("the order %r could not be carried out", order["do"])
            if order["do"] == "step":  # the engine waits for it; its death is what that notices soonest
                os._exit(1)
            answer = _refusal(error)
        if answer is not None:
            _write(answers, {"do": order["do"]} | answer)


def _refusal(error: Exception) -> Order:
    if isinstance(error, BaristaError):
        return {"error": error.message, "remedy": error.remedy}
    if isinstance(error, torch.OutOfMemoryError):
        return {"error": "Its GPU has no room for its share of the experts.",
                "remedy": "Give more --workers on more GPUs, or --format fp8."}  # fmt: skip
    return {"error": f"{type(error).__name__}: {error}", "remedy": "The worker's log says more."}


def _read(orders: queue.SimpleQueue[str]) -> None:
    """Its end is the engine's: a step that waits for that is not waited for."""
    for line in iter(sys.stdin.readline, ""):
        orders.put(line)
    os._exit(0)


def _answers() -> IO[str]:
    """What was the standard output. What a library or a compiler prints goes to the log from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _write(answers: IO[str], answer: Order) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
