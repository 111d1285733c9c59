"""What the GPU here does beside what its memory allows: python -m benchmarks.gpu  (make gpu-bench)

Eight virtual ranks share one GPU; a call launches all of them at once. Caches are cold: 256 MB are written before each
call. Bytes are those that must move (gpu_bytes.py), the bandwidth is that of a device-to-device copy of 2 GiB in the
same run, read and written. A table in Markdown comes last. On several GPUs the first one is measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from benchmarks.gpu_bytes import Cycle, expert_layer_bytes
from experts.device.choice import Choice
from experts.device.experts import DeviceExperts
from experts.device.measure import Products
from experts.device.products import GROUPED
from experts.expert_parallel.machine import cuda_library
from experts.expert_parallel.memory import GpuMemory
from experts.expert_parallel.rank import Rank, Ranks
from experts.expert_parallel.shape import ExpertMap, GroupShape
from experts.formats.formats import FP8_BLOCK
from experts.kernels.expert_table import ExpertWeights
from experts.kernels.weight import Fp8Weight, encode_fp8
from experts.pool import DispatchBatch
from experts.transport.device import DeviceTransport

RANKS, EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 8, 256, 8, 7168, 2048  # DeepSeek-V3
FLUSH_BYTES = 2**28
REPEATS = 30
IN_A_GRAPH = 20
GPU = torch.device("cuda", 0)


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the table. floor: nbytes at the measured bandwidth, in seconds."""

    what: str
    tokens: int
    seconds: float
    floor: float

    def __str__(self) -> str:
        share = f"{self.floor / self.seconds:.0%}"
        return f"| {self.what} | {self.tokens} | {self.seconds * 1e6:.1f} | {self.floor * 1e6:.1f} | {share} |"


class Clock:
    """Times work on the GPU with cold caches. Medians, in seconds."""

    def __init__(self) -> None:
        self._dirt = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=GPU)

    def once(self, work: Callable[[], object]) -> float:
        """One call after another, each by its own events."""
        for _ in range(3):
            work()
        times = []
        for _ in range(REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._dirt.zero_()
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e-3)
        return statistics.median(times)

    def in_a_graph(self, work: Callable[[], object]) -> float:
        """As part of a CUDA graph: one of 20 times (flush, work), less one of 20 flushes."""
        return (self._graph(work) - self._graph(lambda: None)) / IN_A_GRAPH

    def _graph(self, work: Callable[[], object]) -> float:
        work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(IN_A_GRAPH):
                self._dirt.zero_()
                work()
        times = []
        for _ in range(REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e-3)
        return statistics.median(times)


def copy_bandwidth(clock: Clock) -> float:
    """Bytes a second, read and written."""
    source = torch.empty(2**31, dtype=torch.uint8, device=GPU)
    target = torch.empty_like(source)
    return 2 * source.nbytes / clock.once(lambda: target.copy_(source))


