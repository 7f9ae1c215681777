"""The ordinary network that all nodes of a group share: which one, and each node's address and interface on it."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Final

import msgspec

from jupiter_engine.cluster.machine import Machine
from jupiter_engine.protocol.fleet import Interface

_ORDER: Final = {"thunderbolt": 0, "ethernet": 1, "bridge": 2, "unknown": 3, "wifi": 4}
"""Kinds that may carry a group, best first. VPN, container and loopback interfaces never do."""
_TAILSCALE: Final = IPv4Network("100.64.0.0/10")
"""Carrier-grade NAT addresses, which Tailscale and its like give: another way round to the same machine."""


class Seat(msgspec.Struct, frozen=True, kw_only=True):
    """A node's place on a network."""

    address: str
    interface: str
    kind: str
    speed_bits_per_s: int | None = None


class Shared(msgspec.Struct, frozen=True, kw_only=True):
    """A network that all nodes of the group are on, with their seats in the order of the nodes."""

    network: str
    seats: tuple[Seat, ...]

    @property
    def kind(self) -> str:
        """Of the worst seat."""
        return max((seat.kind for seat in self.seats), key=lambda kind: _ORDER.get(kind, 0))

    @property
    def speed_bits_per_s(self) -> int | None:
        """Of the slowest seat that tells one."""
        return min((seat.speed_bits_per_s for seat in self.seats if seat.speed_bits_per_s is not None), default=None)


def shared_network(machines: Sequence[Machine], *, thunderbolt: bool = True) -> tuple[Shared | None, tuple[str, ...]]:
    """(the best network that all are on, sentences on networks that could not be taken).

    Better is: no Wi-Fi seat, then the faster slowest seat, then the lower address. Without `thunderbolt`,
    addresses on Thunderbolt cables do not count.
    """
    own = _loopback(machines)
    if own is not None:
        return own, ()
    found: dict[IPv4Network, list[Shared]] = {}
    refused: list[str] = []
    seats = [_seats(machine, thunderbolt=thunderbolt) for machine in machines]
    for network in sorted(set(seats[0]) if seats else ()):
        if not all(network in one for one in seats):
            continue
        chosen = tuple(one[network] for one in seats)
        twice = _twice(machines, chosen)
        if twice:
            refused.append(twice)
        else:
            found.setdefault(network, []).append(Shared(network=str(network), seats=chosen))
    best = min((shared for several in found.values() for shared in several), key=_rank, default=None)
    return best, tuple(refused)


def _rank(shared: Shared) -> tuple[int, int, IPv4Network]:
    return _ORDER.get(shared.kind, 9), -(shared.speed_bits_per_s or 0), IPv4Network(shared.network)


def _loopback(machines: Sequence[Machine]) -> Shared | None:
    """Nodes that are all named by loopback addresses are this one machine under several names."""
    try:
        addresses = [IPv4Address("127.0.0.1" if one.host == "localhost" else one.host) for one in machines]
    except ValueError:
        return None
    if not addresses or not all(address.is_loopback for address in addresses):
        return None
    seats = tuple(Seat(address=str(address), interface="lo", kind="loopback") for address in addresses)
    return Shared(network="127.0.0.0/8", seats=seats)


def _seats(machine: Machine, *, thunderbolt: bool) -> dict[IPv4Network, Seat]:
    """The node's best seat on each network."""
    seats: dict[IPv4Network, Seat] = {}
    for interface in machine.interfaces:
        if not _usable(interface, machine) or (interface.kind == "thunderbolt" and not thunderbolt):
            continue
        for text in interface.addresses:
            address = IPv4Interface(text)
            # /32 is a tunnel or an alias; 169.254 means that nobody gave an address.
            if address.network.prefixlen > 30 or address.is_link_local or address.is_loopback:
                continue
            if address.ip in _TAILSCALE:
                continue
            seat = Seat(
                address=str(address.ip),
                interface=interface.name,
                kind=interface.kind,
                speed_bits_per_s=interface.speed_bits_per_s,
            )
            former = seats.get(address.network)
            if former is None or _better(seat, former):
                seats[address.network] = seat
    return seats


def _usable(interface: Interface, machine: Machine) -> bool:
    if not interface.up or interface.kind not in _ORDER:
        return False
    if interface.kind != "unknown":
        return True
    # An interface with a strange name counts where it leads to a router, as a LAN does and a tunnel does not.
    return any(
        route.interface == interface.name and route.gateway and route.network == "0.0.0.0/0" for route in machine.routes
    )


def _better(one: Seat, other: Seat) -> bool:
    """Whether a seat is better than another one of the same node."""
    return (_ORDER[one.kind], -(one.speed_bits_per_s or 0)) < (_ORDER[other.kind], -(other.speed_bits_per_s or 0))


def _twice(machines: Sequence[Machine], seats: Sequence[Seat]) -> str:
    """A sentence where two nodes claim one address; empty: none do."""
    holder: dict[str, str] = {}
    for machine, seat in zip(machines, seats, strict=True):
        if seat.address in holder:
            return (
                f"{holder[seat.address]} and {machine.name} both say that they are {seat.address}; "
                "give one of them another address."
            )
        holder[seat.address] = machine.name
    return ""
