"""The real `mlx.distributed_config`, run over real ssh against fake Macs, finds the same groups as our planner.

Every fake Mac is an sshd on its own loopback address whose commands see that Mac's tools first. MLX is called
with `--auto-setup`, as its users do; where it stops with an error, ours must not plan that group either.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jupiter_engine.cluster.machine import NodeTools
from jupiter_engine.cluster.readers import MAC_TOOLS
from jupiter_engine.cluster.topology import plan_group
from jupiter_engine.protocol.fleet import GroupPlan
from tests.fake_tools.macs import FakeMac, behind_hub, cable, chain, device, macs, make_fake_mac, mesh, ring, two_cables
from tests.sshd import Sshd, make_key, require_sshd, start_sshd

MLX_CONFIG = Path(sys.executable).with_name("mlx.distributed_config")
MARK = "=== answer of "


@dataclass
class Fleet:
    """Fake Macs that ssh reaches by their names through the program `ssh` in `shim`."""

    macs: list[FakeMac]
    folder: Path

    @property
    def shim(self) -> Path:
        return self.folder / "shim"

    def ssh(self, name: str, *command: str) -> str:
        done = subprocess.run(
            ["ssh", "-F", str(self.folder / "ssh_config"), name, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        return done.stdout

    def mlx(self, *arguments: str) -> tuple[int, dict[str, Any] | None, str]:
        """(exit status, host file, standard error) of mlx.distributed_config."""
        out = self.folder / "mlx.json"
        out.unlink(missing_ok=True)
        hosts = ",".join(mac.name for mac in self.macs)
        done = subprocess.run(
            [str(MLX_CONFIG), "--hosts", hosts, "--output-hostfile", str(out), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={**os.environ, "PATH": f"{self.shim}:{os.environ['PATH']}"},
        )
        return done.returncode, json.loads(out.read_text()) if out.exists() else None, done.stderr

    def tools(self) -> list[NodeTools]:
        """All tools of all Macs, asked over ssh as a user would ask them."""

        raws: dict[str, dict[str, str]] = {}
        for mac in self.macs:
            calls = {key: argv for key, argv in MAC_TOOLS.items() if argv[0][0] != "/"}
            script = "; ".join(f"printf '{MARK}{key}\\n'; {' '.join(argv)}" for key, argv in calls.items())
            parts = self.ssh(mac.name, script).split(MARK)[1:]
            raws[mac.name] = dict(part.split("\n", 1) for part in parts)
            assert set(raws[mac.name]) == set(calls)
        return [NodeTools(name=name, ssh=name, host=name, system="Darwin", raw=raw) for name, raw in raws.items()]

    def plan(self, **options: Any) -> GroupPlan:
        return plan_group("group", self.tools(), twin="mlx", **options)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Callable[[list[FakeMac]], Fleet]]:
    require_sshd()
    if not MLX_CONFIG.exists():
        pytest.skip("needs mlx.distributed_config")
    servers: list[Sshd] = []
    called: list[str] = []
    config = tmp_path / "ssh_config"

    def start(found: list[FakeMac]) -> Fleet:
        identity = make_key(tmp_path / "id_test")
        # One connection a Mac, opened here: MLX makes dozens of calls, and a handshake takes longer than a tool.
        entries = [f"Host *\n  ControlPath {sockets}/%n\n"]
        for number, mac in enumerate(found):
            tools = make_fake_mac(tmp_path / "tools" / mac.name, mac)
            server = start_sshd(
                tmp_path / "sshd" / mac.name, path_first=tools, host=f"127.0.0.{number + 2}", identity=identity
            )
            servers.append(server)
            entries.append(server.ssh_config(mac.name, server.folder / "ssh_config").read_text())
        config.write_text("".join(entries))
        for mac in found:
            ssh(config, "-fNM", mac.name)
            called.append(mac.name)
        shim = tmp_path / "shim" / "ssh"
        shim.parent.mkdir()
        shim.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F "{config}" "$@"\n')
        shim.chmod(0o755)
        return Fleet(macs=found, folder=tmp_path)

    # A socket's path may have 107 bytes, fewer than pytest's folders have.
    with tempfile.TemporaryDirectory(prefix="jupiter-ssh-") as sockets:
        yield start
        for name in called:
            ssh(config, "-O", "exit", name)
    for server in servers:
        server.stop()


def ssh(config: Path, *arguments: str) -> None:
    """A call of ssh that must work and whose output is nobody's business."""
    quiet = subprocess.DEVNULL
    command = ["/usr/bin/ssh", "-F", str(config), *arguments]
    subprocess.run(command, stdin=quiet, stdout=quiet, stderr=quiet, check=True, timeout=30)


