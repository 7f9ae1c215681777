"""Groups of MLX over Thunderbolt cables: what stands against RDMA, a mesh or a ring, and the plan over the cables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from jupiter_engine.cluster import hostfile as hosts
from jupiter_engine.cluster.addressing import Ends, assign, setup
from jupiter_engine.cluster.cables import Cable, between, find_chain
from jupiter_engine.cluster.ethernet import Shared, shared_network
from jupiter_engine.cluster.group import Group, cable_link, noted, pair, speed_text
from jupiter_engine.cluster.machine import RDMA_ABOVE_BITS_PER_S, RDMA_SINCE, Machine
from jupiter_engine.cluster.over_network import no_shared
from jupiter_engine.cluster.readers.thunderbolt import macos_version
from jupiter_engine.protocol.fleet import Fix, GroupPlan

MESH_NODES = 8
"""MESH_MAX_PEERS of MLX's JACCL."""
RDMA_RING_CABLES = 4
"""RING_MAX_CONNS of MLX's JACCL: cables between two neighbours."""
RDMA_CONNECTIONS = 10
"""Queue pairs of one RDMA device of a Mac; the next one fails with EBUSY."""


# -- what stands against it ----------------------------------------------------------------------------
def against_rdma(group: Group) -> list[str]:
    """Why RDMA cannot be used between all of these Macs; sentences with what to do, empty if it can."""
    found: list[str] = []
    slow: dict[str, list[str]] = {}
    if group.ranks_per_node != 1:
        found.append(f"RDMA takes one rank a Mac, not {group.ranks_per_node}.")
    for i, machine in enumerate(group.machines):
        mine = [cable for cable in group.cables if i in (cable.a, cable.b)]
        if not machine.mac:
            found.append(f"{machine.name} is no Mac; RDMA over Thunderbolt is for Macs only.")
        elif not mine:
            found.append(f"{machine.name} has no Thunderbolt cable to another node of the group.")
        elif all(_too_slow(cable) for cable in mine):
            slow.setdefault(speed_text(mine[0].speed_bits_per_s), []).append(machine.name)
        else:
            found += _of_software(machine, i, mine)
    found += [
        f"The Thunderbolt cables of {', '.join(names)} run at {speed}; RDMA needs Thunderbolt 5 (80 Gb/s) in both Macs "
        "and in the cable."
        for speed, names in slow.items()
    ]
    return found


def _of_software(machine: Machine, node: int, cables: Sequence[Cable]) -> list[str]:
    """The software's part: macOS, the switch in Recovery, the devices."""
    version = macos_version(machine.macos)
    if version is not None and version < RDMA_SINCE:
        return [f"{machine.name} has macOS {machine.macos}; RDMA needs {RDMA_SINCE[0]}.{RDMA_SINCE[1]}: update it."]
    if machine.rdma_switch == "enabled" and not machine.rdma_devices:
        return [f"RDMA is switched on for {machine.name}, but ibv_devices lists nothing; restart it."]
    if machine.rdma_switch == "disabled" or not machine.rdma_devices:
        return [
            f"RDMA is off on {machine.name}: start it in Recovery (hold the power button), open the Terminal there, "
            "type `rdma_ctl enable`, and restart."
        ]
    found: list[str] = []
    for cable in cables:
        interface = cable.interface(node)
        device = f"rdma_{interface}"
        if _too_slow(cable):
            found.append(
                f"A cable of {machine.name} ({interface}) runs at {speed_text(cable.speed_bits_per_s)}, not 80 Gb/s."
            )
        elif device not in machine.rdma_devices:
            found.append(f"ibv_devices of {machine.name} has no {device}, although a cable is there.")
        elif device in machine.rdma_down:
            found.append(f"The port of {device} on {machine.name} is down; restart both Macs of that cable.")
    return found


def _too_slow(cable: Cable) -> bool:
    return cable.speed_bits_per_s is not None and cable.speed_bits_per_s <= RDMA_ABOVE_BITS_PER_S


def against_mesh(group: Group, gaps: Sequence[tuple[int, int]]) -> list[str]:
    found = [f"no Thunderbolt cable between {pair(group, i, j)}" for i, j in gaps]
    if found:
        return [f"There is {' and '.join(found[:3])}{' and more' if len(found) > 3 else ''}."]
    if len(group.machines) > MESH_NODES:
        return [f"A jaccl mesh takes at most {MESH_NODES} Macs, the group has {len(group.machines)}; use jaccl-ring."]
    uses = Counter((node, cable.interface(node)) for cable in group.cables for node in (cable.a, cable.b))
    for (node, interface), count in uses.items():
        if count > RDMA_CONNECTIONS:
            text = f"rdma_{interface} of {group.machines[node].name} would need {count} connections"
            return [f"{text}; it has {RDMA_CONNECTIONS}."]
    return []


def no_ring(group: Group) -> str:
    """Why the cables form no ring, and which cable would close it."""
    bare = [group.machines[i].name for i, row in enumerate(group.matrix) if not any(row)]
    if len(bare) == len(group.machines):
        return "No Thunderbolt cable between two nodes of the group was found."
    chain = find_chain(group.matrix)
    if chain is not None:
        return (
            f"The Thunderbolt cables form no ring: one between {pair(group, chain[-1], chain[0])} is missing "
            f"(there is {' - '.join(group.names(chain))})."
        )
    if bare:
        return f"The Thunderbolt cables form no ring: {', '.join(bare)} has none to the others."
    single = [group.machines[i].name for i, row in enumerate(group.matrix) if sum(1 for count in row if count) == 1]
    what = f"{', '.join(single)} needs a second one" if single else "their order allows none"
    return f"The Thunderbolt cables form no ring: {what}."


