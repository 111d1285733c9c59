"""The experts that a worker holds: loaded, released and computed, each layer changed as one step."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from barista.errors import CheckpointError
from experts import kernels
from experts.checkpoint import checkpoint_digest, open_checkpoint
from experts.expert_model import ExpertModel, expert_bytes
from experts.expert_weights import ExpertReader
from experts.kernels.expert_table import ExpertWeights
from experts.link import RowsStatus
from experts.packed.convert import prepare
from experts.packed.experts import expert_part
from experts.worker.digests import DigestManifest, digest_of

log = logging.getLogger(__name__)


class Fenced(Exception):
    """The command comes from a controller that another has replaced."""


class NoRoom(Exception):
    """The experts do not fit into the worker's capacity."""


@dataclass(frozen=True, slots=True)
class Held:
    """One replica and the digest of its weights."""

    layer: int
    expert: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an assignment is, in bytes of weights, and what was loaded since the last report."""

    bytes_done: int
    bytes_total: int
    loaded: tuple[Held, ...]


@dataclass(frozen=True, slots=True)
class Computed:
    """How a computation ended. epoch: the newest placement that the store was told of. not_held: sorted ids."""

    status: RowsStatus
    epoch: int
    not_held: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Layer:
    """What is held of one layer: never changed, only replaced. Whoever computes keeps the one that he started with."""

    weights: Mapping[int, ExpertWeights]
    digests: Mapping[int, bytes]
    table: kernels.ExpertTable


class ExpertStore:
    """Experts of one model. Changes are serialised and happen layer by layer; computing waits for none of them.

    Experts of few bits are packed first, if nobody on this node has done so. capacity_bytes: the most weights to hold.
    Raises CheckpointError when the checkpoint is not there, or lacks experts or has them in shapes that the format
    cannot take; CacheError when they cannot be packed.
    """

    def __init__(self, model: ExpertModel, capacity_bytes: int) -> None:
        checkpoint = open_checkpoint(model.path)
        self.model = model
        self.dtype: torch.dtype = getattr(torch, model.dtype)
        self.capacity_bytes = capacity_bytes
        self.model_digest = checkpoint_digest(checkpoint, model.dtype, model.format)
        self.term = self.epoch = 0
        try:
            self.expert_bytes = expert_bytes(checkpoint, model)
            part = expert_part(checkpoint, model.layers, model.format)
        except KeyError as error:
            raise CheckpointError(
                f"{model.path}: tensor {error.args[0]} is missing.", "Is this the whole model?"
            ) from error
        prepare(part, lambda fraction, message: log.info("%.0f%%: %s", 100 * fraction, message))
        held = part.over(checkpoint)
        self._reader = ExpertReader(held, self.dtype)
        self._manifest = DigestManifest(held, self.model_digest)
        self.tables = kernels.layer_tables(max(model.layers) + 1)  # what is held, for compiled code
        self._layers: Mapping[int, _Layer] = {}
        self._held: tuple[Mapping[int, _Layer], tuple[Held, ...]] = self._layers, ()
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """Bytes of the experts that are held."""
        return sum(len(layer.digests) * self.expert_bytes[index] for index, layer in self._layers.items())

    def held(self) -> tuple[Held, ...]:
        """Every replica, sorted by layer and expert. The same object until something changes."""
        layers, held = self._held
        if layers is not self._layers:
            layers = self._layers
            held = tuple(
                Held(index, expert, digest)
                for index, layer in sorted(layers.items())
                for expert, digest in sorted(layer.digests.items())
            )
            self._held = layers, held
        return held

    def assign(self, experts: Mapping[int, Iterable[int]], term: int = 0, epoch: int = 0) -> Iterator[Progress]:
        """Load experts, by layer, beside those held; what is held already costs nothing. One report a layer.

        Another command may come in between two layers. term 0 is an engine's own load, and never fenced.
        Raises Fenced, NoRoom (before anything is loaded, unless another command took the room meanwhile),
        ValueError for an expert that the model has not, CheckpointError.
        """
        wanted = self._checked(experts)
        with self._lock:
            self._told(term, epoch)
            missing = {layer: ids for layer in wanted if (ids := self._missing(layer, wanted[layer]))}
            total = sum(len(ids) * self.expert_bytes[layer] for layer, ids in missing.items())
            self._require_room(total)
        held = tuple(item for item in self.held() if item.expert in wanted.get(item.layer, ()))
        yield Progress(0, total, held)
        done = 0
        for layer, ids in missing.items():
            with self._lock:
                self._told(term, epoch)
                loaded = self._load(layer, self._missing(layer, ids))
            done += len(ids) * self.expert_bytes[layer]
            yield Progress(done, total, loaded)

    def release(self, experts: Mapping[int, Iterable[int]], term: int = 0, epoch: int = 0) -> None:
        """Forget experts; those not held are ignored. Raises Fenced, and ValueError as `assign`."""
        wanted = self._checked(experts)
        with self._lock:
            self._told(term, epoch)
            for index, ids in wanted.items():
                if (layer := self._layers.get(index)) is not None:
                    kept = {expert: held for expert, held in layer.weights.items() if expert not in ids}
                    self._replace(index, kept, layer.digests)

    def compute(self, layer: int, hidden_states: torch.Tensor, topk_ids: torch.Tensor, out: torch.Tensor) -> Computed:
        """One layer's expert rows, unweighted, written to `out`: [num_pairs, hidden], in order of (row, place).

        hidden_states: [n, hidden] in the model's dtype; topk_ids: [n, k] int32, -1 for none.
        NOT_HELD: nothing was computed. Raises ValueError for a layer or an expert that the model has not.
        """
        held = self._layers.get(layer)
        try:
            if held is None:
                raise KeyError(layer)
            kernels.expert_rows(hidden_states, topk_ids, held.table, out=out.data_ptr())
        except KeyError:
            asked = self._checked({layer: set(topk_ids.flatten().tolist()) - {-1}})[layer]
            not_held = sorted(asked - set(held.digests if held else ()))
            return Computed(RowsStatus.NOT_HELD, self.epoch, tuple(not_held))
        return Computed(RowsStatus.OK, self.epoch)

    def _checked(self, experts: Mapping[int, Iterable[int]]) -> dict[int, set[int]]:
        wanted = {layer: set(ids) for layer, ids in experts.items()}
        for layer, ids in wanted.items():
            spec = self.model.layers.get(layer)
            if spec is None:
                raise ValueError(f"layer {layer} has no experts")
            if not all(0 <= expert < spec.num_experts for expert in ids):
                raise ValueError(f"layer {layer} has experts 0 to {spec.num_experts - 1} only")
        return wanted

    def _told(self, term: int, epoch: int) -> None:
        if term and term < self.term:
            raise Fenced(f"term {term} was replaced by term {self.term}")
        if term:
            self.term, self.epoch = max((self.term, self.epoch), (term, epoch))
            if self.tables is not None:
                self.tables.set_epoch(self.epoch)

    def _missing(self, layer: int, ids: Iterable[int]) -> list[int]:
        held = self._layers.get(layer)
        return sorted(set(ids) - (set(held.digests) if held else set()))

    def _require_room(self, needed: int) -> None:
        lacking = self.held_bytes + needed - self.capacity_bytes
        if lacking > 0:
            raise NoRoom(
                f"{needed:,} bytes of experts do not fit: {lacking:,} bytes are missing "
                f"({self.held_bytes:,} of {self.capacity_bytes:,} are taken). Add memory or workers."
            )

    def _load(self, index: int, ids: list[int]) -> tuple[Held, ...]:
        """Read, digest and serve experts of one layer."""
        self._require_room(len(ids) * self.expert_bytes[index])
        spec = self.model.layers[index]
        weights = {expert: self._reader.read(spec, index, expert) for expert in ids}
        digests = {expert: self._digest(index, expert, tensors) for expert, tensors in weights.items()}
        self._manifest.save()
        old = self._layers.get(index)
        self._replace(index, {**(old.weights if old else {}), **weights}, {**(old.digests if old else {}), **digests})
        return tuple(Held(index, expert, digest) for expert, digest in digests.items())

    def _digest(self, layer: int, expert: int, weights: ExpertWeights) -> bytes:
        digest = self._manifest.get(layer, expert)
        if digest is None:
            digest = digest_of(weights)
            self._manifest.put(layer, expert, digest)
        else:  # nobody has read the weights yet, and rows shall not wait for the disk
            self._reader.prefetch(self.model.layers[layer], layer, expert)
        return digest

    def _replace(self, index: int, weights: Mapping[int, ExpertWeights], digests: Mapping[int, bytes]) -> None:
        """Let a layer hold exactly these weights. Readers have the old mapping or the new one, and never wait."""
        layers = {layer: held for layer, held in self._layers.items() if layer != index}
        spec = self.model.layers[index]
        sizes = {"hidden_size": spec.hidden_size, "intermediate_size": spec.intermediate_size}
        table = kernels.ExpertTable(weights, spec.num_experts, dtype=self.dtype, **sizes)
        if weights:
            layers[index] = _Layer(weights, {expert: digests[expert] for expert in weights}, table)
        self._layers = layers
        if self.tables is not None:
            self.tables.set(index, table)
