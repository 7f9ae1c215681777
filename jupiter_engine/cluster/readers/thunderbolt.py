"""Thunderbolt and RDMA of a Mac: which port leads to which Mac, at what speed, and which RDMA devices there are."""

from __future__ import annotations

import re
from typing import Any, Final, Literal

import msgspec

from jupiter_engine.cluster.readers.reading import json_of, lines_of, rows, short, table, unusable, whole

_DEPTH: Final = 12
"""Hubs behind hubs are followed this deep: Thunderbolt allows six devices in a row."""
_GIGABITS: Final = re.compile(r"([0-9]{1,4}(?:\.[0-9])?) ?Gb/s")
_TAG: Final = re.compile(r"receptacle_[0-9]{1,2}_tag")
_UUID: Final = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
_DEVICE: Final = re.compile(r"[A-Za-z0-9_.]{1,32}")


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """Another computer that a Thunderbolt bus names."""

    domain: str
    """UUID of the peer's own bus, upper case."""
    name: str = ""
    """As it is called by its owner or maker: Mac Studio."""
    model: str = ""
    """Mac15,14."""
    hubs: tuple[str, ...] = ()
    """Devices on the way, nearest first; empty: one cable."""


class ThunderboltPort(msgspec.Struct, frozen=True, kw_only=True):
    """One Thunderbolt bus of a Mac, which is one socket."""

    domain: str
    """Its UUID, upper case: what the other end names as its peer."""
    receptacle: str
    """Number of the socket: the N of the hardware port `Thunderbolt N`; empty if it is not told."""
    speed_bits_per_s: int | None = None
    """Of the link in use, or what the socket can do while nothing is plugged in."""
    connected: bool = False
    """Whether anything at all is plugged in: a Mac, a hub, a monitor, a disk."""
    peers: tuple[Peer, ...] = ()
    """Computers behind this socket, hubs seen through."""
    devices: tuple[str, ...] = ()
    """Names of everything else behind it."""


class RdmaPort(msgspec.Struct, frozen=True, kw_only=True):
    """An RDMA device and the state of its first port."""

    device: str
    state: str = ""
    """PORT_ACTIVE, PORT_DOWN, ...; empty: not told."""


def thunderbolt_ports(raw: object) -> tuple[ThunderboltPort, ...]:
    """`system_profiler SPThunderboltDataType -json`.

    Shape: one object a bus in `SPThunderboltDataType`; a bus without `domain_uuid_key` carries no network and is
    left out. What is plugged in stands in `_items`, and behind a hub in the hub's own `_items`; only computers
    have a `domain_uuid_key` there (a monitor or disk has none). `receptacle_1_tag` holds socket number and speed.
    Sources: mlx/_distributed_utils/config.py (the keys that count), published captures of macOS 26 and 27 on
    M3 Ultra, M4 Pro and M5 Max (their form), reports of exo users on peers behind hubs (the nesting).
    """
    tool = "system_profiler SPThunderboltDataType -json"
    document = json_of(tool, raw)
    if not isinstance(document, dict) or not isinstance(document.get("SPThunderboltDataType"), list):
        raise unusable(tool, "has no list SPThunderboltDataType")
    ports = []
    for bus in rows(document["SPThunderboltDataType"], 64):
        port = _port(table(bus))
        if port is not None:
            ports.append(port)
    return tuple(ports)


def _port(bus: dict[str, Any]) -> ThunderboltPort | None:
    domain = _domain(bus)
    if domain is None:
        return None
    tags = [table(bus[key]) for key in sorted(bus) if _TAG.fullmatch(key)]
    tag: dict[str, Any] = next((tag for tag in tags if "receptacle_id_key" in tag), tags[0] if tags else {})
    peers: list[Peer] = []
    devices: list[str] = []
    _walk(bus.get("_items"), (), peers, devices)
    status = str(tag.get("receptacle_status_key", ""))
    return ThunderboltPort(
        domain=domain,
        receptacle=short(tag.get("receptacle_id_key", ""), 8),
        speed_bits_per_s=_speed(tag.get("current_speed_key")),
        connected=bool(peers or devices) or status == "receptacle_connected",
        peers=tuple(peers),
        devices=tuple(devices),
    )


