"""Which connections a set of NetworkPolicies lets through. Pure, and small: labels by equality, ports by number."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Peer:
    """An end of a connection: a pod with labels in a namespace, or, with none, an address outside of the cluster."""

    labels: Mapping[str, str] = field(default_factory=dict)
    namespace: str = ""
    address: str = ""


def allowed(policies: Iterable[dict[str, Any]], source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether `source` may connect to `port` of `target`: both ends must let it through."""
    policies = list(policies)
    return all(
        lets_through(policies, end, other, direction, port, protocol)
        for end, other, direction in ((source, target, "egress"), (target, source, "ingress"))
    )


def lets_through(
    policies: list[dict[str, Any]], end: Peer, other: Peer, direction: str, port: int, protocol: str = "TCP"
) -> bool:
    """One side of it: whether `end` may send to `other`, "egress", or be reached by it, "ingress"."""
    mine = [
        policy
        for policy in policies
        if policy["metadata"]["namespace"] == end.namespace
        and _selects(policy["spec"]["podSelector"], end.labels)
        and direction.capitalize() in policy["spec"]["policyTypes"]
    ]
    if not mine:
        return True  # a pod that no policy of this direction selects is open
    side = "to" if direction == "egress" else "from"
    return any(
        _matches_any(rule.get(side) or [], other, policy["metadata"]["namespace"])
        and _has_port(rule.get("ports") or [], port, protocol)
        for policy in mine
        for rule in policy["spec"].get(direction) or []
    )


def _matches_any(peers: list[dict[str, Any]], other: Peer, namespace: str) -> bool:
    """No peers mean everyone."""
    return not peers or any(_matches(peer, other, namespace) for peer in peers)


def _matches(peer: dict[str, Any], other: Peer, namespace: str) -> bool:
    if "ipBlock" in peer:
        block = peer["ipBlock"]
        return (
            bool(other.address)
            and _within(other.address, block["cidr"])
            and not any(_within(other.address, hole) for hole in block.get("except", []))
        )
    if not other.namespace:
        return False
    if "namespaceSelector" in peer:
        here = _selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": other.namespace})
    else:
        here = other.namespace == namespace
    return here and _selects(peer.get("podSelector", {}), other.labels)


def _selects(selector: dict[str, Any], labels: Mapping[str, str]) -> bool:
    assert not selector.keys() - {"matchLabels"}, "this evaluator knows matchLabels only"
    wanted: dict[str, str] = selector.get("matchLabels", {})
    return wanted.items() <= labels.items()


def _within(address: str, cidr: str) -> bool:
    return ipaddress.ip_address(address) in ipaddress.ip_network(cidr)


def _has_port(ports: list[dict[str, Any]], port: int, protocol: str) -> bool:
    """No ports mean all of them."""
    wanted = port, protocol
    return not ports or any(wanted == (p.get("port", port), p.get("protocol", "TCP")) for p in ports)
