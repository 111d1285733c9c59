"""An ExpertModel's experts in a group: dealt out by the engine, loaded by each worker from the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from barista.errors import ConfigError
from experts.expert_model import ExpertModel
from experts.link import RowsStatus
from experts.numerics import numerics_id
from experts.transport.dist import ExpertRows
from experts.transport.dist_agreement import Agreement
from experts.transport.dist_rendezvous import Load
from experts.worker.store import ExpertStore, NoRoom


def deal(model: ExpertModel, members: Sequence[str], *, way: str = "all_to_all", timeout: float = 10.0) -> Agreement:
    """Each layer's experts to the members in turn. Raises ConfigError as Agreement."""
    return Agreement(
        members=tuple(members),
        hidden_size=model.hidden_size,
        dtype=model.dtype,
        owners={
            layer: tuple(1 + expert % max(1, len(members)) for expert in range(spec.num_experts))
            for layer, spec in model.layers.items()
        },
        numerics_id=numerics_id(getattr(torch, model.dtype), model.format),
        digest=model.digest.hex(),
        way=way,
        timeout=timeout,
    )


def loader(store: ExpertStore) -> Load:
    """What a worker does for each group: let its store hold exactly its share, and compute from it."""
    model = store.model
    identity = numerics_id(store.dtype, model.format)

    def load(agreement: Agreement, experts: Mapping[int, tuple[int, ...]]) -> ExpertRows:
        agreement.require(
            hidden_size=model.hidden_size,
            dtype=model.dtype,
            num_experts={layer: spec.num_experts for layer, spec in model.layers.items()},
            numerics_id=identity,
            digest=store.model_digest.hex(),
        )
        others: dict[int, list[int]] = {}
        for held in store.held():
            if held.expert not in experts.get(held.layer, ()):
                others.setdefault(held.layer, []).append(held.expert)
        store.release(others)
        try:
            for _ in store.assign(experts):
                pass
        except NoRoom as error:
            raise ConfigError(str(error)) from error
        return rows

    def rows(layer: int, hidden_states: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        num_pairs = int((topk_ids >= 0).sum())
        out = torch.empty((num_pairs, model.hidden_size), dtype=store.dtype)
        computed = store.compute(layer, hidden_states, topk_ids, out)
        if computed.status is not RowsStatus.OK:
            raise KeyError(f"experts {computed.not_held} are not held")
        return out

    return load
