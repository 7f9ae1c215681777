"""Islands of both frameworks on hosts of their own under a hub on a third: trained to the end whatever is killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.cluster import CYCLE, TRAIN
from tests.faults.island_cluster import ISLANDS, IslandCluster
from tests.rig import Rig, why_no_rig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(why_no_rig() is not None, reason=why_no_rig() or ""),
]

BOXES = "nodes: [node3, node1], launcher: direct"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[IslandCluster]:
    with Rig(3, disk_bytes=700 << 20) as rig:
        cluster = IslandCluster(rig, tmp_path / "workspace", steps=60, round_s=6.0)
        yield cluster
        cluster.kill_engine()


def rounds(cluster: IslandCluster) -> int:
    """Merged rounds, as they are known here."""
    path = cluster.root / ".jupiter" / "runs" / TRAIN / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def check_whole(cluster: IslandCluster) -> None:
    """Every step was merged once, every fact came once and in order, the model is here, nothing runs anywhere."""
    run = cluster.root / ".jupiter" / "runs" / TRAIN
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    steps = [metric["step"] for metric in metrics]
    assert steps == sorted(set(steps))
    assert steps[-1] == cluster.steps
    facts: list[dict[str, Any]] = [json.loads(line) for line in (run / "events.jsonl").read_bytes().splitlines()]
    assert [fact["seq"] for fact in facts] == list(range(1, len(facts) + 1))
    assert facts[-1]["fact"] == "finished"
    result = facts[-1]["result"]
    assert result["steps"] == cluster.steps
    assert result["tokens"] == metrics[-1]["tokens"]
    assert (cluster.root / ".jupiter" / "models" / CYCLE / "model.safetensors").exists()
    up = [host for host in cluster.rig.hosts if host.up]
    cluster.wait(lambda: not any(cluster.jupiter_processes(host) for host in up), "rest on all hosts")


def test_islands_of_both_frameworks_outlive_their_worker_and_their_hub(cluster: IslandCluster) -> None:
    hub, macs, _ = cluster.rig.hosts
    refused = cluster.start_and_wait_for_refusal()
    assert "jupiter nodes link --group islands" in refused
    cluster.jupiter("nodes", "link", "--group", "islands")
    cluster.start()
    cluster.wait(lambda: rounds(cluster) >= 1, "the first merge", 240.0)
    order = cluster.order(hub)
    assert {island["name"]: island["launch"]["twin"] for island in order["launch"]["islands"]} == {
        "macs": "mlx",
        "boxes": "torch",
    }
    assert all(cluster.island_run(name).is_dir() for name in ISLANDS)

    # The worker that leads the MLX island is killed: the hub starts it again there.
    (worker,) = cluster.workers(macs)
    os.kill(worker, signal.SIGKILL)
    cluster.wait(lambda: cluster.workers(macs) not in ([], [worker]), "the island's next worker")
    seen = rounds(cluster)
    cluster.wait(lambda: rounds(cluster) > seen, "a merge after it", 180.0)

    # The hub is killed: its islands train on, and the next hub finds them as they are.
    before = {name: cluster.workers(cluster.rig[node]) for name, node in ISLANDS.items()}
    (worker,) = cluster.workers(hub)
    os.kill(worker, signal.SIGKILL)
    cluster.wait(lambda: cluster.workers(hub) not in ([], [worker]), "the next hub")
    assert {name: cluster.workers(cluster.rig[node]) for name, node in ISLANDS.items()} == before

    cluster.finish(600.0)
    check_whole(cluster)


def test_an_islands_machine_merges_when_that_of_the_hub_is_gone(cluster: IslandCluster) -> None:
    hub, macs, _ = cluster.rig.hosts
    cluster.jupiter("nodes", "link", "--group", "islands")
    cluster.start()
    cluster.wait(lambda: list(cluster.run_on(macs).glob("copies/[0-9]*")), "a copy of the hub's state", 240.0)
    cluster.wait(lambda: rounds(cluster) >= 2, "two merges", 180.0)
    hub.power_off()
    cluster.wait_for_notice("node1 has not answered", "node2 takes over", timeout_s=240.0)
    cluster.wait_for_notice("Taken over from another machine's hub", timeout_s=120.0)
    hub.boot()
    cluster.finish(600.0)
    check_whole(cluster)
    started = [text for text in cluster.notices() if "-train works on" in text]
    assert started[0].endswith("works on node1, node2, node3")
    assert started[1].endswith("works on node2, node3")


def test_this_machine_may_merge_and_an_island_may_have_two_hosts(tmp_path: Path) -> None:
    with Rig(3, disk_bytes=700 << 20) as rig:
        cluster = IslandCluster(rig, tmp_path / "workspace", steps=12, round_s=6.0, hub="here", boxes=BOXES)
        try:
            cluster.jupiter("nodes", "link")
            cluster.start()
            cluster.finish(400.0)
            check_whole(cluster)
            said = cluster.jupiter("nodes", "topology").stdout
            assert "Islands: macs (node2), boxes (node3, node1). here merges what they have learnt every 6s." in said
        finally:
            cluster.kill_engine()
