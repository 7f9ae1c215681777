"""A fake Linux machine with NVIDIA cards."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from jupiter_engine.cluster.machine import NodeTools
from jupiter_engine.cluster.readers import LINUX_TOOLS, NVIDIA_TOOLS


@dataclass
class FakeLinux:
    """A Linux machine by what its tools say."""

    name: str
    number: int
    cards: int = 2
    card: str = "NVIDIA GeForce RTX 4090"
    lan: str = "192.168.1"
    peers: str = "CNS"
    """What stands between the cards in `nvidia-smi topo -p2p r`."""
    xid: bool = False

    def raw(self) -> dict[str, str]:
        own = f"{self.lan}.{60 + self.number}"
        addresses = [
            _interface("lo", "127.0.0.1", 8),
            _interface("enp5s0", own, 24),
            _interface("docker0", "172.17.0.1", 16, "bridge"),
            _interface("tailscale0", "100.101.1.7", 32, "tun"),
        ]
        routes = [
            {"dst": "default", "gateway": f"{self.lan}.1", "dev": "enp5s0", "protocol": "dhcp"},
            {"dst": f"{self.lan}.0/24", "dev": "enp5s0", "scope": "link"},
            {"dst": "172.17.0.0/16", "dev": "docker0", "scope": "link"},
        ]
        line = "Nov 24 10:00:00 box kernel: NVRM: Xid (PCI:0000:01:00): 79, pid=1234, GPU has fallen off the bus.\n"
        return {
            "ip_addr": json.dumps(addresses),
            "ip_route": json.dumps(routes),
            "net_speeds": "enp5s0 2500\ndocker0 -1\n",
            "nvidia_smi": "".join(
                f"{i}, GPU-0000000{i}-1111, {self.card}, 24564, 1024, 3, 41, 25.50, 450.00, 580.95.05, [N/A]\n"
                for i in range(self.cards)
            ),
            "nvidia_p2p": self._peers(),
            "kernel_log": line if self.xid else "",
            "linger": "Linger=yes\n",
            "timedatectl": "Timezone=Etc/UTC\nLocalRTC=no\nCanNTP=yes\nNTP=yes\nNTPSynchronized=yes\n",
        }

    def _peers(self) -> str:
        names = [f"GPU{i}" for i in range(self.cards)]
        rows = [
            f" {name}\t" + "\t".join("X" if name == other else self.peers for other in names) + "\n" for name in names
        ]
        return " \t" + "\t".join(names) + "\n" + "".join(rows) + "\nLegend:\n\n  X    = Self\n  OK   = Status Ok\n"

    def tools(self) -> NodeTools:
        return NodeTools(name=self.name, ssh=self.name, host=self.name, system="Linux", raw=self.raw())


def _interface(name: str, address: str, prefix: int, kind: str = "") -> dict[str, object]:
    info: dict[str, object] = {
        "ifname": name,
        "flags": ["BROADCAST", "MULTICAST", "UP", "LOWER_UP"],
        "operstate": "UNKNOWN" if name == "lo" else "UP",
        "addr_info": [{"family": "inet", "local": address, "prefixlen": prefix, "scope": "global"}],
    }
    return {**info, "linkinfo": {"info_kind": kind}} if kind else info


def make_fake_linux(folder: Path, box: FakeLinux) -> Path:
    """Write the machine's tools; the folder goes in front of PATH."""
    folder.mkdir(parents=True)
    raw = box.raw()
    calls: dict[str, list[tuple[str, str]]] = {}
    for key, (tool, *arguments) in {**LINUX_TOOLS, **NVIDIA_TOOLS}.items():
        calls.setdefault(tool, []).append((" ".join(arguments), raw[key]))
    calls["uname"] = [("-s", "Linux\n"), ("-srm", "Linux 6.12.0 x86_64\n"), ("-m", "x86_64\n")]
    for tool, known in calls.items():
        cases = "".join(f"  {shlex.quote(arguments)}) printf %s {shlex.quote(text)};;\n" for arguments, text in known)
        path = folder / tool
        path.write_text(
            f'#!/bin/sh\ncase "$*" in\n{cases}  *) echo "{tool}: not part of this fake" >&2; exit 1;;\nesac\n'
        )
        path.chmod(0o755)
    return folder