# -- the plan ------------------------------------------------------------------------------------------
def over_cables(
    group: Group, backend: Literal["ring", "jaccl", "jaccl-ring"], order: list[int], cause: str
) -> GroupPlan:
    """The plan of a group whose ranks talk over Thunderbolt cables, in rank order `order`."""
    used, ends, problems = _used_cables(group, backend, order)
    machines = group.machines
    wide = len(used[order[0], order[1]])
    flat = list(dict.fromkeys(cable for several in used.values() for cable in several))
    speed = speed_text(_slowest(flat)) + (f", {wide} cables a pair" if wide > 1 else "")
    commands: tuple[Fix, ...] = ()
    if len(ends) == len(flat):
        commands = setup(flat, [ends[cable] for cable in flat], machines)
        problems += _to_set_up(commands, machines)
    meeting, refused = (None, ()) if backend == "ring" else shared_network(machines, thunderbolt=False)
    if backend != "ring" and meeting is None:
        problems += [f"{no_shared(group)} jaccl needs one to meet at before it uses RDMA.", *refused]
    entries = [_entry(group, backend, order, place, used, ends, meeting) for place in range(len(order))]
    complete = len(ends) == len(flat) and (backend == "ring" or meeting is not None)
    ranks = group.ranks_per_node
    return GroupPlan(
        name=group.name,
        nodes=group.names(order),
        twin=group.twin,
        backend=backend,
        launcher=group.launcher,
        links=tuple(cable_link(cable, ends.get(cable), machines, rdma=backend != "ring") for cable in flat),
        reason=noted(group, f"{backend} over Thunderbolt ({speed}): {cause}."),
        hostfile=hosts.hostfile(backend, entries, ranks_per_node=ranks) if complete else {},
        setup=commands,
        problems=tuple(problems),
    )


def _used_cables(
    group: Group, backend: str, order: Sequence[int]
) -> tuple[dict[tuple[int, int], list[Cable]], dict[Cable, Ends], list[str]]:
    """(cables by neighbouring pair in both directions, their addresses, problems)."""
    count = len(order)
    pairs = [(i, j) for i in order for j in order if i < j]
    if backend != "jaccl":
        pairs = [(order[k], order[(k + 1) % count]) for k in range(count)]
    several = min(len(between(group.cables, i, j)) for i, j in pairs)
    if backend == "jaccl-ring":
        several = min(several, RDMA_RING_CABLES)
    used: dict[tuple[int, int], list[Cable]] = {}
    for i, j in pairs:
        used[i, j] = used[j, i] = between(group.cables, i, j)[:several]
    flat = list(dict.fromkeys(cable for cables in used.values() for cable in cables))
    ends = {cable: two for cable, two in zip(flat, assign(flat, group.machines), strict=True) if two is not None}
    lost = [cable for cable in flat if cable not in ends]
    problems = [
        f"No free network is left for the cable between {pair(group, cable.a, cable.b)}: the nodes' routes cover all "
        "private addresses; end the VPN that claims them."
        for cable in lost
    ]
    return used, ends, problems


def _to_set_up(commands: Sequence[Fix], machines: Sequence[Machine]) -> list[str]:
    """Sentences on what is not up yet."""
    open_at = list(dict.fromkeys(fix.node for fix in commands))
    if not open_at:
        return []
    bridged = [
        machine.name
        for machine in machines
        if any(fix.node == machine.name and fix.argv[1:] == ("ifconfig", machine.bridge, "down") for fix in commands)
    ]
    found = []
    if bridged:
        found.append(
            f"The Thunderbolt Bridge is up on {', '.join(bridged)}: cables in a bridge cannot have addresses of their "
            "own; bring it down."
        )
    text = (
        f"The addresses of the Thunderbolt cables are not set up on {', '.join(open_at)}; run the plan's set-up there, "
        "or write `over: ethernet` for the group."
    )
    return [*found, text]


def _entry(
    group: Group,
    backend: str,
    order: Sequence[int],
    place: int,
    used: dict[tuple[int, int], list[Cable]],
    ends: dict[Cable, Ends],
    meeting: Shared | None,
) -> hosts.Entry:
    """One host: in a ring the addresses on its cables to the previous one, with RDMA its devices towards each."""
    node, previous = order[place], order[place - 1]
    ssh = group.machines[node].ssh
    if backend == "ring":
        # A rank listens on its own addresses and is called by the rank before it.
        cables = used[node, previous]
        return hosts.Entry(ssh=ssh, addresses=tuple(ends[one].address(one, node) for one in cables if one in ends))
    rdma: list[hosts.Rdma] = []
    for other in order:
        devices = tuple(f"rdma_{one.interface(node)}" for one in used.get((node, other), ()))
        rdma.append(None if not devices else devices[0] if len(devices) == 1 else devices)
    address = (meeting.seats[node].address,) if meeting else ()
    return hosts.Entry(ssh=ssh, addresses=address, rdma=tuple(rdma))


def _slowest(cables: Sequence[Cable]) -> int | None:
    return min((cable.speed_bits_per_s for cable in cables if cable.speed_bits_per_s is not None), default=None)
