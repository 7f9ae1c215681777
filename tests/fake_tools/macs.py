"""Fake Macs, and cables between them."""

from __future__ import annotations

import itertools
import json
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jupiter_engine.cluster.machine import NodeTools
from jupiter_engine.cluster.readers import MAC_TOOLS
from tests.fake_tools import mac_tool

TOOLS = [
    "system_profiler",
    "networksetup",
    "ipconfig",
    "ifconfig",
    "netstat",
    "route",
    "ibv_devices",
    "ibv_devinfo",
    "rdma_ctl",
    "pmset",
    "sw_vers",
    "sysctl",
    "vm_stat",
    "uname",
    "sudo",
]


@dataclass
class FakeMac:
    """A Mac by what its tools say: Thunderbolt sockets with the interfaces en2, en3, ..., Ethernet en0, Wi-Fi en1."""

    name: str
    number: int
    """Makes addresses and identifiers unlike those of other Macs."""
    sockets: int = 3
    generation: int = 4
    """Of Thunderbolt: 4 or 5."""
    macos: str = "26.2"
    rdma: bool = False
    """Switched on in Recovery."""
    bridge_up: bool = True
    wifi_only: bool = False
    lan: str = "192.168.1"
    product: str = "Mac mini"
    model: str = "Mac16,11"
    chip: str = "Apple M4 Pro"
    memory_gb: int = 64
    state: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        address = f"{self.lan}.{10 + self.number}/24"
        wired = {"name": "en0", "port": "Ethernet", "addresses": [address], "media": "1000baseT"}
        air = {"name": "en1", "port": "Wi-Fi", "addresses": [], "media": ""}
        if self.wifi_only:
            wired["addresses"], air["addresses"] = [], [address]
        lan = [{**one, "gateway": f"{self.lan}.1" if one["addresses"] else ""} for one in (wired, air)]
        speeds = {4: ("40 Gb/s", "Up to 40 Gb/s"), 5: ("80 Gb/s", "Up to 120 Gb/s")}[self.generation]
        ports = [
            {
                "receptacle": str(k + 1),
                "interface": f"en{k + 2}",
                "domain": self.domain(k),
                "speed": speeds[0],
                "idle_speed": speeds[1],
                "items": [],
            }
            for k in range(self.sockets)
        ]
        self.state = {
            "product": self.product,
            "model": self.model,
            "chip": self.chip,
            "memory_gb": self.memory_gb,
            "macos": self.macos,
            "build": "25C56",
            "lan": lan,
            "ports": ports,
            "addresses": {},
            "routes": [],
            "bridge_up": self.bridge_up,
            "bridge_members": [port["interface"] for port in ports],
            "rdma_switch": "enabled" if self.rdma else "disabled",
            "rdma_devices": [f"rdma_{port['interface']}" for port in ports] if self.rdma else [],
            "rdma_down": [],
        }

    def domain(self, socket: int) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{self.name}/{self.number}/{socket}")).upper()

    def add_vpn(self, address: str, *routes: str, name: str = "utun4") -> None:
        """An interface such as a VPN brings, with routes through it."""
        self.state["lan"].append({"name": name, "port": "", "addresses": [address], "media": "", "gateway": ""})
        self.state["routes"] += [[route, name] for route in routes]

    def plug(self, socket: int, item: dict[str, Any]) -> None:
        self.state["ports"][socket]["items"].append(item)

    def as_peer(self, socket: int) -> dict[str, Any]:
        """How another Mac lists this one at the end of its cable."""
        service = {"_name": "service_ip", "protocol_id_key": 1, "protocol_revision_key": 1, "protocol_version_key": 1}
        return {
            "_name": self.product,
            "device_id_key": "0xA",
            "device_name_key": self.model,
            "domain_uuid_key": self.domain(socket),
            "services_title": [service],
            "vendor_id_key": "0x0A27",
            "vendor_name_key": "Apple Inc.",
        }

    def raw(self) -> dict[str, str]:
        """What the tools print, without running them."""
        found = {}
        for key, (tool, *arguments) in MAC_TOOLS.items():
            if not tool.startswith("/"):
                text = mac_tool.answer(self.state, tool, arguments)
                assert text is not None, key
                found[key] = text
        return found

    def tools(self, host: str = "") -> NodeTools:
        return NodeTools(name=self.name, ssh=self.name, host=host or self.name, system="Darwin", raw=self.raw())


