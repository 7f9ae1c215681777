"""Addresses for Thunderbolt cables: kept where they are set and sane, else new ones that collide with nothing.

MLX numbers its cables from 192.168.0.1 on, which is what half of all home networks use; then packets for the
router go down a cable. Here every network that any node of the group has a route to is left alone.
"""

from __future__ import annotations

import plistlib
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Final

import msgspec

from jupiter_engine.cluster.cables import Cable
from jupiter_engine.cluster.machine import Machine
from jupiter_engine.protocol.fleet import Fix

PREFIX: Final = 30
"""Four addresses, two of them usable: the two ends of one cable."""
NETMASK: Final = "255.255.255.252"
DAEMON: Final = "/Library/LaunchDaemons/jupiter.thunderbolt.plist"
"""Sets the addresses again after a restart of the Mac."""

_POOLS: Final = tuple(
    IPv4Network(text)
    for text in (
        # Private ranges that routers, container engines and VPN programs do not use by default.
        "10.211.0.0/16",
        "10.187.0.0/16",
        "172.30.0.0/16",
        "172.26.0.0/16",
        "192.168.211.0/24",
        # For benchmarks of network devices (RFC 2544): never routed, for networks whose VPN claims all of the above.
        "198.18.0.0/16",
    )
)
_DEFAULT_LIKE: Final = 4
"""A shorter prefix is a default route or one of its halves, which every address lies in."""


class Ends(msgspec.Struct, frozen=True, kw_only=True):
    """The addresses of one cable."""

    a: str
    b: str
    a_set: bool = False
    """Whether the node has it already."""
    b_set: bool = False

    def address(self, cable: Cable, node: int) -> str:
        return self.a if node == cable.a else self.b

    def is_set(self, cable: Cable, node: int) -> bool:
        return self.a_set if node == cable.a else self.b_set


def assign(cables: Sequence[Cable], machines: Sequence[Machine]) -> tuple[Ends | None, ...]:
    """Addresses for each cable; None where no free network is left.

    Two ends that share a network already keep it, and an end that has one keeps its own, as long as no other
    interface of any node has a route there: the same picture gives the same plan.
    """
    used: list[IPv4Network] = []
    ends: dict[int, Ends] = {}
    routed = [_routed(machine) for machine in machines]
    for complete in (True, False):
        for number, cable in enumerate(cables):
            if number in ends:
                continue
            kept = _kept(cable, machines, complete=complete)
            taken = [*_foreign(cable, routed), *used]
            for network, pair in kept:
                if not any(network.overlaps(other) for other in taken):
                    ends[number] = pair
                    used.append(network)
                    break
    for number, cable in enumerate(cables):
        if number not in ends:
            free = _free([*_foreign(cable, routed), *used])
            if free is not None:
                used.append(free)
                ends[number] = Ends(a=str(free[1]), b=str(free[2]))
    return tuple(ends.get(number) for number in range(len(cables)))


def _routed(machine: Machine) -> list[tuple[str, IPv4Network]]:
    """Networks that a node can reach, with the interface: from its routes, and from its own addresses."""
    found = [(route.interface, IPv4Network(route.network)) for route in machine.routes]
    found += [(one.name, IPv4Interface(text).network) for one in machine.interfaces for text in one.addresses]
    return [(name, network) for name, network in found if network.prefixlen >= _DEFAULT_LIKE]


def _foreign(cable: Cable, routed: Sequence[Sequence[tuple[str, IPv4Network]]]) -> list[IPv4Network]:
    """Networks of all nodes but those on the cable's own two interfaces."""
    own = {(cable.a, cable.a_interface), (cable.b, cable.b_interface)}
    return [network for i, found in enumerate(routed) for name, network in found if (i, name) not in own]


def _kept(cable: Cable, machines: Sequence[Machine], *, complete: bool) -> Iterator[tuple[IPv4Network, Ends]]:
    """Networks that the cable's ends have already: both of them, or (not `complete`) one."""
    at_a = machines[cable.a].addresses(cable.a_interface)
    at_b = machines[cable.b].addresses(cable.b_interface)
    if complete:
        for one in at_a:
            for other in at_b:
                if one.network == other.network and one.ip != other.ip and one.network.prefixlen <= PREFIX:
                    yield one.network, Ends(a=str(one.ip), b=str(other.ip), a_set=True, b_set=True)
        return
    for one in at_a:
        rest = _other(one)
        if rest is not None:
            yield one.network, Ends(a=str(one.ip), b=str(rest), a_set=True)
    for one in at_b:
        rest = _other(one)
        if rest is not None:
            yield one.network, Ends(a=str(rest), b=str(one.ip), b_set=True)


def _other(one: IPv4Interface) -> IPv4Address | None:
    """The second usable address of a network of two."""
    hosts = list(one.network.hosts()) if one.network.prefixlen == PREFIX else []
    return next((host for host in hosts if host != one.ip), None) if one.ip in hosts else None