def _walk(items: object, hubs: tuple[str, ...], peers: list[Peer], devices: list[str]) -> None:
    """Collect the computers and the other devices of one `_items`, in order."""
    for entry in rows(items, 64):
        item = table(entry)
        name = short(item.get("_name", ""), 60)
        domain = _domain(item)
        if domain is not None and all(peer.domain != domain for peer in peers):
            peers.append(Peer(domain=domain, name=name, model=short(item.get("device_name_key", ""), 40), hubs=hubs))
        elif domain is None:
            devices.append(name)
        if len(hubs) < _DEPTH and len(peers) + len(devices) < 256:
            _walk(item.get("_items"), hubs if domain is not None else (*hubs, name), peers, devices)


def _domain(entry: dict[str, Any]) -> str | None:
    value = entry.get("domain_uuid_key")
    return value.upper() if isinstance(value, str) and _UUID.fullmatch(value) else None


def _speed(value: object) -> int | None:
    """'80 Gb/s' and 'Up to 40 Gb/s' in bit/s."""
    found = _GIGABITS.search(value[:80]) if isinstance(value, str) else None
    return int(float(found[1]) * 1e9) if found else None


def hardware_ports(raw: object) -> dict[str, str]:
    """`networksetup -listallhardwareports`: device by hardware port, such as {'Thunderbolt 1': 'en2'}.

    Shape: blocks of the lines `Hardware Port: NAME`, `Device: enX`, `Ethernet Address: ...`
    (networksetup's manual page; MLX reads the same two lines).
    """
    ports: dict[str, str] = {}
    name = None
    for line in lines_of("networksetup -listallhardwareports", raw):
        key, _, value = line.partition(":")
        if key.strip() == "Hardware Port":
            name = short(value, 60)
        elif key.strip() == "Device" and name:
            device = value.strip()
            if _DEVICE.fullmatch(device):
                ports.setdefault(name, device)
            name = None
    return ports


def rdma_devices(raw: object) -> tuple[str, ...]:
    """`ibv_devices`: names of the RDMA devices that belong to Thunderbolt ports (rdma_en2, ...).

    Shape: a table of two columns, device and node GUID, under two head lines; a Mac with RDMA disabled prints the
    head alone (documented with MLX's JACCL backend).
    """
    found: dict[str, None] = {}
    for line in lines_of("ibv_devices", raw):
        words = line.split()
        if words and words[0].startswith("rdma_") and _DEVICE.fullmatch(words[0]):
            found[words[0]] = None
    return tuple(found)


def rdma_ports(raw: object) -> tuple[RdmaPort, ...]:
    """`ibv_devinfo`: each device with the state of its first port.

    Shape: blocks `hca_id: rdma_en2` with indented lines `state: PORT_ACTIVE (4)` (libibverbs' own tool; captures
    of macOS have the same form, with transport Thunderbolt).
    """
    ports: dict[str, str] = {}
    device = None
    for line in lines_of("ibv_devinfo", raw):
        key, _, value = line.strip().partition(":")
        words = value.split()
        if key == "hca_id":
            device = words[0] if words and _DEVICE.fullmatch(words[0]) else None
            if device is not None:
                ports.setdefault(device, "")
        elif key == "state" and device is not None and words and not ports[device]:
            ports[device] = short(words[0], 32)
    return tuple(RdmaPort(device=device, state=state) for device, state in ports.items())


def rdma_state(raw: object) -> Literal["enabled", "disabled", "unknown"]:
    """`rdma_ctl status`: whether RDMA over Thunderbolt is switched on (only Recovery can do that).

    Shape: the one word `enabled` or `disabled` (Apple's TN3205; scripts in use compare with these words). A Mac
    with Thunderbolt 4 can say `enabled` all the same, which means nothing there.
    """
    words = " ".join(lines_of("rdma_ctl status", raw)).lower().split()
    if "disabled" in words:
        return "disabled"
    return "enabled" if "enabled" in words else "unknown"


def macos_version(version: str) -> tuple[int, int] | None:
    """'26.2' or '26.2.1' as (26, 2)."""
    parts = version.split(".")
    major, minor = whole(parts[0]), whole(parts[1]) if len(parts) > 1 else 0
    return None if major is None or minor is None else (major, minor)
