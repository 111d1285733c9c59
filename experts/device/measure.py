"""Chooses a product for a layer's experts by timing those that the device offers, on the layer's own weights."""

from __future__ import annotations

import logging
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from experts.device.choice import Case, Choice, Timings, kept_choice
from experts.device.products import Product, contenders, last_resort
from experts.device.stacks import Stack

log = logging.getLogger(__name__)

ROW_COUNTS = (8, 128, 1024, 8192)  # of 1, 16, 128 and 1024 tokens that choose eight experts each
_REPEATS = 7
Result = TypeVar("Result")

_choices: dict[Case, Choice | None] = {}  # of this process: the other layers take what the first one has found


def even_ends(num_rows: int, num_experts: int) -> Tensor:
    """Where each expert's rows end, [num_experts] int32, if each has its share or the share's neighbour."""
    return (torch.arange(1, num_experts + 1) * num_rows // num_experts).int()


def graph_seconds(work: Callable[[], object]) -> float:
    """Of the work in a CUDA graph, as decode steps run it: so what the host needs to launch it does not count."""
    work()  # compiles, and takes what a graph may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # see router/model/device/graphs.py
        work()
    graph.replay()
    times = []
    for _ in range(_REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) * 1e-3)
    return statistics.median(times)


@dataclass(frozen=True, slots=True)
class LayerTimer:
    """Times products on a layer. dtype: of the rows. clock: from work to its seconds."""

    gate_up: Stack
    down: Stack
    device: torch.device
    dtype: torch.dtype
    clock: Callable[[Callable[[], object]], float] = graph_seconds

    def timings(self, products: Sequence[Product]) -> Timings:
        """Of each product that works, from few rows to many until it fails: more rows take more memory."""
        timings: dict[str, dict[int, float]] = {product.name: {} for product in products}
        for product in filter(self.works, products):
            for count in ROW_COUNTS:
                seconds = self._seconds(product, count)
                if seconds is None:
                    break
                timings[product.name][count] = seconds
        return timings

    def works(self, product: Product) -> bool:
        """Whether it computes one row. What it needs for any other number has been compiled then."""

        def compute(rows: Tensor, ends: Tensor) -> bool:
            if product.compile:
                product.compile(rows, self.gate_up, self.down, ends)
            product.layer(rows, self.gate_up, self.down, ends)
            return True

        return self._try(product, 1, compute) is not None

    def _seconds(self, product: Product, num_rows: int) -> float | None:
        """Of one call, for rows that are spread evenly. None where the product fails."""

        def time(rows: Tensor, ends: Tensor) -> float:
            return self.clock(lambda: product.layer(rows, self.gate_up, self.down, ends))

        return self._try(product, num_rows, time)

    def _try(self, product: Product, num_rows: int, run: Callable[[Tensor, Tensor], Result]) -> Result | None:
        """What comes of so many rows and their ends. None, and a warning, where that fails."""
        num_experts, _, hidden = self.gate_up.values.shape
        ends = even_ends(num_rows, num_experts).to(self.device)
        try:
            return run(torch.randn(num_rows, hidden, dtype=self.dtype, device=self.device), ends)
        except Exception as error:  # noqa: BLE001  # of Triton, of the compilers that it calls, of the driver; no memory
            log.warning("experts are not computed by %r for %d rows: %s", product.name, num_rows, error)
            return None


@dataclass(frozen=True, slots=True)
class Products:
    """choice: among the names of `products`."""

    products: dict[str, Product]
    choice: Choice

    def __call__(self, num_rows: int) -> Product:
        """The one for so many rows."""
        return self.products[self.choice.name(num_rows)]

    @property
    def capturable(self) -> bool:
        """Whether all that may be taken are."""
        return all(self.products[name].capturable for name in self.choice.names)


def products_for(gate_up: Stack, down: Stack, device: torch.device, dtype: torch.dtype) -> Products:
    """The products of a layer whose rows are in dtype. On a GPU they are timed once for each machine and kind of layer.

    One that fails there is not taken, and a warning says why.
    """
    offered = contenders(device, dtype, (gate_up, down))
    resort = last_resort(device, dtype, (gate_up, down))
    named = {product.name: product for product in (*offered, resort)}
    if device.type == "cuda" and offered:
        choice = _timed_choice(offered, gate_up, down, device, dtype)
    else:
        choice = Choice((offered[0].name,)) if offered else None
    return Products(named, choice or Choice((resort.name,)))


def _timed_choice(
    offered: Sequence[Product], gate_up: Stack, down: Stack, device: torch.device, dtype: torch.dtype
) -> Choice | None:
    case = Case(
        device=torch.cuda.get_device_name(device),
        torch=torch.__version__,
        triton=getattr(sys.modules.get("triton"), "__version__", ""),
        hidden=down.out_features,
        intermediate=down.values.shape[2],
        weights=f"{gate_up.values.dtype}, {down.values.dtype}",
        rows=str(dtype),
    )
    if case not in _choices:
        named = {product.name: product for product in offered}
        timer = LayerTimer(gate_up, down, device, dtype)
        with torch.cuda.device(device):
            _choices[case] = kept_choice(
                case,
                works=lambda name: name in named and timer.works(named[name]),
                measure=lambda: timer.timings(offered),
            )
            torch.cuda.empty_cache()
        log.info("experts %s: %s", case, _choices[case])
    return _choices[case]
