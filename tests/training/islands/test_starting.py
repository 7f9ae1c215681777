"""An island's worker on a machine behind a real sshd: started once, found again, stopped exactly."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from jupiter_engine.errors import NodeUnreachable, RemoteError
from jupiter_engine.protocol.specs import HostSpec, IslandSpec, LaunchSpec
from jupiter_engine.training.distributed.islands.starting import IslandState, RemoteIsland
from tests.node.kept import Node
from tests.sshd import Sshd, start_sshd

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

# Stands for the train worker: notes its start and the order, ends as the order says, rests when asked to.
_WORKER = """
import json, os, signal, sys, time
folder = sys.argv[1]
order = json.load(open(folder + "/spec.json"))
with open(folder + "/starts", "a") as file:
    file.write(f"{os.getpid()} {order['name']} {os.getcwd()}\\n")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
deadline = time.monotonic() + order["seconds"]
while time.monotonic() < deadline:
    if os.path.exists(folder + "/inbox/halt"):
        sys.exit(75)
    time.sleep(0.02)
if order["status"]:
    with open(folder + "/events.jsonl", "a") as file:
        file.write('{"fact":"failed","seq":1,"detail":"the disk \\\\u001b[31m is full"}\\n')
sys.exit(order["status"])
"""


@dataclass
class Place:
    server: Sshd
    node: Node
    config: Path
    island: IslandSpec
    run: Path

    def hub(self, *, lease_s: float = 600.0) -> RemoteIsland:
        """A hub that has just been started and remembers nothing."""
        return RemoteIsland(self.island, hub_folder=Path("/hub/runs/r"), ssh_config=str(self.config), lease_s=lease_s)

    def starts(self) -> list[list[str]]:
        path = self.run / "starts"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    server = start_sshd(tmp_path / "sshd")
    config = server.ssh_config("islander")
    node = Node(tmp_path, sys.executable)
    fake = tmp_path / "code" / "jupiter_engine" / "worker"
    fake.mkdir(parents=True)
    (fake.parent / "__init__.py").touch()
    (fake / "__init__.py").touch()
    (fake / "__main__.py").write_text(_WORKER)
    run = tmp_path / "far" / "runs" / "r.macs"
    member = tmp_path / "member" / "runs" / "r.macs"
    node.keep_folder = run / "node"
    leader = HostSpec(
        name="mini",
        ssh="islander",
        ranks=1,
        runner=(node.python, str(node.file)),
        python=sys.executable,
        run_folder=str(run),
        addresses=("127.0.0.1",),
        env={"PYTHONPATH": str(tmp_path / "code"), node.mark: "1"},
    )
    hosts = (
        HostSpec(
            name="mini",
            ssh="",
            ranks=1,
            runner=("p", "f"),
            python="p",
            run_folder=str(run),
            addresses=("127.0.0.1",),
        ),
        HostSpec(
            name="studio",
            ssh="islander",
            ranks=1,
            runner=("p", "f"),
            python="p",
            run_folder=str(member),
            addresses=("127.0.0.1",),
        ),
    )
    launch = LaunchSpec(twin="torch", ranks=2, launcher="direct", hosts=hosts, ssh_config=str(config))
    yield Place(server, node, config, IslandSpec(name="macs", launch=launch, leader=leader), run)
    node.clean()
    server.stop()


def order(name: str = "first", seconds: float = 60.0, status: int = 0) -> bytes:
    return json.dumps({"name": name, "seconds": seconds, "status": status}).encode()


def until(look: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not look():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


def test_a_worker_outlives_connections_and_the_next_hub_finds_it(place: Place) -> None:
    assert place.hub().state() == IslandState(state="absent")
    assert place.hub().start(order()).at_work
    place.server.cut()
    until(lambda: len(place.starts()) == 1)
    began = place.hub().state()
    assert (began.state, began.round) == ("running", 1)
    # The next hub gives the same order: the worker is left alone, even where its node runner has been killed.
    os.kill(place.node.record("runner.json")["pid"], signal.SIGKILL)
    again = place.hub().start(order())
    assert again == began
    assert place.hub().state().pid == began.pid
    assert place.node.state()["runner"]["alive"]
    (start,) = place.starts()
    assert start == [str(began.pid), "first", str(place.run)]
    # Every machine of the island has the order.
    member = Path(place.island.launch.hosts[1].run_folder)
    assert (member / "spec.json").read_bytes() == (place.run / "spec.json").read_bytes() == order()
    ended = place.hub().stop(grace_s=5.0)
    assert (ended.state, ended.exit_status) == ("exited", 75)
    assert place.node.marked() == []
    assert place.hub().stop() == ended


def test_a_killed_worker_is_seen_and_started_once_more_and_another_order_replaces_it(place: Place) -> None:
    hub = place.hub()
    hub.start(order())
    until(lambda: len(place.starts()) == 1)
    first = hub.state()
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    until(lambda: not hub.state().at_work)
    assert (hub.state().state, hub.state().signal) == ("exited", "KILL")
    second = hub.start(order())
    assert second.at_work
    assert second.round == 2
    until(lambda: len(place.starts()) == 2)
    third = hub.start(order("other"))
    assert third.at_work
    assert third.round == 3
    until(lambda: len(place.starts()) == 3)
    assert [start[1] for start in place.starts()] == ["first", "first", "other"]
    assert place.node.marked() != []
    hub.stop(grace_s=5.0)


def test_a_finished_island_stays_finished_and_a_resting_one_goes_on(place: Place) -> None:
    hub = place.hub()
    hub.start(order())
    until(lambda: len(place.starts()) == 1)
    hub.ask_halt()
    until(lambda: hub.state().exit_status == 75)
    hub.start(order())
    until(lambda: len(place.starts()) == 2)
    assert hub.state().state == "running"
    hub.start(order("short", seconds=0.0))
    until(lambda: hub.state().finished)
    found = place.hub().start(order("short", seconds=0.0))
    assert found.finished
    assert found.round == 3
    assert len(place.starts()) == 3


def test_a_worker_that_fails_is_shown_with_its_own_words(place: Place) -> None:
    hub = place.hub()
    hub.start(order("bad", seconds=0.0, status=20))
    until(lambda: not hub.state().at_work)
    found = hub.state()
    assert (found.state, found.exit_status, found.finished) == ("exited", 20, False)
    assert "the disk" in found.detail
    assert "is full" in found.detail
    assert "\x1b" not in found.detail


def test_the_lease_ends_an_island_that_no_hub_looks_for(place: Place) -> None:
    hub = place.hub(lease_s=2.0)
    hub.start(order())
    until(lambda: len(place.starts()) == 1)
    for _ in range(12):
        # Looks of a hub keep it alive for longer than the lease.
        assert hub.state().state == "running"
        time.sleep(0.3)
    until(lambda: place.node.marked() == [])
    found = hub.state()
    assert (found.state, found.exit_status) == ("exited", 75)
    assert hub.start(order()).round == 2


def test_a_machine_that_does_not_answer_is_silent_and_a_member_gets_its_order_later(place: Place) -> None:
    hub = place.hub()
    member = Path(place.island.launch.hosts[1].run_folder)
    # Its folder cannot be made now.
    member.parent.parent.mkdir(parents=True)
    (member.parent).write_text("")
    hub.start(order())
    until(lambda: len(place.starts()) == 1)
    assert list(hub.behind) == ["studio"]
    member.parent.unlink()
    hub._forward_due = 0.0  # the time until the next try has passed
    assert hub.state().state == "running"
    assert list(hub.behind) == []
    assert (member / "spec.json").read_bytes() == order()
    place.server.process.terminate()
    place.server.process.wait()
    silent = hub.state()
    assert silent.state == "silent"
    assert "mini" in silent.detail
    assert not silent.at_work
    with pytest.raises(NodeUnreachable, match="mini"):
        hub.start(order())


def test_what_the_node_runner_says_no_to_is_told_in_its_words(place: Place) -> None:
    hub = place.hub()
    hub.start(order())
    (place.run / "node" / "keep.json").write_text('{"version": 7}')
    with pytest.raises(RemoteError, match="version is not 1"):
        hub.stop()
    assert hub.state().state == "silent"


def test_an_island_on_the_hubs_own_machine_needs_no_ssh(place: Place, tmp_path: Path) -> None:
    spec = IslandSpec(name="own", launch=LaunchSpec(twin="torch"))
    hub = RemoteIsland(spec, hub_folder=tmp_path / "runs" / "r", ssh_config="", lease_s=60.0)
    assert hub.run_folder == str(tmp_path / "runs" / "r.own")
    assert hub.state().state == "absent"
    # The real worker refuses this order at once, and says so by its status.
    found = hub.start(b"{}")
    assert found.round == 1
    until(lambda: not hub.state().at_work)
    assert hub.state().state == "exited"
    assert hub.state().exit_status not in (0, 75)