class Group:
    """Eight virtual ranks with random tokens, one cycle behind them, so that every half of a cycle can be repeated."""

    def __init__(self, tokens: int, wire: Literal["values", "fp8"], combine: Literal["exact", "partial"],
                 *, to_all: bool = False) -> None:  # fmt: skip
        library = cuda_library()
        experts = ExpertMap.even(EXPERTS, range(RANKS), RANKS)
        self.shape = GroupShape(
            num_ranks=RANKS,
            num_experts=EXPERTS,
            max_local_experts=experts.most(),
            top_k=TOP_K,
            hidden_size=HIDDEN,
            max_tokens=tokens,
            max_rows=-(-2 * tokens * TOP_K // 128) * 128,  # twice an even share
            wire=wire,
            combine=combine,
            to_all=to_all,
        )
        memory = GpuMemory(library, 0)
        self.ranks = [Rank(library, memory, GPU, self.shape, experts, rank) for rank in range(RANKS)]
        self.copies = 0
        for rank in self.ranks:
            rank.join([peer.window for peer in self.ranks])
            ids = torch.rand(tokens, EXPERTS, device=GPU).argsort(dim=1)[:, :TOP_K].to(torch.int32).contiguous()
            owners = ids // experts.most()
            self.copies += sum(len(set(row)) for row in owners.tolist())
            rank.feed(torch.randn(tokens, HIDDEN, device=GPU).bfloat16(), ids, torch.rand(tokens, TOP_K, device=GPU))
            rank.results(torch.zeros(self.shape.rows, HIDDEN, dtype=torch.bfloat16, device=GPU))
        self.together = Ranks(library, self.ranks)
        self.together.send(self._stream())
        self.together.receive(self._stream())
        if any(rank.state().status for rank in self.ranks):
            raise RuntimeError(f"the cycle went wrong: {[rank.state().status for rank in self.ranks]}")

    @property
    def bytes(self) -> Cycle:
        """What must move."""
        tokens = RANKS * self.shape.max_tokens
        copies = RANKS * tokens if self.shape.to_all else self.copies
        return Cycle(tokens=tokens, copies=copies, pairs=tokens * TOP_K, hidden=HIDDEN, top_k=TOP_K,
                     fp8=self.shape.wire == "fp8")  # fmt: skip

    def run(self, name: str) -> Callable[[], None]:
        """One call, on whatever stream is current when it is made."""
        return lambda: getattr(self.together, name)(self._stream())

    def close(self) -> None:
        """Give the windows back."""
        for rank in self.ranks:
            rank.close()

    def _stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream


def exchange_lines(clock: Clock, bandwidth: float, tokens: int) -> Iterator[Line]:
    """Each call of a cycle, and the all-gather and reduce-scatter beside it."""
    timed = clock.in_a_graph if tokens <= 128 else clock.once
    where = "in a graph" if tokens <= 128 else "launched"

    def line(what: str, name: str, nbytes: int, group: Group) -> Line:
        return Line(f"{what}, {where}", tokens, timed(group.run(name)), nbytes / bandwidth)

    exact = Group(tokens, "fp8", "exact")
    must = exact.bytes
    yield line("route", "route", 0, exact)
    yield line("dispatch, fp8", "dispatch", must.dispatch, exact)
    yield line("sync (8 ranks)", "sync_dispatch", 0, exact)
    yield line("expand to bf16 rows, fp8", "expand", must.expand + must.pairs * HIDDEN, exact)
    yield line("collect, bf16", "collect", 2 * must.pairs * 2 * HIDDEN, exact)
    yield line("combine, exact rows, bf16", "combine", must.combine_exact, exact)
    exact.close()
    partial = Group(tokens, "values", "partial")
    must = partial.bytes
    yield line("dispatch, bf16", "dispatch", must.dispatch, partial)
    yield line("reduce, bf16", "reduce", must.reduce, partial)
    yield line("combine, partial sums, bf16", "combine", must.combine_partial, partial)
    partial.close()
    everyone = Group(tokens, "fp8", "partial", to_all=True)
    must = everyone.bytes
    yield line("all-gather, fp8 (baseline)", "dispatch", must.dispatch, everyone)
    yield line("reduce-scatter, bf16 (baseline)", "combine", must.combine_partial, everyone)
    everyone.close()


def layer_weights(*, fp8: bool) -> ExpertWeights:
    """Of one expert of DeepSeek-V3's shape. A layer copies them for each of its experts."""
    matrices = [torch.randn(INTERMEDIATE, HIDDEN).bfloat16() * 0.02] * 2
    matrices.append(matrices[0].t().contiguous())
    gate, up, down = (Fp8Weight(*encode_fp8(matrix)) if fp8 else matrix for matrix in matrices)
    return gate, up, down


def layer_lines(clock: Clock, bandwidth: float, num_experts: int, *, fp8: bool) -> Iterator[Line]:
    """One MoE layer of DeepSeek-V3's shape, all on this GPU, by each product that it offers.

    "Chosen" is what a server takes. FP8 by torch's grouped product is dequantised whole each time; launching that takes
    longer to capture than it costs, so it is launched.
    """
    experts = DeviceExperts([layer_weights(fp8=fp8)] * num_experts, device=GPU, dtype=torch.bfloat16)
    transport, chosen = DeviceTransport({0: experts}), experts.products
    weight_bytes = 1 + 4 / FP8_BLOCK**2 if fp8 else 2
    for tokens in (1, 16, 128, 1024):
        rows = torch.randn(tokens, HIDDEN, device=GPU).bfloat16()
        ids = torch.rand(tokens, num_experts, device=GPU).argsort(dim=1)[:, :TOP_K].to(torch.int32).contiguous()
        batch = DispatchBatch(0, 0, rows, ids, torch.rand(tokens, TOP_K, device=GPU))
        nbytes = expert_layer_bytes(int(ids.unique().numel()), ids.numel(), HIDDEN, INTERMEDIATE, weight_bytes)

        def layer(batch: DispatchBatch = batch) -> object:
            return transport.combine(transport.dispatch(batch))

        for name, product in chosen.products.items():
            experts.products = Products({name: product}, Choice((name,)))
            graph = product.capturable and not (fp8 and product is GROUPED)
            mark = ", chosen" if name == chosen.choice.name(ids.numel()) else ""
            what = f"MoE layer, {num_experts} experts, {'fp8' if fp8 else 'bf16'}, {name}{mark}"
            yield Line(what, tokens, (clock.in_a_graph if graph else clock.once)(layer), nbytes / bandwidth)


def model_lines(bandwidth: float) -> Iterator[Line]:
    """Decode steps of a whole model, logits on the host. Nothing without the packages that loading one takes."""
    try:
        from benchmarks.gpu_model import decode_steps, write_random_model
    except ImportError as error:
        print(f"no whole model: {error}")
        return
    with tempfile.TemporaryDirectory(prefix="barista-") as folder:
        what = write_random_model(Path(folder))
        for sequences, seconds, nbytes in decode_steps(Path(folder), GPU):
            yield Line(f"decode step, {what}", sequences, seconds, nbytes / bandwidth)


def main() -> None:
    """Measure, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="*", default=[128, 2048], help="a rank; none: no exchange")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("PyTorch sees no GPU: nothing can be measured. Look at nvidia-smi, and at GPU_PYTHON=... of make.")
    clock = Clock()
    bandwidth = copy_bandwidth(clock)
    lines: list[Line] = []
    for tokens in options.tokens:
        for line in exchange_lines(clock, bandwidth, tokens):
            print(line, flush=True)
            lines.append(line)
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    needed = EXPERTS * 3 * HIDDEN * INTERMEDIATE * 2 * 1.2
    for fp8 in (False, True):
        for line in layer_lines(clock, bandwidth, EXPERTS if free > needed else EXPERTS // 4, fp8=fp8):
            print(line, flush=True)
            lines.append(line)
        torch.cuda.empty_cache()
    for line in model_lines(bandwidth):
        print(line, flush=True)
        lines.append(line)
    print(
        f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e12:.2f} TB/s\n\n"
        "| what | tokens | us | floor us | floor / time |\n|---|---|---|---|---|"
    )
    print("\n".join(map(str, lines)))


if __name__ == "__main__":
    main()
