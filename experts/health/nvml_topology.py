"""Reads which GPUs of a node are connected with which others."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

from experts.health.nvml import Gpu, Nvml, Unreachable
from experts.health.topology import Peer, Topology

P2P_READ = 0  # NVML_P2P_CAPS_INDEX_READ, which nvidia-ml-py has as a tuple by mistake

Address = tuple[int, int, int]
"""PCI domain, bus, device."""


def read_topology(nvml: Nvml) -> Topology:
    """The GPUs that answer, and how they are connected."""
    ends = {}
    for gpu in nvml.gpus:
        if gpu.device is not None:
            try:
                ends[gpu.index] = gpu, _address(nvml.ask(gpu.device, "nvmlDeviceGetPciInfo")), _remotes(nvml, gpu)
            except Unreachable:
                continue
    peers = {}
    for low, high in combinations(sorted(ends), 2):
        try:
            peers[low, high] = _peer(nvml, ends[low], ends[high])
        except Unreachable:
            continue
    return Topology(tuple(sorted(ends)), peers)


@dataclass(frozen=True, slots=True)
class _Remotes:
    """Where a GPU's active NVLinks go: to these addresses of GPUs, and so many to switches."""

    gpus: tuple[Address, ...]
    switches: int


_End = tuple[Gpu, Address | None, _Remotes]


def _peer(nvml: Nvml, first: _End, second: _End) -> Peer:
    """Links to a switch count where the driver says that the two reach each other by NVLink."""

    def can(capability: int) -> bool | None:
        status = nvml.ask(first[0].device, "nvmlDeviceGetP2PStatus", second[0].device, capability)
        return None if status is None else status == nvml.library.NVML_P2P_STATUS_OK

    direct = first[2].gpus.count(second[1]) if second[1] is not None else 0
    switched = min(first[2].switches, second[2].switches) if can(nvml.library.NVML_P2P_CAPS_INDEX_NVLINK) else 0
    return Peer(direct + switched, can(P2P_READ))


def _remotes(nvml: Nvml, gpu: Gpu) -> _Remotes:
    gpus, switches = [], 0
    for link in range(nvml.library.NVML_NVLINK_MAX_LINKS):
        active = nvml.ask(gpu.device, "nvmlDeviceGetNvLinkState", link)
        if active is None:
            break
        kind = nvml.ask(gpu.device, "nvmlDeviceGetNvLinkRemoteDeviceType", link) if active else None
        if kind == nvml.library.NVML_NVLINK_DEVICE_TYPE_SWITCH:
            switches += 1
        elif active:
            remote = _address(nvml.ask(gpu.device, "nvmlDeviceGetNvLinkRemotePciInfo", link))
            gpus += [] if remote is None else [remote]
    return _Remotes(tuple(gpus), switches)


def _address(pci: Any) -> Address | None:
    return None if pci is None else (pci.domain, pci.bus, pci.device)
