"""The fleet: real machines (sshd) of which some cannot be used, sixty-four at once, and the thread for the console."""

from __future__ import annotations

import asyncio
import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jupiter_engine.cluster import link
from jupiter_engine.cluster.fleet import Fleet
from jupiter_engine.cluster.fleet_thread import FleetThread
from jupiter_engine.cluster.runner import RunnerFile
from jupiter_engine.errors import JupiterError, RemoteError, UsageError
from jupiter_engine.protocol.fleet import Finding, Fix, FleetPicture, NodeStatus, Transfer
from jupiter_engine.remote.host_keys import KnownHosts
from jupiter_engine.settings.cluster import ClusterSettings, ConnectionSettings, GroupSpec, NodeSpec
from tests.fake_tools.linux_box import FakeLinux, make_fake_linux
from tests.fake_tools.macs import make_fake_mac, mesh
from tests.ssh_server import Reply, fleet_known_hosts, ssh_hosts
from tests.sshd import Sshd, free_port, make_key, start_sshd

QUICK = ConnectionSettings(connect_timeout_s=5.0, keepalive_s=2.0, reconnect_max_s=1.0)


class Machines:
    """Real ssh servers on loopback, each with a name, a work folder and one key to get in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.identity = make_key(folder / "id")
        self.servers: dict[str, Sshd] = {}

    def add(self, name: str, **options: Any) -> Sshd:
        server = start_sshd(self.folder / name, identity=self.identity, **options)
        self.servers[name] = server
        return server

    def node(self, name: str, **more: Any) -> NodeSpec:
        server = self.servers[name]
        given: dict[str, Any] = {
            "host": server.host,
            "name": name,
            "ssh_port": server.port,
            "ssh_user": server.user,
            "identity": str(self.identity),
            "workdir": str(self.folder / "work" / name),
            "python": sys.executable,
            "environment": "own",
            "device_type": "cpu",
        }
        return NodeSpec(**{**given, **more})

    def known_hosts(self, *names: str) -> KnownHosts:
        own = self.folder / "known_hosts"
        own.write_text("".join(self.servers[name].known_hosts_line + "\n" for name in names))
        return KnownHosts(own, user=(), system=())

    def fleet(self, *nodes: NodeSpec, known: KnownHosts | None = None, groups: tuple[GroupSpec, ...] = ()) -> Fleet:
        cluster = ClusterSettings(nodes=nodes, groups=groups, connection=QUICK)
        trusted = known or self.known_hosts(*self.servers)
        return Fleet(cluster, self.folder / "workspace", known_hosts=trusted, ssh_config=None)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    (tmp_path / "workspace" / ".jupiter").mkdir(parents=True)
    made = Machines(tmp_path)
    yield made
    for server in made.servers.values():
        server.stop()


def by_name(picture: FleetPicture) -> dict[str, NodeStatus]:
    return {node.name: node for node in picture.nodes}


def of(found: tuple[Finding, ...], slug: str, severity: str) -> list[Finding]:
    return [one for one in found if (one.check, one.severity) == (slug, severity)]


async def until(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        await asyncio.sleep(0.02)


# -- real machines -------------------------------------------------------------------------------------
async def test_usable_and_unusable_machines_side_by_side(machines: Machines) -> None:
    for name in ("one", "two", "stranger", "changed"):
        machines.add(name)
    known = machines.known_hosts("one", "two")
    other = make_key(machines.folder / "other_key")
    public = " ".join(other.with_name("other_key.pub").read_text().split()[:2])
    changed = machines.servers["changed"]
    known.own.write_text(known.own.read_text() + f"[{changed.host}]:{changed.port} {public}\n")
    gone = NodeSpec(host="127.0.0.1", name="gone", ssh_port=free_port(), ssh_user="x", device_type="cpu")
    nodes = [machines.node(name) for name in ("one", "two", "stranger", "changed")]
    fleet = machines.fleet(NodeSpec(name="here"), *nodes, gone, known=known)
    calls = 0

    def changed_now() -> None:
        nonlocal calls
        calls += 1

    fleet.listen(changed_now)
    async with fleet.opened():
        await fleet.refresh_facts()
        seen = by_name(fleet.picture())
        await fleet.refresh_facts(fast=True)
        again = by_name(fleet.picture())
    for name in ("here", "one", "two"):
        status = seen[name]
        assert (status.state, status.problem) == ("online", ""), status
        assert status.facts is not None
        assert status.facts.versions["mlx"]
        later = again[name].facts
        assert later is not None
        assert later.interfaces == status.facts.interfaces
    assert seen["here"].local
    assert seen["here"].facts is not None
    assert seen["here"].facts.rtt_s is not None
    assert seen["stranger"].state == "refused"
    assert seen["changed"].state == "refused"
    assert "changed" in seen["changed"].problem.lower() or "another key" in seen["changed"].problem.lower()
    assert seen["changed"].problem != seen["stranger"].problem
    assert seen["gone"].state in ("connecting", "lost")
    assert "refuses connections" in seen["gone"].problem
    for name in ("stranger", "changed", "gone"):
        assert seen[name].facts is None
        assert seen[name].fix
    assert calls > 5


async def test_a_machine_without_a_usable_python_is_refused_and_forgiven(machines: Machines) -> None:
    machines.add("one")
    fleet = machines.fleet(machines.node("one", python="/nowhere/python"))
    async with fleet.opened():
        await fleet.refresh_facts()
        status = by_name(fleet.picture())["one"]
        assert "no Python 3.9" in status.problem
        assert status.facts is None
        assert status.fix
        with pytest.raises(JupiterError, match=r"no Python 3\.9"):
            await fleet.runner("one")
        fleet.wake()
        assert by_name(fleet.picture())["one"].problem == ""


async def test_a_lost_machine_comes_back_with_its_runner(machines: Machines) -> None:
    server = machines.add("one")
    fleet = machines.fleet(machines.node("one"))
    async with fleet.opened():
        first = await fleet.runner("one", wait_s=10)
        assert await fleet.runner("one") is first
        server.cut()
        await until(lambda: by_name(fleet.picture())["one"].state == "lost")
        assert by_name(fleet.picture())["one"].problem
        second = await fleet.runner("one", wait_s=10)
        assert second is not first
        assert (await second.hello()).version == RunnerFile.packed().sha
        await fleet.refresh_facts()
        assert by_name(fleet.picture())["one"].problem == ""


async def test_what_is_being_sent_is_shown(machines: Machines) -> None:
    fleet = machines.fleet(NodeSpec(name="here"))
    transfer = Transfer(what="environment", sent_bytes=1, total_bytes=10, bytes_per_s=None, eta_s=None)
    fleet.show_transfer("here", transfer)
    assert by_name(fleet.picture())["here"].transfer == transfer
    fleet.show_transfer("here", None)
    assert by_name(fleet.picture())["here"].transfer is None
    await fleet.close()


async def test_the_doctor_on_a_group_of_two(machines: Machines) -> None:
    machines.add("one")
    machines.add("two")
    gone = NodeSpec(host="127.0.0.1", name="gone", ssh_port=free_port(), ssh_user="x", device_type="cpu")
    pair = GroupSpec(name="pair", nodes=("one", "two"))
    fleet = machines.fleet(NodeSpec(), machines.node("one"), machines.node("two"), gone, groups=(pair,))
    told: list[str] = []
    async with fleet.opened():
        found = await fleet.examine(progress=told.append, echo_bytes=16 << 20)
        picture = fleet.picture()
        some = await fleet.examine(names=("two",), echo_bytes=1000)
    assert told == ["asking 4 node(s)", "measuring 2 connection(s) between nodes"]
    assert (picture.findings, picture.findings_at > 0) == (found, True)
    (warned,) = of(found, "unreachable", "warn")
    assert warned.nodes == ("gone",)
    assert warned.fix is not None
    for slug in ("reachable", "round-trip", "local-network", "torch-version", "group-plan", "clock-skew", "firewall"):
        (good,) = of(found, slug, "ok")
        assert {"one", "two"} <= set(good.nodes), slug
    assert [plan.backend for plan in picture.groups] == ["gloo"]
    assert all("two" in one.nodes or not one.nodes for one in some)
    # What was seen is compared with the next time.
    (same,) = of(some, "reboot", "ok")
    assert "two" in same.nodes
    seen = json.loads((machines.folder / "workspace" / ".jupiter" / "fleet.json").read_text())
    assert set(seen["nodes"]) == {"localhost", "one", "two"}


async def test_the_doctor_sees_that_a_group_lost_a_machine(machines: Machines) -> None:
    machines.add("one")
    gone = NodeSpec(host="127.0.0.1", name="gone", ssh_port=free_port(), ssh_user="x", device_type="cpu")
    fleet = machines.fleet(machines.node("one"), gone, groups=(GroupSpec(name="pair", nodes=("one", "gone")),))
    async with fleet.opened():
        found = await fleet.examine()
    (failed,) = of(found, "unreachable", "fail")
    assert failed.nodes == ("gone",)
    (plan,) = of(found, "group-plan", "fail")
    assert plan.text == "Group pair: gone has not said yet what it is."


async def test_the_doctor_tries_the_leading_machine_s_own_way(machines: Machines, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    for name in ("one", "two"):
        machines.add(name, force_env={"HOME": str(home)}, options=(f"AuthorizedKeysFile {home}/.ssh/authorized_keys",))
    (home / ".ssh").mkdir(mode=0o700)
    keys = home / ".ssh" / "authorized_keys"
    keys.write_text(machines.identity.with_name("id.pub").read_text())
    pair = GroupSpec(name="pair", nodes=("one", "two"))
    fleet = machines.fleet(machines.node("one"), machines.node("two"), groups=(pair,))
    async with fleet.opened():
        connections = {name: await fleet.connection(name, wait_s=10) for name in ("one", "two")}
        before = await fleet.examine(echo_bytes=1000)
        await link.link(
            fleet.cluster, pair, connections, root=fleet.root, known_hosts=fleet.known_hosts, ssh_config=None
        )
        linked = await fleet.examine(echo_bytes=1000)
        keys.write_text(machines.identity.with_name("id.pub").read_text())
        broken = await fleet.examine(echo_bytes=1000)
    assert not [one for one in before if one.check == "peer-login"]
    (good,) = of(linked, "peer-login", "ok")
    assert good.nodes == ("two",)
    (bad,) = of(broken, "peer-login", "fail")
    assert "one, which leads a group, cannot log in to two: " in bad.text
    assert "ermission denied" in bad.text


async def test_the_doctor_on_fake_macs(machines: Machines) -> None:
    names = []
    for mac in mesh(3, generation=5, rdma=True, bridge_up=True):
        names.append(mac.name)
        machines.add(mac.name, path_first=make_fake_mac(machines.folder / "tools" / mac.name, mac))
    nodes = [machines.node(name, device_type="mac") for name in names]
    fleet = machines.fleet(*nodes, groups=(GroupSpec(name="macs", nodes=tuple(names)),))
    async with fleet.opened():
        found = await fleet.examine(echo_bytes=1000)
        (plan,) = fleet.picture().groups
    assert plan.backend == "jaccl"
    assert {one.nodes for one in of(found, "sleep", "warn")} == {(name,) for name in names}
    assert {one.nodes for one in of(found, "thunderbolt-bridge", "fail")} == {(name,) for name in names}
    assert len(of(found, "rdma", "ok")) == 3
    setup = of(found, "group-addresses", "fail")
    assert setup
    assert not any(one.fix is None or one.fix.safe for one in setup)
    assert {one.fix.argv[:1] for one in setup if one.fix is not None and one.fix.argv} == {("sudo",)}


async def test_the_doctor_on_a_fake_nvidia_box(machines: Machines) -> None:
    folder = make_fake_linux(machines.folder / "tools", FakeLinux("rig", number=1, xid=True))
    machines.add("rig", path_first=folder)
    fleet = machines.fleet(machines.node("rig", device_type="nvidia", memory_gb=48))
    async with fleet.opened():
        found = await fleet.examine()
    (xid,) = of(found, "nvidia-xid", "fail")
    assert "Xid 79" in xid.text
    (peers,) = of(found, "nvidia-p2p", "warn")
    assert "RTX 4090" in peers.text
    (cuda,) = of(found, "nvidia-driver", "fail")
    assert "built without CUDA" in cuda.text
    (claim,) = of(found, "memory-claim", "warn")
    assert "24.0 GiB on its card" in claim.text


async def test_only_safe_fixes_are_carried_out(machines: Machines, tmp_path: Path) -> None:
    machines.add("one")
    fleet = machines.fleet(NodeSpec(name="here"), machines.node("one"))
    mark = tmp_path / "mark"
    async with fleet.opened():
        done = await fleet.apply(
            Fix(text="touch", argv=("sh", "-c", f"touch {mark}; echo did it"), node="one", safe=True)
        )
        assert (done, mark.exists()) == ("did it", True)
        with pytest.raises(RemoteError, match="for a person to do"):
            await fleet.apply(Fix(text="remove", argv=("rm", str(mark)), node="one"))
        with pytest.raises(RemoteError, match="for a person to do"):
            await fleet.apply(Fix(text="plug it in", safe=True))
        with pytest.raises(RemoteError, match="no node 'nobody'"):
            await fleet.apply(Fix(text="x", argv=("true",), node="nobody", safe=True))
        with pytest.raises(RemoteError, match="ended with 3: no luck"):
            await fleet.apply(Fix(text="x", argv=("sh", "-c", "echo no luck; exit 3"), safe=True))
    assert mark.exists()


# -- many ----------------------------------------------------------------------------------------------
def node_answers() -> dict[tuple[str, ...], Reply]:
    """A machine that has the runner already and answers probes with what this machine says."""
    argv = [sys.executable, "-m", "jupiter_engine.node"]
    whole = subprocess.run([*argv, "probe"], capture_output=True, check=True).stdout
    fast = subprocess.run([*argv, "probe", "--fast"], capture_output=True, check=True).stdout
    hello = {
        "version": RunnerFile.packed().sha,
        "python": "/usr/bin/python3",
        "python_version": "3.11.2",
        "system": "Linux",
        "machine": "x86_64",
        "home": "/home/ada",
        "user": "ada",
        "hostname": "fake",
        "boot_id": "b",
        "shell": "/bin/sh",
        "at": time.time(),
    }
    found = b"found\t/usr/bin/python3\t/home/ada/.jupiter\tpresent\n" + json.dumps(hello).encode() + b"\n"

    def run(words: tuple[str, ...], _: bytes) -> bytes:
        assert words[6] == "probe", words
        return fast if "--fast" in words else whole

    return {("/bin/sh", "-c"): found, ("true",): "", ("/usr/bin/python3",): run}


@pytest.fixture
async def many(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with ssh_hosts(tmp_path / "hosts", 64, node_answers()) as hosts:
        cluster = ClusterSettings(
            nodes=(NodeSpec(name="here"), *(host.node(device_type="cpu", role="generator") for host in hosts)),
            connection=ConnectionSettings(connect_timeout_s=60.0),
        )
        (tmp_path / ".jupiter").mkdir()
        known = fleet_known_hosts(hosts, tmp_path / "known")
        fleet = Fleet(cluster, tmp_path, known_hosts=known, ssh_config=None)
        yield fleet
        await fleet.close()


@pytest.mark.slow
async def test_sixty_four_machines_at_once(many: Fleet) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    longest = 0.0

    async def watch() -> None:
        """The picture must be there at once whatever else goes on: the console draws from it."""
        nonlocal longest
        while True:
            began = time.perf_counter()
            many.picture()
            longest = max(longest, time.perf_counter() - began)
            await asyncio.sleep(0.01)

    watching = asyncio.create_task(watch())
    await many.open()
    await many.refresh_facts(wait_s=60)
    nodes = by_name(many.picture())
    assert len(nodes) == 65
    assert {status.state for status in nodes.values()} == {"online"}, [n.problem for n in nodes.values() if n.problem]
    assert all(status.facts is not None for status in nodes.values())
    await many.refresh_facts(fast=True)
    found = await many.examine()
    watching.cancel()
    (answer,) = of(found, "unreachable", "ok")
    assert answer.text == "65 of 65 nodes answer."
    assert longest < 0.25
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10


# -- the thread ----------------------------------------------------------------------------------------
def workspace(folder: Path, *lines: str) -> Path:
    (folder / "config").mkdir(parents=True, exist_ok=True)
    text = "\n".join(["schema: jupiter/cluster@1", "nodes:", *(f"  - {line}" for line in lines)]) + "\n"
    new = folder / "config" / "cluster.yaml.new"
    new.write_text(text)
    new.replace(folder / "config" / "cluster.yaml")
    return folder


def wait_for(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def test_the_thread_follows_the_cluster_file(tmp_path: Path) -> None:
    root = workspace(tmp_path, "{host: localhost, name: here}")
    before = set(threading.enumerate())
    thread = FleetThread(root)
    try:
        began = time.perf_counter()
        thread.picture()
        assert time.perf_counter() - began < 0.2
        wait_for(lambda: any(node.facts for node in thread.picture().nodes))
        first = thread.picture().nodes[0].facts
        wait_for(lambda: thread.picture().nodes[0].facts != first)
        found = thread.examine().result(30)
        assert of(found, "unreachable", "ok")
        assert thread.picture().findings == found
        said = thread.apply(Fix(text="x", argv=("echo", "hi"), safe=True)).result(10)
        assert said == "hi"
        port = free_port()
        workspace(root, "{host: localhost, name: here}", f"{{host: 127.0.0.1, name: gone, ssh_port: {port}}}")
        wait_for(lambda: [node.name for node in thread.picture().nodes] == ["here", "gone"])
        workspace(root, "{host: 'not a host!'}")
        wait_for(lambda: thread.problem != "")
        assert [node.name for node in thread.picture().nodes] == ["here", "gone"]
        workspace(root, "{host: localhost, name: again}")
        wait_for(lambda: thread.problem == "" and [node.name for node in thread.picture().nodes] == ["again"])
        thread.wake()
    finally:
        thread.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(UsageError, match="has been closed"):
        thread.examine().result(1)
    thread.close()


def test_a_thread_that_was_never_used_ends_at_once(tmp_path: Path) -> None:
    thread = FleetThread(tmp_path)
    thread.close()
    assert thread.picture().nodes == ()


def test_closing_ends_what_is_under_way(tmp_path: Path) -> None:
    root = workspace(tmp_path, "{host: localhost, name: here}")
    thread = FleetThread(root)
    waiting = thread.apply(Fix(text="x", argv=("sleep", "50"), safe=True))
    time.sleep(1.0)
    began = time.monotonic()
    thread.close()
    assert time.monotonic() - began < 10
    assert waiting.cancelled() or waiting.exception() is not None
