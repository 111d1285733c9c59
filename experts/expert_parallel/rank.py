"""A rank of a group: its window, its tensors, and the calls of one layer in the order of cuda/ep_window.h.

Nothing here waits for a GPU or allocates per layer, so a layer may be captured in a CUDA graph. Several ranks of one
process are driven together (`Ranks`): virtual ranks on one GPU, and the reference on the CPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from barista.errors import ConfigError
from experts.expert_parallel.library import Library
from experts.expert_parallel.memory import Block, Memory
from experts.expert_parallel.shape import ExpertMap, GroupShape
from experts.expert_parallel.structs import (
    COMBINE,
    DISPATCH,
    MAX_LOCAL_RANKS,
    MAX_RANKS,
    RankStruct,
    StateStruct,
)

TIMEOUT_SECONDS = 10.0


class Rank:
    """One rank. Its tensors are on `device`; so is its window.

    expert_rows: what `expand` fills, [max_rows, hidden] in the group's dtype. expert_ends: [max_local_experts] int32,
    where each local expert's rows end. slots, ordinals: as in cuda/ep.h.
    """

    def __init__(
        self,
        library: Library,
        memory: Memory,
        device: torch.device,
        shape: GroupShape,
        experts: ExpertMap,
        rank: int,
        *,
        timeout: float = TIMEOUT_SECONDS,
    ) -> None:
        self.shape, self.rank, self.device = shape, rank, device
        self.num_local_experts = len(experts.local(rank))
        if not 0 <= rank < shape.num_ranks or self.num_local_experts > shape.max_local_experts:
            raise ConfigError(
                f"rank {rank} with {self.num_local_experts} experts does not fit the group.",
                f"It has ranks 0 to {shape.num_ranks - 1} and room for {shape.max_local_experts} experts on each.",
            )
        if len(experts.ranks) != shape.num_experts:
            raise ConfigError(
                f"the map has {len(experts.ranks)} experts, the group {shape.num_experts}.", "Make them equal."
            )
        self._struct_of_shape = shape.struct()
        total, self._offsets = library.window_bytes(self._struct_of_shape)
        # Nobody sends to a rank without experts.
        size = total if self.num_local_experts or shape.to_all else int(self._offsets.experts)
        self.window = memory.create(size)
        library.call("ep_window_format", self.window.address, size, ctypes.byref(self._struct_of_shape))
        self._map = torch.tensor([experts.ranks, experts.indices], dtype=torch.int32, device=device)
        self._state = torch.zeros(ctypes.sizeof(StateStruct) // 4, dtype=torch.int32, device=device)
        self.slots = self._empty(shape.max_tokens, shape.num_ranks)
        self.ordinals = self._empty(shape.max_tokens, shape.top_k)
        local_rows = shape.rows if self.num_local_experts else 0
        self.expert_rows = torch.zeros(local_rows, shape.hidden_size, dtype=shape.dtype, device=device)
        self.expert_ends = torch.zeros(shape.max_local_experts, dtype=torch.int32, device=device)
        self.struct = RankStruct(
            size=ctypes.sizeof(RankStruct),
            rank=rank,
            shape=self._struct_of_shape,
            timeout_ns=int(timeout * 1e9),
            state=self._state.data_ptr(),
            expert_rank=self._map[0].data_ptr(),
            expert_index=self._map[1].data_ptr(),
            num_local_experts=self.num_local_experts,
            slots=self.slots.data_ptr(),
            ordinals=self.ordinals.data_ptr(),
            expert_rows=self.expert_rows.data_ptr(),
            expert_ends=self.expert_ends.data_ptr(),
        )
        self._kept: tuple[Tensor, ...] = ()
        self._results: Tensor | None = None

    def _empty(self, *size: int) -> Tensor:
        return torch.full(size, -1, dtype=torch.int32, device=self.device)

    def join(self, windows: Sequence[Block | None]) -> None:
        """The group's windows in order of the ranks, its own among them. All ranks are at epoch 0 from now on.

        None: a rank that this one has nothing to do with, as two owners have; it neither tells it anything nor waits.
        """
        own = windows[self.rank] if len(windows) == self.shape.num_ranks else None
        if own is None or own.address != self.window.address:
            raise ConfigError(f"{len(windows)} windows for a group of {self.shape.num_ranks}.", "Give each rank's.")
        alive = 0
        for rank, window in enumerate(windows):
            self.struct.windows[rank] = (window or own).address
            alive |= (window is not None) << rank
        self._state.copy_(torch.tensor([ctypes.sizeof(StateStruct), 0, alive, 0] + [0] * 2 * MAX_RANKS))

    def close(self) -> None:
        """Give the window's memory back. Nobody may use the rank, or its window, afterwards."""
        self.window.close()

    def feed(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor]:
        """The next layer's tokens: [num_tokens, hidden] in the group's dtype, [num_tokens, k] int32 and float32.

        Returns output [num_tokens, hidden] and failed [num_tokens] uint8, which hold something after `combine`.
        Raises ConfigError for tensors of another shape, dtype or device, before anything is launched.
        """
        shape, num_tokens = self.shape, hidden_states.shape[0]
        if num_tokens > shape.max_tokens:
            raise ConfigError(
                f"{num_tokens} tokens in one layer, but the windows have room for {shape.max_tokens}.",
                "Lower --max-num-batched-tokens, or make the group with a larger max_tokens.",
            )
        for name, tensor, size, dtype in (
            ("hidden_states", hidden_states, (num_tokens, shape.hidden_size), shape.dtype),
            ("topk_ids", topk_ids, (num_tokens, shape.top_k), torch.int32),
            ("topk_weights", topk_weights, (num_tokens, shape.top_k), torch.float32),
        ):
            found = (tuple(tensor.shape), tensor.dtype, tensor.device.type)
            if found != (size, dtype, self.device.type) or not tensor.is_contiguous():
                raise ConfigError(
                    f"{name} is {list(tensor.shape)} of {tensor.dtype} on {tensor.device}.",
                    f"Give {list(size)} of {dtype} on {self.device}, contiguous.",
                )
        output = torch.empty_like(hidden_states)
        failed = torch.empty(num_tokens, dtype=torch.uint8, device=self.device)
        self._kept = hidden_states, topk_ids, topk_weights, output, failed
        pointers = [tensor.data_ptr() if num_tokens else None for tensor in self._kept]
        self.struct.num_tokens = num_tokens
        self.struct.hidden_states, self.struct.topk_ids, self.struct.topk_weights = pointers[:3]
        self.struct.output, self.struct.failed = pointers[3:]
        return output, failed

    def results(self, rows: Tensor) -> None:
        """What the experts made of expert_rows, for `collect`: [expert_ends[-1] or more, hidden] in its dtype."""
        assert rows.dtype is self.shape.dtype
        assert rows.is_contiguous()
        self._results = rows
        self.struct.expert_results = rows.data_ptr()

    def state(self) -> StateStruct:
        """What the kernels keep; on a GPU this waits for them."""
        return StateStruct.from_buffer_copy(self._state.cpu().numpy().tobytes())

    @property
    def status(self) -> Tensor:
        """[1] int32 on the device: enum ep_status, to be copied once a step."""
        return self._state[3:4]


