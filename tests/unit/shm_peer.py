"""The other process of the tests of shared memory: `python -m tests.unit.shm_peer worker|engine`.

worker: for each JSON line {"name", "nonce", "size_bytes"} opens that window, answers "ok" or the refusal, and serves it
in a thread; ends with its standard input. engine: makes two windows, prints them as such lines, and sends rows through
the first for ever once a line comes in.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
import threading
import time
from dataclasses import dataclass

import numpy as np
import torch

from experts.link import LinkDown, RowsRequest, RowsStatus
from experts.transport.shm import ShmLink, serve_window
from experts.transport.window import Window, WindowRefused, create_window, open_window

EPOCH = 7
LAYER_THAT_RAISES = 98
LAYER_NOT_HELD = 99


@dataclass(frozen=True)
class Computed:
    status: RowsStatus
    epoch: int = EPOCH
    not_held: tuple[int, ...] = ()


def expert_rows(layer: int, rows: np.ndarray, topk_ids: np.ndarray) -> np.ndarray:
    """rows: [n, hidden] int32. Each pair's row depends on all of its bytes, the expert and the layer."""
    row, place = np.nonzero(topk_ids >= 0)
    return rows[row] ^ (topk_ids[row, place][:, None] * 65537 + layer).astype(np.int32)


def compute(layer: int, hidden_states: torch.Tensor, topk_ids: torch.Tensor, out: torch.Tensor) -> Computed:
    if layer == LAYER_THAT_RAISES:
        raise ArithmeticError("as asked")
    if layer == LAYER_NOT_HELD:
        return Computed(RowsStatus.NOT_HELD, not_held=(3, 5))
    rows = expert_rows(layer, hidden_states.view(torch.int32).numpy(), topk_ids.numpy())
    out.view(torch.int32).numpy()[:] = rows
    return Computed(RowsStatus.OK)


def compute_unsteadily(layer: int, hidden_states: torch.Tensor, topk_ids: torch.Tensor, out: torch.Tensor) -> Computed:
    time.sleep(random.choice((0, 0, 0, 0, 0, 0, 1e-5, 3e-4)))
    return compute(layer, hidden_states, topk_ids, out)


def offer(window: Window) -> dict[str, object]:
    return {"name": window.name, "nonce": window.nonce.hex(), "size_bytes": window.size_bytes}


def accept(value: dict) -> Window:
    return open_window(value["name"], bytes.fromhex(value["nonce"]), value["size_bytes"])


def one_row(step: int, hidden_size: int, top_k: int) -> RowsRequest:
    topk_ids = np.full((1, top_k), -1, np.int32)
    topk_ids[0, 0] = 1
    return RowsRequest(step, 0, 0, 0, torch.zeros(1, hidden_size), np.zeros(1, np.int32), topk_ids, 1)


def run_worker() -> None:
    windows, threads = [], []
    for line in sys.stdin:
        try:
            window = accept(json.loads(line))
        except WindowRefused as refusal:
            print(refusal, flush=True)
            continue
        windows.append(window)
        threads.append(threading.Thread(target=serve_window, args=(window, compute_unsteadily)))
        threads[-1].start()
        print("ok", flush=True)
    for window in windows:
        window.close()
    for thread in threads:
        thread.join()


def run_engine() -> None:
    windows = [create_window(4, 2, 8, torch.float32) for _ in range(2)]
    print(json.dumps([offer(window) for window in windows]), flush=True)
    sys.stdin.readline()
    link = ShmLink(windows[0])
    with contextlib.suppress(LinkDown):
        for step in range(1_000_000):
            link.send(one_row(step, 8, 2))
            assert link.receive(time.monotonic() + 30) is not None


if __name__ == "__main__":
    {"worker": run_worker, "engine": run_engine}[sys.argv[1]]()
