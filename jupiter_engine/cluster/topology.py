"""From what the nodes' tools said to how a group of them is launched, with a reason for each choice.

For MLX groups the rules are those of `mlx.distributed_config`: RDMA and a full mesh of Thunderbolt cables is jaccl,
RDMA and a ring is jaccl-ring, a ring without RDMA is ring; and where there is less, ring over the network that all
nodes share. What differs from MLX, always towards what works: cables behind hubs count, RDMA counts only where
the hardware can do it (Thunderbolt 4 cannot, whatever its devices say), and addresses collide with no route.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jupiter_engine.cluster import hostfile as hosts
from jupiter_engine.cluster.cables import connectivity, find_cables, find_ring, missing_for_mesh
from jupiter_engine.cluster.group import Group, Launcher, cable_link, cable_links, failed, joined
from jupiter_engine.cluster.machine import NodeTools, read_machine
from jupiter_engine.cluster.over_cables import against_mesh, against_rdma, no_ring, over_cables
from jupiter_engine.cluster.over_network import ethernet_ring, torch_group
from jupiter_engine.protocol.fleet import GroupPlan, Link
from jupiter_engine.protocol.specs import Twin

__all__ = ["NodeTools", "fleet_links", "plan_group"]

Wanted = Literal["auto", "ring", "jaccl", "jaccl-ring"]


def plan_group(
    name: str,
    nodes: Sequence[NodeTools],
    *,
    twin: Twin,
    backend: Literal["auto", "ring", "jaccl", "jaccl-ring", "gloo", "nccl"] = "auto",
    over: Literal["auto", "thunderbolt", "ethernet"] = "auto",
    launcher: Literal["auto", "in_process", "torchrun", "mlx.launch", "direct"] = "auto",
    ranks_per_node: int = 1,
) -> GroupPlan:
    """How these nodes (the one that leads first) would be launched as one group.

    Never raises for what a node's tools said: a plan that cannot be launched has `problems`.
    """
    machines = tuple(read_machine(node) for node in nodes)
    cables = find_cables(machines)
    group = Group(
        name=name,
        machines=machines,
        cables=cables,
        matrix=connectivity(len(machines), cables),
        twin=twin,
        launcher=_launcher(twin, launcher, len(machines) * ranks_per_node),
        ranks_per_node=ranks_per_node,
    )
    if twin == "torch":
        return torch_group(group, backend, over)
    if backend == "gloo" or backend == "nccl":
        return failed(group, "ring", f"{backend} is a backend of torch; groups of MLX take ring, jaccl or jaccl-ring.")
    if len(machines) == 1:
        return _alone(group, backend)
    if over == "ethernet":
        if backend == "jaccl" or backend == "jaccl-ring":
            return failed(group, backend, f"{backend} is RDMA over Thunderbolt; it does not go over Ethernet.")
        return ethernet_ring(group, "Ethernet is asked for")
    return _choose(group, backend, over)


def fleet_links(nodes: Sequence[NodeTools]) -> tuple[Link, ...]:
    """Every Thunderbolt cable between these nodes, whatever a group would use."""
    machines = tuple(read_machine(node) for node in nodes)
    return tuple(cable_link(cable, None, machines, rdma=False) for cable in find_cables(machines))


def _launcher(twin: Twin, asked: Literal["auto"] | Launcher, ranks: int) -> Launcher:
    if asked != "auto":
        return asked
    if ranks == 1:
        return "in_process"
    return "torchrun" if twin == "torch" else "mlx.launch"


def _alone(group: Group, wanted: Wanted) -> GroupPlan:
    machine = group.machines[0]
    if wanted == "jaccl" or wanted == "jaccl-ring":
        return failed(group, wanted, f"{wanted} connects several Macs; {machine.name} is alone in {group.name}.")
    entries = [hosts.Entry(ssh="127.0.0.1", addresses=("127.0.0.1",))]
    return GroupPlan(
        name=group.name,
        nodes=(machine.name,),
        twin=group.twin,
        backend="ring",
        launcher=group.launcher,
        reason=f"ring on {machine.name} itself: it is the only node.",
        hostfile=hosts.hostfile("ring", entries, ranks_per_node=group.ranks_per_node),
    )


def _choose(group: Group, wanted: Wanted, over: Literal["auto", "thunderbolt"]) -> GroupPlan:
    """The choice by MLX's rules; what stands in its way becomes the reason for less, or a problem."""
    ring = find_ring(group.matrix)
    gaps = missing_for_mesh(group.matrix)
    every = list(range(len(group.machines)))
    against = against_rdma(group)
    mesh_blocks = [*against, *against_mesh(group, gaps)]
    ring_blocks = [*against, *([] if ring else [no_ring(group)])]
    if wanted == "jaccl" or (wanted == "auto" and not mesh_blocks):
        if mesh_blocks:
            return failed(group, "jaccl", *mesh_blocks, links=cable_links(group))
        cause = "every Mac has a Thunderbolt 5 cable to every other, and RDMA is on"
        return over_cables(group, "jaccl", every, cause)
    if wanted == "jaccl-ring" or (wanted == "auto" and not ring_blocks):
        if ring is None or ring_blocks:
            return failed(group, "jaccl-ring", *ring_blocks, links=cable_links(group))
        cause = f"RDMA is on and the cables form a ring, but not a mesh ({joined(against_mesh(group, gaps))})"
        if wanted == "jaccl-ring":
            cause = "RDMA is on and the cables form a ring"
        return over_cables(group, "jaccl-ring", ring, cause)
    if ring is not None:
        cause = "a Thunderbolt cable connects them" if len(ring) == 2 else "the Thunderbolt cables form a ring"
        if wanted == "auto":
            cause += f"; RDMA cannot be used: {joined(against)}"
        return over_cables(group, "ring", ring, cause)
    if over == "thunderbolt":
        return failed(group, "ring", no_ring(group), links=cable_links(group))
    return ethernet_ring(group, joined([no_ring(group)]))