class Ranks:
    """The ranks that this process drives, by one launch for all. stream: a cudaStream_t, 0 for torch's default."""

    def __init__(self, library: Library, ranks: Sequence[Rank]) -> None:
        if not 1 <= len(ranks) <= MAX_LOCAL_RANKS:
            raise ConfigError(f"{len(ranks)} ranks in one process.", f"One process drives 1 to {MAX_LOCAL_RANKS}.")
        self._library = library
        self.ranks = tuple(ranks)

    def route(self, stream: int = 0) -> None:
        """Decide which row of which window each token takes."""
        self._run("ep_route", stream)

    def dispatch(self, stream: int = 0) -> None:
        """Send the rows."""
        self._run("ep_dispatch", stream)

    def sync_dispatch(self, stream: int = 0) -> None:
        """Tell the peers that their rows are there, and wait for theirs."""
        self._run("ep_sync", stream, DISPATCH)

    def expand(self, stream: int = 0) -> None:
        """Fill expert_rows and expert_ends."""
        self._run("ep_expand", stream)

    def collect(self, stream: int = 0) -> None:
        """Put what was given to `results` where the sources read it."""
        self._run("ep_collect", stream)

    def reduce(self, stream: int = 0) -> None:
        """With combine "partial": sum up this owner's rows of each token."""
        self._run("ep_reduce", stream)

    def sync_combine(self, stream: int = 0) -> None:
        """Tell the peers that the experts' rows are there, and wait for theirs."""
        self._run("ep_sync", stream, COMBINE)

    def combine(self, stream: int = 0) -> None:
        """Fill output and failed."""
        self._run("ep_combine", stream)

    def send(self, stream: int = 0) -> None:
        """A layer's first half: from `feed` to expert_rows."""
        self.route(stream)
        self.dispatch(stream)
        self.sync_dispatch(stream)
        self.expand(stream)

    def receive(self, stream: int = 0) -> None:
        """A layer's second half: from `results` to output."""
        self.collect(stream)
        if self.ranks[0].shape.combine == "partial":
            self.reduce(stream)
        self.sync_combine(stream)
        self.combine(stream)

    def _run(self, name: str, stream: int, *more: int) -> None:
        structs = (RankStruct * len(self.ranks))(*(rank.struct for rank in self.ranks))
        self._library.call(name, structs, len(self.ranks), *more, stream)
