"""Network interfaces and routes of a node, from macOS and Linux tools, as one kind of record."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from ipaddress import AddressValueError, IPv4Address, IPv4Interface, IPv4Network, NetmaskValueError
from typing import Any, Final, Literal

import msgspec

from jupiter_engine.cluster.readers.reading import json_of, lines_of, rows, short, table, whole
from jupiter_engine.protocol.fleet import Interface

Kind = Literal["thunderbolt", "ethernet", "wifi", "bridge", "vpn", "virtual", "loopback", "unknown"]

_NAME: Final = re.compile(r"[A-Za-z0-9_.@:-]{1,32}")
_HEAD: Final = re.compile(r"([A-Za-z0-9_.-]{1,32}): flags=[0-9a-fA-F]+<([A-Z0-9_,-]*)>")
_BASE: Final = re.compile(r"\b([0-9]{1,5}(?:\.[0-9])?)(G?)base", re.IGNORECASE)

_BY_NAME: Final[Mapping[Kind, re.Pattern[str]]] = {
    "loopback": re.compile(r"lo[0-9]*"),
    # WireGuard, OpenVPN, Tailscale, ZeroTier, Nebula, IPsec and PPP: addresses of somewhere else.
    "vpn": re.compile(r"(utun|ipsec|ppp|tun|tap|wg|tailscale|zt|feth|nebula|nordlynx|proton|wt)[A-Za-z0-9_-]*"),
    # Containers, virtual machines (their bridges too), and macOS's own Wi-Fi helpers and gadgets.
    "virtual": re.compile(
        r"(docker|br-[0-9a-f]|veth|virbr|vnet|vmnet|vmenet|lxc|lxd|cni|flannel|cali|kube|podman|nerdctl|ifb|dummy)"
        r"[A-Za-z0-9_.@-]*|(awdl|llw|ap|anpi|gif|stf|p2p|XHC)[0-9]*|bridge[1-9][0-9]+"
    ),
    "bridge": re.compile(r"bridge[0-9]|(br|vmbr)[0-9]+"),
    "thunderbolt": re.compile(r"thunderbolt[0-9]+"),
    "wifi": re.compile(r"wl[A-Za-z0-9]+"),
    "ethernet": re.compile(r"(eth[0-9]+|en[opsxX][A-Za-z0-9]+|em[0-9]+|bond[0-9]+|ib[A-Za-z0-9]+)(\.[0-9]+)?"),
}
"""In this order: the first that fits the whole name counts."""
_BY_LINK: Final[Mapping[str, Kind]] = {
    "bridge": "bridge",
    "tun": "vpn",
    "wireguard": "vpn",
    "veth": "virtual",
    "dummy": "virtual",
    "macvlan": "virtual",
    "vxlan": "virtual",
}


class MacInterface(msgspec.Struct, frozen=True, kw_only=True):
    """One interface as `ifconfig` of macOS shows it."""

    name: str
    up: bool = False
    """The administrator's flag UP."""
    active: bool | None = None
    """`status: active`; None where no status stands (loopback, tunnels)."""
    addresses: tuple[str, ...] = ()
    """IPv4 with prefix length."""
    members: tuple[str, ...] = ()
    """Of a bridge."""
    speed_bits_per_s: int | None = None


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One IPv4 route."""

    network: str
    """With prefix length; 0.0.0.0/0 is the default route."""
    interface: str
    gateway: str = ""
    """Address of the next machine; empty: the network is reached directly."""


def kind_by_name(name: str, link: str = "") -> Kind:
    """What an interface's name (and Linux link type) says about it."""
    for kind, pattern in _BY_NAME.items():
        if pattern.fullmatch(name):
            return kind
    return _BY_LINK.get(link, "unknown")


