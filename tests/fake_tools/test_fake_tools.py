"""The scripted tools themselves: what a shell sees with them in front of PATH is what the fakes say in-process."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from jupiter_engine.cluster.readers import LINUX_TOOLS, MAC_TOOLS, NVIDIA_TOOLS
from tests.fake_tools.linux_box import FakeLinux, make_fake_linux
from tests.fake_tools.macs import FakeMac, make_fake_mac, ring, state_of


def run(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(argv, capture_output=True, text=True, check=False, env=environment, timeout=20)


def test_a_mac_answers_as_the_fake_says(tmp_path: Path) -> None:
    mac = ring(3, generation=5, rdma=True)[0]
    folder = make_fake_mac(tmp_path / "mac", mac)
    raw = mac.raw()
    for key, argv in MAC_TOOLS.items():
        if key in raw:
            assert run(folder, str(folder / argv[0]), *argv[1:]).stdout == raw[key], key
    assert run(folder, str(folder / "uname"), "-s").stdout == "Darwin\n"
    assert run(folder, str(folder / "ipconfig"), "getifaddr", "en0").stdout == "192.168.1.11\n"
    assert run(folder, str(folder / "ipconfig"), "getifaddr", "en1").stdout == ""


def test_sudo_changes_the_fake_and_nothing_else(tmp_path: Path) -> None:
    folder = make_fake_mac(tmp_path / "mac", FakeMac("mac", number=1))
    sudo = str(folder / "sudo")
    target = tmp_path / "must-not-appear"
    assert run(folder, sudo, "ifconfig", "bridge0", "down").returncode == 0
    for address, more in (("10.0.0.1", ()), ("10.0.0.5", ("alias",))):
        run(folder, sudo, "-n", "ifconfig", "en2", "inet", address, "netmask", "255.255.255.252", *more)
    assert run(folder, sudo, "/bin/sh", "-c", f"touch {target}").returncode == 0
    assert not target.exists()
    state = state_of(folder)
    assert (state["bridge_up"], state["addresses"]) == (False, {"en2": ["10.0.0.1/30", "10.0.0.5/30"]})
    assert "inet 10.0.0.5 netmask 0xfffffffc" in run(folder, str(folder / "ifconfig"), "-a").stdout
    assert "10.0.0.4/30" in run(folder, str(folder / "netstat"), "-rn", "-f", "inet").stdout
    assert len((folder / "sudo.log").read_text().splitlines()) == 4
    assert run(folder, str(folder / "ifconfig"), "en9", "inet", "10.0.0.1", "netmask", "255.0.0.0").returncode == 1


@pytest.mark.parametrize("key", [*LINUX_TOOLS, *NVIDIA_TOOLS])
def test_a_linux_machine_answers_as_the_fake_says(tmp_path: Path, key: str) -> None:
    box = FakeLinux("box", 1, cards=3, xid=True)
    folder = make_fake_linux(tmp_path / "box", box)
    tool, *arguments = {**LINUX_TOOLS, **NVIDIA_TOOLS}[key]
    assert run(folder, str(folder / tool), *arguments).stdout == box.raw()[key]
    assert run(folder, str(folder / tool), "--nonsense").returncode == 1
