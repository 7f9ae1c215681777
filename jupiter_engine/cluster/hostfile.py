"""Host files: how `mlx.launch --hostfile` and Jupiter's own launcher learn where the ranks are and how they talk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from jupiter_engine.protocol.fleet import GroupPlan

RING_BACKENDS: Final = ("ring",)
RDMA_BACKENDS: Final = ("jaccl", "jaccl-ring")

Rdma = str | tuple[str, ...] | None
"""RDMA device(s) towards one host; None towards itself and, in a ring, towards those that are no neighbours."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One machine of a host file."""

    ssh: str
    addresses: tuple[str, ...]
    rdma: tuple[Rdma, ...] = ()


def hostfile(
    backend: str, entries: Sequence[Entry], *, ranks_per_node: int = 1, envs: Sequence[str] = ()
) -> dict[str, Any]:
    """As MLX's own parser takes it: one host a rank, so a machine of several ranks stands several times.

    `envs` are NAME=VALUE. Raises ValueError for what mlx.launch would refuse or, worse, take: an empty name,
    a ring host without an address, RDMA lists that do not fit together.
    """
    check(backend, entries, ranks_per_node=ranks_per_node)
    hosts = [
        {
            "ssh": entry.ssh,
            "ips": list(entry.addresses),
            "rdma": [list(one) if isinstance(one, tuple) else one for one in entry.rdma],
        }
        for entry in entries
        for _ in range(ranks_per_node)
    ]
    return {"backend": backend, "envs": list(envs), "hosts": hosts}


def check(backend: str, entries: Sequence[Entry], *, ranks_per_node: int = 1) -> None:
    """ValueError with the first thing that is wrong."""
    if not entries:
        raise ValueError("a host file needs at least one host")
    if any(not entry.ssh or entry.ssh.startswith("-") for entry in entries):
        raise ValueError("a host's ssh name is empty or begins like an option")
    if backend in RING_BACKENDS:
        lacking = [entry.ssh for entry in entries if not entry.addresses]
        if lacking:
            raise ValueError(f"{', '.join(lacking)} has no address for the ring")
        if len({len(entry.addresses) for entry in entries}) > 1:
            raise ValueError("all hosts of a ring need the same number of addresses")
    elif backend in RDMA_BACKENDS:
        if ranks_per_node != 1:
            raise ValueError(f"{backend} takes one rank a machine, not {ranks_per_node}")
        if not entries[0].addresses:
            raise ValueError(f"{entries[0].ssh} has no address at which the others meet it")
        _check_rdma(backend, entries)
    else:
        raise ValueError(f"mlx.launch has no host file for {backend}")


def _check_rdma(backend: str, entries: Sequence[Entry]) -> None:
    count = len(entries)
    for i, entry in enumerate(entries):
        if len(entry.rdma) != count:
            raise ValueError(f"{entry.ssh} lists {len(entry.rdma)} RDMA devices for {count} hosts")
        if entry.rdma[i] is not None:
            raise ValueError(f"{entry.ssh} has an RDMA device towards itself")
        neighbours = {(i - 1) % count, (i + 1) % count} if backend == "jaccl-ring" else set(range(count))
        for j in sorted(neighbours - {i}):
            if not entry.rdma[j]:
                raise ValueError(f"{entry.ssh} has no RDMA device towards {entries[j].ssh}")


def for_leader(found: dict[str, Any]) -> dict[str, Any]:
    """The host file as the first host runs it: mlx.launch starts `127.0.0.1` itself and everything else by ssh."""
    hosts = [dict(host) for host in found["hosts"]]
    first = hosts[0]["ssh"]
    for host in hosts:
        if host["ssh"] == first:
            host["ssh"] = "127.0.0.1"
    return {**found, "hosts": hosts}


def node_addresses(plan: GroupPlan) -> dict[str, tuple[str, ...]]:
    """Each node's own addresses for the ranks' connections, by name; for torch groups from the plan's links."""
    if plan.hostfile:
        step = max(1, len(plan.hostfile["hosts"]) // max(1, len(plan.nodes)))
        return {name: tuple(plan.hostfile["hosts"][i * step]["ips"]) for i, name in enumerate(plan.nodes)}
    found: dict[str, tuple[str, ...]] = {}
    for link in plan.links:
        for name, address in ((link.a, link.a_address), (link.b, link.b_address)):
            if address:
                found.setdefault(name, (address,))
    return found


def node_rdma(plan: GroupPlan) -> dict[str, tuple[Rdma, ...]]:
    """Each node's RDMA devices towards each node in rank order, by name; empty unless the backend is a jaccl."""
    if plan.backend not in RDMA_BACKENDS or not plan.hostfile:
        return {}
    return {
        name: tuple(tuple(one) if isinstance(one, list) else one for one in host["rdma"])
        for name, host in zip(plan.nodes, plan.hostfile["hosts"], strict=True)
    }


def node_interfaces(plan: GroupPlan) -> dict[str, str]:
    """Each node's interface for the ranks' connections, as GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME take it."""
    found: dict[str, str] = {}
    for link in plan.links:
        for name, interface in ((link.a, link.a_interface), (link.b, link.b_interface)):
            if interface:
                found.setdefault(name, interface)
    return found
