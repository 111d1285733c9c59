"""Decode steps as CUDA graphs: one for each padded size, captured when it is first needed, then replayed.

A graph has fixed shapes and addresses. So a step's sequences are padded to a size, and its numbers are written where
the graph reads them. Rows of padding ask for no expert, and read and write the cache's last block, which nobody owns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from router.model.batch import Batch
from router.model.device.contexts import runs_of
from router.model.device.rows import StepInputs

Outputs = tuple[Tensor, Tensor]  # logits [num_rows, vocab] float32 and failed [num_rows] bool
# From a function to one that repeats it: the same kernels at the same addresses. The second argument is called before
# the function is run to no other purpose.
Capture = Callable[[Callable[[], None], Callable[[], None]], Callable[[], None]]

MAX_ROWS = 256  # of a graph; a larger step takes so long that launching it kernel by kernel costs little
_LEAST_WIDTH = 16  # blocks


def padded_rows(num_rows: int) -> int:
    """The size of the graph for so many rows: 1, 2, 4, 8, then multiples of 8."""
    return 1 << (num_rows - 1).bit_length() if num_rows <= 8 else -(-num_rows // 8) * 8


def padded_width(width: int, most: int) -> int:
    """Its width, in blocks of a sequence: a power of two from 16 on, and never more than `most`, or than is asked."""
    return max(width, min(max(_LEAST_WIDTH, 1 << (width - 1).bit_length()), most))


def blank(num_rows: int, width: int, block_size: int, nowhere: int) -> Tensor:
    """Rows of padding, [num_rows, 3 + width] int32: token id, position, slot and blocks of each."""
    packed = torch.zeros(num_rows, 3 + width, dtype=torch.int32)
    packed[:, 2] = nowhere
    packed[:, 3:] = nowhere // block_size
    return packed


def pack(batch: Batch, num_rows: int, width: int, block_size: int, nowhere: int) -> Tensor:
    """A decode batch as one tensor, which begins with its rows and ends with padding: see blank."""
    packed = blank(num_rows, width, block_size, nowhere)
    n, used = batch.block_tables.shape
    for column, numbers in enumerate((batch.token_ids, batch.positions, batch.slots)):
        packed[:n, column] = numbers
    packed[:n, 3 : 3 + used] = batch.block_tables
    return packed


def unpack(packed: Tensor, block_size: int) -> StepInputs:
    """What `blank` lays out, as views. Every row is a sequence of its own that may see all of its blocks."""
    num_rows, width = packed.shape[0], packed.shape[1] - 3
    runs = runs_of([1] * num_rows, [width * block_size] * num_rows)
    return StepInputs(packed[:, 0], packed[:, 1], packed[:, 2], packed[:, 3:], runs)


@dataclass(frozen=True, slots=True)
class _Graph:
    """packed: what it reads, on the device."""

    packed: Tensor
    replay: Callable[[], None]


class GraphedDecode:
    """compute: a step. begin: told of the rows of each step before it runs. max_width: blocks of the longest sequence.
    nowhere: the cache's slot that nobody owns.
    """

    def __init__(
        self,
        compute: Callable[[StepInputs], Outputs],
        capture: Capture,
        begin: Callable[[int], None],
        *,
        vocab_size: int,
        block_size: int,
        max_width: int,
        nowhere: int,
        device: torch.device,
    ) -> None:
        self._compute, self._capture, self._begin = compute, capture, begin
        self._block_size, self._max_width, self._nowhere = block_size, max_width, nowhere
        self._device = device
        # All graphs write here: outputs of their own would add up to gigabytes.
        self._logits = torch.empty(MAX_ROWS, vocab_size, device=device)
        self._failed = torch.empty(MAX_ROWS, dtype=torch.bool, device=device)
        self._graphs: dict[tuple[int, int], _Graph] = {}

    def __call__(self, batch: Batch) -> Outputs:
        """A step of one row a sequence, at most MAX_ROWS. The outputs are valid until the next call."""
        num_rows, width = batch.block_tables.shape
        shape = padded_rows(num_rows), padded_width(width, self._max_width)
        graph = self._graphs.get(shape)
        if graph is None:
            graph = self._graphs[shape] = self._captured(*shape)
        self._begin(shape[0])  # first, since others must get ready too
        graph.packed.copy_(pack(batch, *shape, self._block_size, self._nowhere))
        graph.replay()
        return self._logits[:num_rows], self._failed[:num_rows]

    def _captured(self, num_rows: int, width: int) -> _Graph:
        """Captured over padding alone, so that what runs meanwhile touches no sequence and counts no token."""
        packed = blank(num_rows, width, self._block_size, self._nowhere).to(self._device)

        def run() -> None:
            logits, failed = self._compute(unpack(packed, self._block_size))
            self._logits[:num_rows].copy_(logits)
            self._failed[:num_rows].copy_(failed)

        return _Graph(packed, self._capture(run, lambda: self._begin(num_rows)))


class CudaCapture:
    """The Capture of CUDA graphs. They share their memory, since one alone runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None], before: Callable[[], None]) -> Callable[[], None]:
        """Run once on a stream of its own, so that what kernels set up at their first call is not captured."""
        before()
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may have to do with the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        return graph.replay