# -- macOS ---------------------------------------------------------------------------------------------
def mac_interfaces(raw: object) -> tuple[MacInterface, ...]:
    """`ifconfig -a` of macOS.

    Shape: a head line `en0: flags=8863<UP,...> mtu 1500` and indented lines `inet A netmask 0xffffff00 ...`,
    `member: en1 ...`, `media: autoselect (1000baseT <full-duplex>)`, `status: active` (ifconfig's manual page;
    published captures of macOS 13 to 15).
    """
    blocks: list[tuple[str, bool, list[str]]] = []
    for line in lines_of("ifconfig -a", raw):
        head = _HEAD.match(line)
        if head:
            blocks.append((head[1], "UP" in head[2].split(","), []))
        elif blocks and line[:1] in (" ", "\t"):
            blocks[-1][2].append(line.strip())
    return tuple(_mac_interface(name, lines, up=up) for name, up, lines in blocks[:512])


def _mac_interface(name: str, lines: list[str], *, up: bool) -> MacInterface:
    addresses: list[str] = []
    members: list[str] = []
    active = speed = None
    for line in lines:
        words = line.split()
        if not words:
            continue
        if words[0] == "inet":
            address = _mac_address(words)
            if address is not None:
                addresses.append(address)
        elif words[0] == "member:" and len(words) > 1 and _NAME.fullmatch(words[1]):
            members.append(words[1])
        elif words[0] == "status:":
            active = words[1:] == ["active"]
        elif words[0] == "media:":
            speed = _media_speed(line)
    return MacInterface(
        name=name,
        up=up,
        active=active,
        addresses=tuple(addresses[:64]),
        members=tuple(members[:64]),
        speed_bits_per_s=speed,
    )


def _mac_address(words: list[str]) -> str | None:
    """`inet A [--> B] netmask 0xffffff00` as A/24."""
    if "netmask" not in words[:-1] or len(words) < 2:
        return None
    mask = words[words.index("netmask") + 1]
    try:
        if mask.lower().startswith("0x") and len(mask) <= 10:
            mask = str(IPv4Address(int(mask, 16)))
        return str(IPv4Interface(f"{words[1]}/{mask}"))
    except (AddressValueError, NetmaskValueError, ValueError):
        return None


def _media_speed(line: str) -> int | None:
    found = _BASE.search(line[:200])
    return int(float(found[1]) * (1e9 if found[2] else 1e6)) if found else None


def mac_routes(raw: object) -> tuple[Route, ...]:
    """`netstat -rn -f inet` of macOS.

    Shape: a table Destination, Gateway, Flags, Netif; destinations are shortened (`192.168.1`, `169.254`,
    `10.0.0/30`), `default` is 0.0.0.0/0, gateways that are no address (`link#6`, a MAC address) mean that the
    network is reached directly (netstat's manual page; published captures). Routes to single neighbours, which
    the system keeps as a cache (flag W or L), are left out.
    """
    routes: list[Route] = []
    for line in lines_of("netstat -rn -f inet", raw):
        words = line.split()
        if len(words) < 4 or words[0] == "Destination":
            continue
        network = _shortened(words[0])
        cached = network is not None and network.prefixlen == 32 and any(flag in words[2] for flag in "LWc")
        if network is None or cached or not _NAME.fullmatch(words[3]):
            continue
        routes.append(Route(network=str(network), interface=words[3], gateway=_gateway(words[1])))
    return tuple(routes[:4096])


def _shortened(text: str) -> IPv4Network | None:
    """'default', '192.168.1', '10.0.0/30', '10.0.0.1/32' as networks; a mask that is not told follows the dots."""
    if text == "default":
        return IPv4Network("0.0.0.0/0")
    host, _, prefix = text.partition("/")
    parts = host.split(".")
    if not 1 <= len(parts) <= 4:
        return None
    length = prefix or str(8 * len(parts))
    try:
        return IPv4Network(f"{'.'.join([*parts, '0', '0', '0'][:4])}/{length}", strict=False)
    except (AddressValueError, NetmaskValueError, ValueError):
        return None


def _gateway(text: str) -> str:
    try:
        return str(IPv4Address(text))
    except AddressValueError:
        return ""


