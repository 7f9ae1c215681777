"""The doctor on three hosts with networks of their own: what lies between them, a cable pulled, a host started anew."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jupiter_engine.cluster.doctor import needed_nodes_fail
from jupiter_engine.cluster.fleet import Fleet
from jupiter_engine.protocol.fleet import Finding
from jupiter_engine.remote.host_keys import KnownHosts
from jupiter_engine.settings.cluster import ClusterSettings, ConnectionSettings, GroupSpec, NodeSpec
from tests.rig import Rig, needs_rig

pytestmark = needs_rig

NAMES = ("node1", "node2", "node3")


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig(3) as made:
        yield made


def fleet_of(rig: Rig, root: Path) -> Fleet:
    """The three hosts as one group, known by ssh's own settings."""
    (root / ".jupiter").mkdir(exist_ok=True)
    nodes = tuple(
        NodeSpec(host=name, python=sys.executable, environment="own", device_type="cpu", workdir=f"{rig[name].home}/j")
        for name in NAMES
    )
    quick = ConnectionSettings(connect_timeout_s=3.0, keepalive_s=1.0, reconnect_max_s=1.0)
    cluster = ClusterSettings(nodes=nodes, groups=(GroupSpec(name="three", nodes=NAMES),), connection=quick)
    known = KnownHosts(root / ".jupiter" / "known_hosts", user=(rig.known_hosts,), system=())
    return Fleet(cluster, root, known_hosts=known, ssh_config=rig.ssh_config)


def of(found: tuple[Finding, ...], slug: str, severity: str) -> list[Finding]:
    return [one for one in found if (one.check, one.severity) == (slug, severity)]


@pytest.mark.slow
async def test_links_are_measured_and_losses_named(rig: Rig, tmp_path: Path) -> None:
    fleet = fleet_of(rig, tmp_path)
    async with fleet.opened():
        found = await fleet.examine(echo_bytes=16 << 20)
        (plan,) = fleet.picture().groups
        assert plan.problems == ()
        assert {link.a_address for link in plan.links} | {link.b_address for link in plan.links} == {
            rig[name].address for name in NAMES
        }
        links = len(plan.links)
        assert of(found, "reachable", "ok")[0].text.startswith(f"{2 * links} connection(s)")
        assert len(of(found, "bandwidth", "ok")) == links, [one.text for one in found if one.check == "bandwidth"]
        for slug in ("round-trip", "local-network", "own-name", "firewall"):
            assert {name for one in of(found, slug, "ok") for name in one.nodes} >= set(NAMES), slug
        # (The disks of these hosts are small, and the doctor says so.)
        assert {one.check for one in found if one.severity == "fail"} == {"disk"}

        rig["node3"].cut()
        deadline = time.monotonic() + 20
        while fleet.picture().nodes[2].state == "online":
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        found = await fleet.examine(echo_bytes=1000)
        assert needed_nodes_fail(found)
        assert of(found, "unreachable", "fail")[0].nodes == ("node3",)
        for a in ("node1", "node2"):
            assert [one for one in of(found, "reachable", "fail") if one.nodes == (a, "node3")], found
        rig["node3"].heal()

        await asyncio.to_thread(rig["node3"].power_off)
        await asyncio.to_thread(rig["node3"].boot)
        deadline = time.monotonic() + 20
        while fleet.picture().nodes[2].state != "online":
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
        found = await fleet.examine(echo_bytes=1000)
        assert of(found, "reboot", "info")[0].nodes == ("node3",)
        assert not of(found, "unreachable", "fail")


async def test_ports_that_only_ssh_gets_through_are_found(rig: Rig, tmp_path: Path) -> None:
    """From node1 only ssh gets through to node2, as behind the firewall of many a machine."""
    to = ("to", rig["node2"].address, "ipproto", "tcp")
    answers_of_ssh = (*to, "sport", "22", "pref", "100", "lookup", "main")
    everything_else = (*to, "dport", "1024-65534", "pref", "200", "prohibit")
    try:
        for rule in (answers_of_ssh, everything_else):
            await asyncio.to_thread(rig["node1"].run, "ip", "rule", "add", *rule)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this kernel routes by no port: {error.stderr.strip()[:80]}")
    fleet = fleet_of(rig, tmp_path)
    async with fleet.opened():
        found = await fleet.examine(echo_bytes=1000)
    assert [one.nodes for one in of(found, "firewall", "fail")] == [("node2",)]
    assert not of(found, "reachable", "fail")