def _free(taken: Sequence[IPv4Network]) -> IPv4Network | None:
    for pool in _POOLS:
        inside = [network for network in taken if network.overlaps(pool)]
        if any(pool.subnet_of(network) for network in inside):
            continue
        for network in pool.subnets(new_prefix=PREFIX):
            if not any(network.overlaps(other) for other in inside):
                return network
    return None


# -- bringing them up ----------------------------------------------------------------------------------
def setup(cables: Sequence[Cable], ends: Sequence[Ends], machines: Sequence[Machine]) -> tuple[Fix, ...]:
    """The commands that are still needed, in order, node by node: what MLX's own set-up does (sudo, so none is safe).

    The last one of each node makes it last: macOS forgets what `ifconfig` set when it restarts.
    """
    fixes: list[Fix] = []
    for node, machine in enumerate(machines):
        mine = [(cable, pair) for cable, pair in zip(cables, ends, strict=True) if node in (cable.a, cable.b)]
        commands = list(_commands(node, mine, machine))
        fixes += [Fix(text=text, argv=("sudo", *argv), node=machine.name) for text, argv in commands]
        if commands:
            lasting = [argv for _, argv in _all_commands(node, mine, machine)]
            fixes.append(_lasting(machine.name, lasting))
    return tuple(fixes)


def _commands(node: int, mine: Sequence[tuple[Cable, Ends]], machine: Machine) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(what for, command) of what is not so yet."""
    bridged = sorted({cable.interface(node) for cable, _ in mine} & set(machine.bridged))
    if bridged:
        text = f"Bring the Thunderbolt Bridge of {machine.name} down, which holds {', '.join(bridged)}."
        yield text, ("ifconfig", machine.bridge, "down")
    for text, argv, done in _addresses(node, mine, machine):
        if not done:
            yield text, argv


def _all_commands(
    node: int, mine: Sequence[tuple[Cable, Ends]], machine: Machine
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What a restart makes necessary again; the bridge comes back up with the system.

    Cables that other groups use keep what they have now: there is one daemon for all of a Mac.
    """
    yield "", ("ifconfig", machine.bridge or "bridge0", "down")
    for text, argv, _ in _addresses(node, mine, machine):
        yield text, argv
    for interface in sorted(
        {socket.interface for socket in machine.sockets} - {one.interface(node) for one, _ in mine}
    ):
        for number, address in enumerate(machine.addresses(interface)):
            more = ("alias",) if number else ()
            yield "", ("ifconfig", interface, "inet", str(address.ip), "netmask", str(address.netmask), *more)


def _addresses(
    node: int, mine: Sequence[tuple[Cable, Ends]], machine: Machine
) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """(what for, command, whether it is so already) for each cable of a node."""
    named: set[str] = set()
    for cable, pair in mine:
        interface = cable.interface(node)
        own, peer = pair.address(cable, node), pair.address(cable, cable.other(node))
        # A second cable on one interface (through a hub) adds its address to the first one's.
        more = ("alias",) if interface in named else ()
        named.add(interface)
        present = pair.is_set(cable, node)
        text = f"Give {interface} of {machine.name} the address {own}."
        yield text, ("ifconfig", interface, "inet", own, "netmask", NETMASK, *more), present
        routed = present and _leads(machine, peer) == interface
        text = f"Send what {machine.name} has for {peer} through {interface}."
        yield text, ("route", "change", peer, "-interface", interface), routed


def _leads(machine: Machine, address: str) -> str:
    """Interface of the most exact route to an address; empty: none is known."""
    fitting = [route for route in machine.routes if IPv4Address(address) in IPv4Network(route.network)]
    best = max(fitting, key=lambda route: IPv4Network(route.network).prefixlen, default=None)
    return best.interface if best else ""


def _lasting(name: str, commands: Sequence[tuple[str, ...]]) -> Fix:
    """Install a launch daemon that runs the commands at every start of the Mac."""
    return Fix(
        text=f"Let {name} set these addresses again at every restart.",
        argv=("sudo", "/bin/sh", "-c", 'printf %s "$1" > "$0" && chmod 644 "$0"', DAEMON, daemon_plist(commands)),
        node=name,
    )


def daemon_plist(commands: Sequence[tuple[str, ...]]) -> str:
    """A launchd property list that runs the commands as root once the first of their interfaces is there.

    Raises ValueError for a word that a shell would not take as it stands: no such word is ever planned.
    """
    for argv in commands:
        for word in argv:
            if not word or not all(letter.isalnum() or letter in "-._/" for letter in word):
                raise ValueError(f"{word!r} has no place in a start-up command")
    first = next((argv[1] for argv in commands if argv[0] == "ifconfig" and argv[-1] != "down"), "lo0")
    # Thunderbolt interfaces appear some seconds after launchd has begun.
    wait = f"n=0; until ifconfig {first} >/dev/null 2>&1 || [ $n -ge 30 ]; do n=$((n+1)); sleep 2; done"
    script = "; ".join([wait, *(" ".join(argv) for argv in commands)])
    return plistlib.dumps(
        {"Label": "jupiter.thunderbolt", "ProgramArguments": ["/bin/sh", "-c", script], "RunAtLoad": True}
    ).decode()
