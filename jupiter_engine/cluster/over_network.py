"""Groups over the ordinary network that all their nodes share: rings of MLX, and all groups of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jupiter_engine.cluster import hostfile as hosts
from jupiter_engine.cluster.ethernet import Shared, shared_network
from jupiter_engine.cluster.group import Group, cable_links, failed, noted, speed_text
from jupiter_engine.protocol.fleet import GroupPlan, Link


def ethernet_ring(group: Group, cause: str) -> GroupPlan:
    shared, refused = shared_network(group.machines, thunderbolt=False)
    if shared is None:
        return failed(group, "ring", no_shared(group), *refused, reason=f"{cause}.", links=cable_links(group))
    entries = [
        hosts.Entry(ssh=machine.ssh, addresses=(seat.address,))
        for machine, seat in zip(group.machines, shared.seats, strict=True)
    ]
    return GroupPlan(
        name=group.name,
        nodes=group.names(range(len(group.machines))),
        twin=group.twin,
        backend="ring",
        launcher=group.launcher,
        links=_shared_links(group, shared),
        reason=noted(group, f"ring over {_medium(shared)}: {cause}."),
        hostfile=hosts.hostfile("ring", entries, ranks_per_node=group.ranks_per_node),
    )


def torch_group(group: Group, wanted: str, over: Literal["auto", "thunderbolt", "ethernet"]) -> GroupPlan:
    """torch ranks call each other directly, so only a network that all share will do."""
    cards = [machine.cards for machine in group.machines]
    backend: Literal["gloo", "nccl"] = "nccl" if wanted == "nccl" or (wanted == "auto" and all(cards)) else "gloo"
    problems: list[str] = []
    if wanted in ("ring", "jaccl", "jaccl-ring"):
        problems.append(f"{wanted} is a backend of MLX; groups of torch take gloo or nccl.")
    if backend == "nccl":
        problems += [
            f"nccl needs an NVIDIA card for each rank: {machine.name} has {machine.cards} for {group.ranks_per_node}."
            for machine in group.machines
            if machine.cards < group.ranks_per_node
        ]
    if len({machine.mac for machine in group.machines}) > 1:
        problems.append(
            "torch's gloo cannot connect a Mac with a Linux machine (they write addresses differently); "
            "make two groups of them."
        )
    why = "all nodes have NVIDIA cards" if backend == "nccl" else "not every node has an NVIDIA card"
    if wanted == backend:
        why = "it is asked for"
    if len(group.machines) == 1:
        return _plan(group, backend, (), f"{backend} on {group.machines[0].name} itself: {why}.", problems)
    shared, refused = shared_network(group.machines, thunderbolt=over != "ethernet")
    if shared is None:
        return failed(group, backend, *problems, no_shared(group), *refused)
    if over == "thunderbolt" and shared.kind != "thunderbolt":
        problems.append("The nodes share no network over Thunderbolt; torch ranks need one that reaches all of them.")
    links = _shared_links(group, shared)
    return _plan(group, backend, links, f"{backend} over {_medium(shared)}: {why}.", problems)


def _plan(
    group: Group, backend: Literal["gloo", "nccl"], links: tuple[Link, ...], reason: str, problems: Sequence[str]
) -> GroupPlan:
    return GroupPlan(
        name=group.name,
        nodes=group.names(range(len(group.machines))),
        twin=group.twin,
        backend=backend,
        launcher=group.launcher,
        links=links,
        reason=noted(group, reason),
        problems=tuple(problems),
    )


def _shared_links(group: Group, shared: Shared) -> tuple[Link, ...]:
    """Each node with the next, and the last with the first: the ring's own ways."""
    count = len(group.machines)
    pairs = [(i, (i + 1) % count) for i in range(count if count > 2 else 1)]
    links: list[Link] = []
    for i, j in pairs:
        one, other = shared.seats[i], shared.seats[j]
        speeds = [seat.speed_bits_per_s for seat in (one, other) if seat.speed_bits_per_s is not None]
        kinds = {one.kind, other.kind}
        links.append(
            Link(
                a=group.machines[i].name,
                b=group.machines[j].name,
                kind="wifi" if "wifi" in kinds else "thunderbolt" if kinds == {"thunderbolt"} else "ethernet",
                a_interface=one.interface,
                b_interface=other.interface,
                a_address=one.address,
                b_address=other.address,
                speed_bits_per_s=min(speeds) if speeds else None,
            )
        )
    return tuple(links)


def _medium(shared: Shared) -> str:
    names = {"wifi": "Wi-Fi", "thunderbolt": "Thunderbolt", "loopback": "the loopback of this machine"}
    name = names.get(shared.kind, "Ethernet")
    speed = f", {speed_text(shared.speed_bits_per_s)}" if shared.speed_bits_per_s is not None else ""
    return f"{name} ({shared.network}{speed})"


def no_shared(group: Group) -> str:
    """Which networks each node is on, as a reason why there is none for all."""
    parts = []
    for machine in group.machines:
        own = [
            text for one in machine.interfaces if one.kind in ("ethernet", "wifi", "bridge") for text in one.addresses
        ]
        parts.append(f"{machine.name} is {', '.join(own[:3]) or 'nowhere'}")
    return f"No network is shared by all nodes ({'; '.join(parts)}): connect them to one switch or Wi-Fi."
