"""One node as the planner of groups sees it: its raw tool answers, read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from ipaddress import IPv4Interface
from typing import Any, Literal, TypeVar

import msgspec

from jupiter_engine.cluster.readers import apple, network, nvidia, thunderbolt
from jupiter_engine.cluster.readers.network import MacInterface, Route
from jupiter_engine.cluster.readers.reading import ToolOutput
from jupiter_engine.cluster.readers.thunderbolt import ThunderboltPort
from jupiter_engine.protocol.fleet import Interface

RDMA_SINCE = (26, 2)
"""macOS that brought RDMA over Thunderbolt (MLX's documentation of JACCL)."""
RDMA_ABOVE_BITS_PER_S = 40_000_000_000
"""Thunderbolt 4 runs at 40 Gb/s and cannot do RDMA, whatever rdma_ctl says; Thunderbolt 5 runs at 80 or 120."""

T = TypeVar("T")


class NodeTools(msgspec.Struct, frozen=True, kw_only=True):
    """What one node's tools printed, unread. Keys of `raw`: see `jupiter_engine.cluster.readers`."""

    name: str
    ssh: str = ""
    """Name under which the group's leader reaches it by ssh; empty: its `name`."""
    host: str = ""
    """As the cluster file names it."""
    system: Literal["Darwin", "Linux", ""] = ""
    """As `uname -s` says; empty: told by which answers there are."""
    raw: Mapping[str, Any] = {}


class Socket(msgspec.Struct, frozen=True, kw_only=True):
    """A Thunderbolt socket that has a network interface."""

    interface: str
    port: ThunderboltPort


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """One node, read."""

    name: str
    ssh: str
    host: str
    mac: bool
    sockets: tuple[Socket, ...] = ()
    """In the order of their interfaces' names, as MLX orders them."""
    interfaces: tuple[Interface, ...] = ()
    routes: tuple[Route, ...] = ()
    bridge: str = ""
    """A bridge that is up and holds Thunderbolt interfaces: bridge0; empty: none."""
    bridged: tuple[str, ...] = ()
    """Interfaces that `bridge` holds."""
    rdma_devices: frozenset[str] = frozenset()
    rdma_down: frozenset[str] = frozenset()
    """RDMA devices whose port is told not to be active."""
    rdma_switch: Literal["enabled", "disabled", "unknown"] = "unknown"
    macos: str = ""
    """Version; empty: not told."""
    cards: int = 0
    """NVIDIA cards."""
    unread: tuple[str, ...] = ()
    """Complete sentences on answers that could not be read."""

    def addresses(self, interface: str) -> list[IPv4Interface]:
        """IPv4 addresses of one interface, self-assigned ones (169.254/16) left out."""
        found = [IPv4Interface(text) for one in self.interfaces if one.name == interface for text in one.addresses]
        return [address for address in found if not address.is_link_local]


class _Answers:
    """Reads single answers of one node; what cannot be read becomes a sentence, and None as what is missing does."""

    def __init__(self, tools: NodeTools) -> None:
        self.tools = tools
        self.unread: list[str] = []

    def read(self, key: str, reader: Callable[[object], T]) -> T | None:
        raw = self.tools.raw.get(key)
        if raw is None:
            return None
        try:
            return reader(raw)
        except ToolOutput as error:
            self.unread.append(f"{self.tools.name}: {error.detail}.")
            return None


def read_machine(tools: NodeTools) -> Machine:
    """One node's answers, read. Never raises: what cannot be read stands in `unread`."""
    answers = _Answers(tools)
    mac = tools.system == "Darwin" or (not tools.system and "ifconfig" in tools.raw)
    if mac:
        return _read_mac(tools, answers)
    speeds = answers.read("net_speeds", network.net_speeds) or {}
    interfaces = answers.read("ip_addr", lambda raw: network.linux_interfaces(raw, speeds)) or ()
    return Machine(
        name=tools.name,
        ssh=tools.ssh or tools.name,
        host=tools.host,
        mac=False,
        interfaces=interfaces,
        routes=answers.read("ip_route", network.linux_routes) or (),
        cards=len(answers.read("nvidia_smi", nvidia.cards) or ()),
        unread=tuple(answers.unread),
    )


def _read_mac(tools: NodeTools, answers: _Answers) -> Machine:
    hardware = answers.read("hardware_ports", thunderbolt.hardware_ports) or {}
    ports = answers.read("thunderbolt", thunderbolt.thunderbolt_ports) or ()
    found = answers.read("ifconfig", network.mac_interfaces) or ()
    system = answers.read("sw_vers", apple.mac_system)
    states = answers.read("ibv_devinfo", thunderbolt.rdma_ports) or ()
    sockets: list[Socket] = []
    for port in ports:
        interface = hardware.get(f"Thunderbolt {port.receptacle}")
        if interface is not None:
            sockets.append(Socket(interface=interface, port=port))
        elif port.peers:
            answers.unread.append(
                f"{tools.name}: networksetup lists no hardware port `Thunderbolt {port.receptacle}`, so the cable in "
                "that socket has no network interface."
            )
    bridge = _bridge(found, {socket.interface for socket in sockets})
    return Machine(
        name=tools.name,
        ssh=tools.ssh or tools.name,
        host=tools.host,
        mac=True,
        sockets=tuple(sorted(sockets, key=lambda socket: socket.interface)),
        interfaces=network.mac_kinds(found, hardware),
        routes=answers.read("netstat", network.mac_routes) or (),
        bridge=bridge.name if bridge else "",
        bridged=bridge.members if bridge else (),
        rdma_devices=frozenset(answers.read("ibv_devices", thunderbolt.rdma_devices) or ()),
        rdma_down=frozenset(one.device for one in states if one.state not in ("", "PORT_ACTIVE")),
        rdma_switch=answers.read("rdma_ctl", thunderbolt.rdma_state) or "unknown",
        macos=system.version if system else "",
        unread=tuple(answers.unread),
    )


def _bridge(found: tuple[MacInterface, ...], interfaces: set[str]) -> MacInterface | None:
    return next((one for one in found if one.up and interfaces & set(one.members)), None)