def same_ring(one: list[str], other: list[str]) -> bool:
    """Equal up to where the ring is begun and which way it is walked."""
    turned = [one[k:] + one[:k] for k in range(len(one))]
    return other in turned or other[::-1] in turned


def names(hostfile: dict[str, Any]) -> list[str]:
    return [host["ssh"] for host in hostfile["hosts"]]


def by_peer(hostfile: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """RDMA devices by names instead of ranks; several as a set (which of two cables comes first is nobody's rule)."""
    order = names(hostfile)
    return {
        host["ssh"]: {
            peer: sorted(one) if isinstance(one, list) else one for peer, one in zip(order, host["rdma"], strict=True)
        }
        for host in hostfile["hosts"]
    }


def assert_same(ours: GroupPlan, theirs: dict[str, Any]) -> None:
    mine = ours.hostfile
    assert mine["backend"] == theirs["backend"]
    if theirs["backend"] == "jaccl":
        assert names(mine) == names(theirs)
    else:
        assert same_ring(names(mine), names(theirs))
    assert {host["ssh"]: len(host["ips"]) for host in mine["hosts"]} == {
        host["ssh"]: len(host["ips"]) for host in theirs["hosts"]
    }
    if theirs["backend"] != "ring":
        assert by_peer(mine) == by_peer(theirs)


SHAPES: dict[str, tuple[Callable[[], list[FakeMac]], str]] = {
    "thunderbolt 4 ring of 3": (lambda: ring(3), "ring"),
    "thunderbolt 5 mesh of 4": (lambda: mesh(4, generation=5, rdma=True), "jaccl"),
    "thunderbolt 5 ring of 4": (lambda: ring(4, generation=5, rdma=True), "jaccl-ring"),
    "two with two cables": (two_cables, "ring"),
    "two with two cables and RDMA": (lambda: two_cables(generation=5, rdma=True), "jaccl"),
    "a ring with a monitor": (lambda: with_monitor(), "ring"),
    "a ring of 5 that is not in order": (lambda: crossed(), "jaccl-ring"),
}


def with_monitor() -> list[FakeMac]:
    found = ring(3)
    found[1].plug(2, device("Studio Display"))
    return found


def crossed() -> list[FakeMac]:
    found = macs(5, generation=5, rdma=True)
    for one, other in ((0, 2), (2, 4), (4, 1), (1, 3), (3, 0)):
        cable(found[one], 1, found[other], 0)
    cable(found[0], 2, found[1], 2)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_same_group_as_mlx(fleet: Callable[[list[FakeMac]], Fleet], shape: str) -> None:
    make, backend = SHAPES[shape]
    started = fleet(make())
    ours = started.plan()
    status, theirs, said = started.mlx("--auto-setup")
    assert status == 0, said
    assert theirs is not None
    assert theirs["backend"] == backend
    assert_same(ours, theirs)
    # What MLX set up is sane here (nothing else uses 192.168.0.x), so ours keeps it, address for address.
    after = started.plan()
    if backend == "ring":
        assert {host["ssh"]: set(host["ips"]) for host in after.hostfile["hosts"]} == {
            host["ssh"]: set(host["ips"]) for host in theirs["hosts"]
        }
    assert after.problems == ()


@pytest.mark.slow
def test_a_chain_is_refused_by_mlx_and_goes_over_ethernet_here(fleet: Callable[[list[FakeMac]], Fleet]) -> None:
    started = fleet(chain(3))
    status, theirs, said = started.mlx("--auto-setup")
    assert (status, theirs) == (1, None)
    assert "Neither thunderbolt mesh nor ring found" in said
    assert started.plan(over="thunderbolt").hostfile == {}
    status, theirs, said = started.mlx("--over", "ethernet")
    assert status == 0, said
    ours = started.plan().hostfile
    assert theirs is not None
    assert [(host["ssh"], host["ips"]) for host in ours["hosts"]] == [
        (host["ssh"], host["ips"]) for host in theirs["hosts"]
    ]


@pytest.mark.slow
def test_a_hub_hides_the_peer_from_mlx_but_not_from_here(fleet: Callable[[list[FakeMac]], Fleet]) -> None:
    started = fleet(behind_hub(generation=5, rdma=True))
    status, theirs, _ = started.mlx("--auto-setup")
    assert (status, theirs) == (1, None)
    assert started.plan().backend == "jaccl"


@pytest.mark.slow
def test_the_set_up_brings_a_group_to_where_it_can_be_launched(fleet: Callable[[list[FakeMac]], Fleet]) -> None:
    started = fleet(ring(3, lan="192.168.0"))
    first = started.plan()
    assert first.problems
    for fix in first.setup:
        if "restart" not in fix.text:
            started.ssh(fix.node, *fix.argv)
    second = started.plan()
    assert (second.problems, second.setup) == ((), ())
    assert second.hostfile == first.hostfile
