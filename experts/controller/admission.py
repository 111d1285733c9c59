"""Which workers may be in a pool: those whose rows are the same as everybody's."""

from __future__ import annotations

from collections.abc import Mapping

from barista.placement import ExpertKey
from experts.controller.member import Description, Member
from experts.controller.picture import Picture


def refusal(pool: Picture, member: Member, description: Description) -> str:
    """Why the worker cannot be in this pool; empty if it can."""
    if member.fault:
        return member.fault
    if description.model_digest != pool.settings.model_digest:
        return (
            f"It has another checkpoint (digest {description.model_digest.hex()}, the pool's is "
            f"{pool.settings.model_digest.hex()}). Put the same model at the same path on its node."
        )
    first = next((other for other in pool.live if other is not member), None)
    if first is not None and description.protocol_version != first.protocol_version:
        return (
            f"It speaks version {description.protocol_version} of the protocol and {first.name} speaks "
            f"{first.protocol_version}. Install the same Barista on every node."
        )
    if first is not None and description.numerics_id != first.numerics_id:
        return (
            f"Its rows would differ from those of {first.name}: {description.numerics_id} is not "
            f"{first.numerics_id}. Use nodes with the same instruction set and the same Barista."
        )
    return wrong_digest(pool, description.held)


def wrong_digest(pool: Picture, digests: Mapping[ExpertKey, bytes]) -> str:
    """Why these replicas, by their digests, are none of this pool's; empty if they are."""
    for (layer, expert), digest in digests.items():
        known = pool.placement.digests.get((layer, expert), digest)
        if known != digest:
            return (
                f"It holds other weights as expert {expert} of layer {layer} (digest {digest.hex()}, the pool's is "
                f"{known.hex()}). Put the same model at the same path on its node."
            )
    return ""