def mac_kinds(found: Iterable[MacInterface], ports: Mapping[str, str]) -> tuple[Interface, ...]:
    """The interfaces of a Mac with their kinds: hardware ports (reader `hardware_ports`) first, then names."""
    port_of = {device: port for port, device in ports.items()}
    kinds: list[Interface] = []
    for one in found:
        kind = kind_by_name(one.name)
        port = port_of.get(one.name)
        if port is not None and kind in ("unknown", "ethernet", "bridge"):
            kind = _port_kind(port)
        kinds.append(
            Interface(
                name=one.name,
                kind=kind,
                addresses=one.addresses,
                up=one.up and one.active is not False,
                speed_bits_per_s=one.speed_bits_per_s,
            )
        )
    return tuple(kinds)


def _port_kind(port: str) -> Kind:
    if port == "Wi-Fi":
        return "wifi"
    if port == "Thunderbolt Bridge":
        return "bridge"
    if re.fullmatch(r"Thunderbolt [0-9]{1,2}", port):
        return "thunderbolt"
    # "Thunderbolt Ethernet Slot 1" and the like are adapters.
    return "ethernet" if re.search(r"Ethernet|LAN", port) else "unknown"


# -- Linux ---------------------------------------------------------------------------------------------
def linux_interfaces(raw: object, speeds: Mapping[str, int] | None = None) -> tuple[Interface, ...]:
    """`ip -json -details addr`; `speeds` is what reader `net_speeds` gave.

    Shape: a list of objects with `ifname`, `flags`, `operstate`, `addr_info` (family, local, prefixlen) and, where
    it is no plain device, `linkinfo.info_kind` (iproute2's own JSON).
    """
    known = speeds or {}
    interfaces: list[Interface] = []
    for entry in rows(json_of("ip -json -details addr", raw), 512):
        item = table(entry)
        name = item.get("ifname")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            continue
        flags = [flag for flag in rows(item.get("flags"), 64) if isinstance(flag, str)]
        interfaces.append(
            Interface(
                name=name,
                kind=kind_by_name(name, short(table(item.get("linkinfo")).get("info_kind", ""), 20)),
                addresses=tuple(_linux_addresses(item)),
                up="UP" in flags and item.get("operstate") != "DOWN",
                speed_bits_per_s=known.get(name),
            )
        )
    return tuple(interfaces)


def _linux_addresses(item: dict[str, Any]) -> list[str]:
    found: list[str] = []
    for entry in rows(item.get("addr_info"), 64):
        info = table(entry)
        prefix = whole(info.get("prefixlen"))
        if info.get("family") != "inet" or prefix is None:
            continue
        try:
            found.append(str(IPv4Interface(f"{info.get('local')}/{prefix}")))
        except (AddressValueError, NetmaskValueError, ValueError):
            continue
    return found


def linux_routes(raw: object) -> tuple[Route, ...]:
    """`ip -json route`: a list of objects with `dst` (a network, an address, or `default`), `dev` and `gateway`."""
    routes: list[Route] = []
    for entry in rows(json_of("ip -json route", raw)):
        item = table(entry)
        target, device = item.get("dst"), item.get("dev")
        if not isinstance(target, str) or not isinstance(device, str) or not _NAME.fullmatch(device):
            continue
        try:
            network = IPv4Network("0.0.0.0/0" if target == "default" else target, strict=False)
        except (AddressValueError, NetmaskValueError, ValueError):
            continue
        gateway = item.get("gateway")
        routes.append(
            Route(network=str(network), interface=device, gateway=_gateway(gateway) if isinstance(gateway, str) else "")
        )
    return tuple(routes)


def net_speeds(raw: object) -> dict[str, int]:
    """Speeds in bit/s by interface, from lines `NAME VALUE` with VALUE as /sys/class/net/NAME/speed gives it.

    The kernel gives Mbit/s, and -1 (or nothing) where there is no link or no answer (Documentation/ABI).
    """
    speeds: dict[str, int] = {}
    for line in lines_of("/sys/class/net/*/speed", raw):
        words = line.split()
        value = whole(words[1]) if len(words) == 2 else None
        if value is not None and 0 < value < 10_000_000 and _NAME.fullmatch(words[0]):
            speeds[words[0]] = value * 1_000_000
    return speeds
