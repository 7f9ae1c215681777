"""Training on three hosts while everything that can die dies: it goes on, says who was the matter, loses nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tests.faults.cluster import LOST_AFTER_S, TRAIN, Cluster
from tests.rig import Rig, why_no_rig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(why_no_rig() is not None, reason=why_no_rig() or ""),
]


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig(3, disk_bytes=512 << 20) as rig:
        yield rig


class Clusters(Protocol):
    def __call__(self, *, launcher: str, twin: str, steps: int) -> Cluster: ...


@pytest.fixture
def clusters(rig: Rig, tmp_path: Path) -> Iterator[Clusters]:
    made: list[Cluster] = []

    def make(*, launcher: str, twin: str, steps: int) -> Cluster:
        made.append(Cluster(rig, tmp_path / "workspace", launcher=launcher, twin=twin, steps=steps))
        return made[-1]

    yield make
    for cluster in made:
        cluster.kill_engine()


def test_a_training_outlives_engine_rank_runner_launcher_and_host(rig: Rig, clusters: Clusters) -> None:
    cluster = clusters(launcher="direct", twin="torch", steps=280)
    leader, second, third = rig.hosts
    cluster.jupiter("nodes", "link", "--group", "all")
    cluster.start()
    cluster.wait(lambda: cluster.step_here() >= 5, "the first steps", 180.0)

    # The laptop is closed: the engine is killed, the ranks go on; the next engine finds everything.
    cluster.kill_engine()
    cluster.wait_for_steps(10, host=leader)
    meanwhile = cluster.step_there(leader)
    cluster.start()
    cluster.wait(lambda: cluster.step_here() >= meanwhile, "what happened meanwhile")
    cluster.wait_for_notice("re-attached to the train worker")
    assert cluster.generation(leader) == 1

    # The way between the engine and the leading host is closed: over there it goes on, here it is caught up with.
    leader.run("ip", "route", "add", "blackhole", rig.gateway)
    cluster.wait_for_notice("node1 does not answer")
    cluster.wait_for_steps(10, host=leader)
    leader.run("ip", "route", "del", "blackhole", rig.gateway)
    cluster.wait_for_notice("node1 answers again")
    cluster.wait(lambda: cluster.step_here() >= cluster.step_there(leader) - 5, "what happened meanwhile")
    assert cluster.generation(leader) == 1

    # A rank is killed: the group starts again from its last checkpoint, and the journal names the rank.
    os.kill(cluster.rank_pid(third), signal.SIGKILL)
    cluster.wait_for_notice("rank 2 on node3", "KILL")
    assert cluster.wait_for_steps(3) < 120
    assert cluster.generation(leader) == 2

    # A rank is stopped: the stall is named with the rank that the others wait for; then it goes on.
    rank = cluster.rank_pid(second)
    os.kill(rank, signal.SIGSTOP)
    named = cluster.wait_for_notice("STALLED", "rank 1 on node2: its process is stopped")
    os.kill(rank, signal.SIGCONT)
    assert named < 10 + 10
    cluster.wait_for_notice("the ranks go on")
    assert cluster.generation(leader) == 2

    # A node runner is killed: nobody notices, the ranks go on.
    os.kill(cluster.pid_of(leader, ("keep-run", f"{TRAIN}/node")), signal.SIGKILL)
    cluster.wait_for_steps(5)

    # The launcher is killed: its ranks end, the group starts again.
    os.kill(cluster.pid_of(leader, ("group",)), signal.SIGKILL)
    cluster.wait(lambda: cluster.generation(leader) == 3, "the third launch")
    cluster.wait_for_steps(3)

    # A host loses its power: after its time it is left out, and the others go on without it.
    third.power_off()
    off_at = time.monotonic()
    cluster.wait_for_notice("node3", "the group goes on without it", timeout_s=120.0)
    cluster.wait_for_steps(3)
    assert time.monotonic() - off_at < LOST_AFTER_S + 100

    cluster.finish()
    cluster.check_whole()


def test_the_next_host_leads_when_the_leading_one_is_gone(rig: Rig, clusters: Clusters) -> None:
    cluster = clusters(launcher="direct", twin="torch", steps=200)
    leader, second, _ = rig.hosts
    cluster.jupiter("nodes", "link", "--group", "all")
    cluster.start()
    copies = cluster.run_on
    cluster.wait(lambda: list(copies(second).glob("checkpoints/step-*")), "a copied checkpoint", 180.0)
    before = cluster.step_here()
    leader.power_off()
    cluster.wait_for_notice("node1 has not answered", "node2 takes over", timeout_s=180.0)
    cluster.wait(lambda: cluster.step_here() > before, "steps under the new leader", 180.0)
    leader.boot()
    cluster.finish()
    cluster.check_whole()
    started = [text for text in cluster.notices() if "works on" in text]
    assert started[0].endswith("works on node1, node2, node3")
    assert started[1].endswith("works on node2, node3")


def test_an_mlx_ring_by_mlx_launch_survives_a_link_that_is_cut_and_a_killed_rank(rig: Rig, clusters: Clusters) -> None:
    cluster = clusters(launcher="mlx.launch", twin="mlx", steps=40)
    leader, second, third = rig.hosts
    cluster.jupiter("nodes", "link", "--group", "all")
    cluster.start()
    cluster.wait(lambda: cluster.step_here() >= 3, "the first steps", 180.0)

    # The cable between two hosts is out for some seconds: nothing dies of it.
    second.cut()
    time.sleep(6.0)
    second.heal()
    cluster.wait_for_steps(2)
    assert cluster.generation(leader) == 1

    os.kill(cluster.rank_pid(third), signal.SIGKILL)
    cluster.wait_for_notice("rank 2 on node3", "KILL")
    cluster.wait(lambda: cluster.generation(leader) == 2, "the second launch")
    cluster.finish()
    cluster.check_whole()
    # Nothing of mlx.launch is left in the hosts' temporary folders.
    for host in rig.hosts:
        assert not [path for path in host.temporary_files() if path.name.startswith("tmp.")], host.name


def test_every_role_works_on_its_own_host(rig: Rig, clusters: Clusters) -> None:
    cluster = clusters(launcher="direct", twin="torch", steps=12)
    roles = {"node1": "generator", "node2": "evaluator", "node3": "trainer"}
    file = cluster.root / "config" / "cluster.yaml"
    lines = [line for line in file.read_text().splitlines() if not line.startswith(("groups:", "  - {name: all"))]
    text = "\n".join(lines)
    for name, role in roles.items():
        text = text.replace(
            f"name: {name}, device_type: cpu, role: trainer", f"name: {name}, device_type: cpu, role: {role}"
        )
    file.write_text(f"{text}\n")
    cluster.start()
    cluster.finish()
    where = {
        text.split(" works on ")[0].rpartition("-")[2]: text.split(" works on ")[1]
        for text in cluster.notices()
        if " works on " in text
    }
    assert where == {"generate": "node1", "evaluate": "node2", "train": "node3"}
    cluster.check_whole()


def test_a_full_disk_of_the_leading_host_is_said_and_the_training_goes_on_when_there_is_room(
    rig: Rig, clusters: Clusters
) -> None:
    cluster = clusters(launcher="direct", twin="torch", steps=60)
    leader = rig["node1"]
    cluster.jupiter("nodes", "link", "--group", "all")
    cluster.start()
    cluster.wait(lambda: cluster.step_here() >= 3, "the first steps", 180.0)
    filler = leader.disk / "filler"
    with filler.open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
    assert cluster.engine is not None
    cluster.wait(lambda: cluster.engine is not None and cluster.engine.poll() is not None, "the cycle's end", 120.0)
    assert cluster.status() == "failed", cluster.story()
    shown = cluster.jupiter("status").stdout
    assert "The disk is full" in shown, shown
    filler.unlink()
    cluster.start()
    cluster.finish()
    cluster.check_whole()
