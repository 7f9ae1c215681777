"""What a person does to an open fleet: the environment, links, and looking only while somebody watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from jupiter_engine.cluster import upkeep
from jupiter_engine.cluster.fleet import Fleet
from jupiter_engine.cluster.fleet_thread import FleetThread
from jupiter_engine.cluster.link import give_leave, has_leave
from jupiter_engine.errors import JupiterError, UsageError
from jupiter_engine.protocol.fleet import Finding, Transfer
from jupiter_engine.remote.host_keys import KnownHosts
from jupiter_engine.settings.cluster import (
    HUB,
    ClusterSettings,
    ConnectionSettings,
    GroupSpec,
    IslandsSettings,
    NodeSpec,
    hub_group,
)
from tests.sshd import Sshd, free_port, start_sshd

QUICK = ConnectionSettings(connect_timeout_s=5.0, keepalive_s=2.0, reconnect_max_s=1.0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Sshd]:
    made = start_sshd(tmp_path / "one")
    yield made
    made.stop()


def spec(server: Sshd, folder: Path) -> NodeSpec:
    return server.node(
        name="one", workdir=str(folder / "work"), python=sys.executable, environment="own", device_type="cpu"
    )


def fleet_of(folder: Path, server: Sshd, *nodes: NodeSpec, groups: tuple[GroupSpec, ...] = ()) -> Fleet:
    (folder / "w" / ".jupiter").mkdir(parents=True, exist_ok=True)
    cluster = ClusterSettings(nodes=nodes, groups=groups, connection=QUICK)
    return Fleet(cluster, folder / "w", known_hosts=server.trusted(), ssh_config=None)


async def test_a_push_is_in_the_picture_while_it_lasts(tmp_path: Path, server: Sshd) -> None:
    fleet = fleet_of(tmp_path, server, spec(server, tmp_path))
    seen: list[Transfer | None] = []
    fleet.listen(lambda: seen.append(fleet.picture().nodes[0].transfer))
    async with fleet.opened():
        python = await upkeep.push(fleet, "one")
        after = fleet.picture().nodes[0]
    assert python == sys.executable
    assert after.transfer is None
    assert after.facts is not None, "the node is asked again after a push"
    assert any(transfer is not None for transfer in seen)


async def test_a_push_that_cannot_be_raises_the_nodes_problem(tmp_path: Path, server: Sshd) -> None:
    gone = NodeSpec(host="127.0.0.1", name="gone", ssh_port=free_port(), ssh_user="x")
    fleet = fleet_of(tmp_path, server, gone)
    async with fleet.opened():
        with pytest.raises(JupiterError, match="refuses connections"):
            await upkeep.push(fleet, "gone")
        assert fleet.picture().nodes[0].transfer is None


async def test_a_link_needs_a_group_and_every_node_of_it(tmp_path: Path, server: Sshd) -> None:
    gone = NodeSpec(host="127.0.0.1", name="gone", ssh_port=free_port(), ssh_user="x")
    group = GroupSpec(name="pair", nodes=("one", "gone"))
    fleet = fleet_of(tmp_path, server, spec(server, tmp_path), gone, groups=(group,))
    async with fleet.opened():
        with pytest.raises(UsageError, match=r"no group 'other' \(there: pair\)"):
            await upkeep.link_group(fleet, "other")
        with pytest.raises(JupiterError, match="refuses connections"):
            await upkeep.link_group(fleet, "pair")
    assert not has_leave(fleet.root, group)


def test_the_hub_of_islands_is_linked_like_a_group(tmp_path: Path) -> None:
    nodes = tuple(NodeSpec(host=name, device_type="cpu") for name in ("a", "b", "c", "d"))
    cluster = ClusterSettings(
        nodes=nodes,
        groups=(GroupSpec(name="pair", nodes=("a", "b")),),
        islands=IslandsSettings(groups=("pair", "d"), hub="c"),
    )
    found = upkeep.groups_named(cluster, None)
    assert [(group.name, group.nodes) for group in found] == [("pair", ("a", "b")), (HUB, ("c", "a", "d"))]
    assert upkeep.groups_named(cluster, HUB) == found[1:]
    # Any machine of an island may have to merge one day, or be called because it leads: leave is for all of them.
    whole = hub_group(cluster, whole=True)
    assert whole is not None
    give_leave(tmp_path, cluster, whole)
    for names in (("c", "a", "d"), ("d", "b"), ("a", "d")):
        assert has_leave(tmp_path, GroupSpec(name=HUB, nodes=names))
    assert not has_leave(tmp_path, GroupSpec(name=HUB, nodes=("c", "e")))
    with pytest.raises(UsageError, match=r"no group 'islands' \(there: pair\)"):
        upkeep.groups_named(msgspec.structs.replace(cluster, islands=IslandsSettings()), HUB)


async def test_what_is_known_of_a_machine_outlives_a_change_of_the_file(tmp_path: Path, server: Sshd) -> None:
    node = spec(server, tmp_path)
    before = fleet_of(tmp_path, server, NodeSpec(name="here"), node)
    async with before.opened():
        await before.refresh_facts()
    about_both = Finding(check="x", severity="info", nodes=("here", "one"), text="both")
    about_one = Finding(check="x", severity="info", nodes=("one",), text="one")
    before._findings, before._findings_at = (about_both, about_one), 5.0
    after = fleet_of(tmp_path, server, node)
    after.inherit(before)
    assert after.facts("one") == before.facts("one") is not None
    assert after.picture().findings == (about_one,), "a finding about a machine that is gone goes with it"
    moved = fleet_of(tmp_path, server, server.node(name="one", workdir="/elsewhere"))
    moved.inherit(before)
    assert moved.facts("one") is None, "another entry may be another machine"


async def test_a_name_that_is_no_node_any_more_is_wrong_use(tmp_path: Path, server: Sshd) -> None:
    fleet = fleet_of(tmp_path, server, spec(server, tmp_path))
    async with fleet.opened():
        for ask in (fleet.runner, fleet.connection):
            with pytest.raises(UsageError, match=r'there is no node "gone" in config/cluster\.yaml'):
                await ask("gone")
        with pytest.raises(UsageError, match="gone"):
            await fleet.refresh_facts(names=["gone"])
        with pytest.raises(UsageError, match="gone"):
            fleet.facts("gone")
        # It may have been taken out while something was being sent to it.
        fleet.show_transfer("gone", Transfer(what="x", sent_bytes=0, total_bytes=1, bytes_per_s=None, eta_s=None))
        assert fleet.facts("ONE") is None
        assert (await fleet.connection("ONE", wait_s=10)).name == "one"


def wait_for(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


class Counted(Fleet):
    """A fleet that counts how often its machines are asked."""

    asked = 0

    async def refresh_facts(self, **options: object) -> None:
        type(self).asked += 1
        await super().refresh_facts(**options)  # type: ignore[arg-type]


def test_machines_are_asked_only_while_somebody_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jupiter_engine.cluster.fleet_thread.FAST_S", 0.05)
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "cluster.yaml").write_text(
        "schema: jupiter/cluster@1\nnodes: [{host: localhost, name: a}]\n"
    )
    known = KnownHosts(tmp_path / "known_hosts", user=(), system=())
    Counted.asked = 0
    thread = FleetThread(tmp_path, make=lambda cluster, root: Counted(cluster, root, known_hosts=known))
    try:
        thread.watch(wanted=False)
        thread.picture()
        wait_for(lambda: thread.picture().nodes != ())
        time.sleep(0.4)
        assert Counted.asked == 0
        thread.watch(wanted=True)
        wait_for(lambda: Counted.asked > 3)
        thread.watch(wanted=False)
        time.sleep(1.0)
        so_far = Counted.asked
        time.sleep(0.5)
        assert Counted.asked == so_far
        assert thread.remove("b").exception(10) is not None
        with pytest.raises(UsageError, match="only node"):
            thread.remove("a").result(10)
    finally:
        thread.close()