def device(name: str, *inside: dict[str, Any]) -> dict[str, Any]:
    """A hub, monitor or disk: no domain of its own, perhaps something behind it."""
    item: dict[str, Any] = {
        "_name": name,
        "device_id_key": "0x501",
        "device_name_key": name,
        "mode_key": "usb_four_v2",
        "receptacle_upstream_ambiguous_tag": {
            "current_speed_key": "80 Gb/s",
            "link_status_key": "0x2",
            "receptacle_status_key": "receptacle_connected",
        },
        "route_string_key": "1",
        "switch_uid_key": "0x0000000000000008",
        "vendor_id_key": "0x2EB9",
        "vendor_name_key": "Maker",
    }
    if inside:
        item["_items"] = list(inside)
    return item


def cable(a: FakeMac, a_socket: int, b: FakeMac, b_socket: int) -> None:
    """Plug a cable into two sockets (counted from 0)."""
    a.plug(a_socket, b.as_peer(b_socket))
    b.plug(b_socket, a.as_peer(a_socket))


def make_fake_mac(folder: Path, mac: FakeMac) -> Path:
    """Write the Mac's tools; the folder goes in front of PATH."""
    folder.mkdir(parents=True)
    mac_tool.save(folder, mac.state)
    script = Path(mac_tool.__file__).resolve()
    for tool in TOOLS:
        path = folder / tool
        # -S and -E: without site packages Python starts in 15 ms, which MLX's many calls add up.
        path.write_text(
            f'#!/bin/sh\nready="{folder}/answers/{tool}${{*:+ }}$*"\n[ -f "$ready" ] && exec cat "$ready"\n'
            f'exec "{sys.executable}" -S -E "{script}" "{folder}" {tool} "$@"\n'
        )
        path.chmod(0o755)
    return folder


def state_of(folder: Path) -> dict[str, Any]:
    """The state of a fake Mac after commands may have changed it."""
    found: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return found


# -- shapes --------------------------------------------------------------------------------------------
def macs(count: int, **options: Any) -> list[FakeMac]:
    return [FakeMac(f"mac-{'abcdefghij'[i]}", number=i + 1, **options) for i in range(count)]


def chain(count: int, **options: Any) -> list[FakeMac]:
    """Each with the next: socket 1 to socket 0."""
    found = macs(count, **options)
    for one, other in itertools.pairwise(found):
        cable(one, 1, other, 0)
    return found


def ring(count: int, **options: Any) -> list[FakeMac]:
    found = chain(count, **options)
    cable(found[-1], 1, found[0], 0)
    return found


def mesh(count: int, **options: Any) -> list[FakeMac]:
    """Each with every other, from socket 0 on."""
    found = macs(count, **{"sockets": count - 1, **options})
    free = [0] * count
    for i in range(count):
        for j in range(i + 1, count):
            cable(found[i], free[i], found[j], free[j])
            free[i] += 1
            free[j] += 1
    return found


def two_cables(**options: Any) -> list[FakeMac]:
    found = macs(2, **options)
    cable(found[0], 0, found[1], 1)
    cable(found[0], 1, found[1], 0)
    return found


def behind_hub(**options: Any) -> list[FakeMac]:
    """Two Macs with a hub between: the one at its upstream socket sees the hub first, the other one does not."""
    found = macs(2, **options)
    found[0].plug(0, device("Fusiondock Ultra", found[1].as_peer(0)))
    found[1].plug(0, found[0].as_peer(0))
    return found


def tools(found: Sequence[FakeMac]) -> list[NodeTools]:
    return [mac.tools() for mac in found]
