"""A workspace whose model is trained by islands on three real hosts (tests.rig): node1 merges, node2 is an island of
two MLX ranks, node3 one of two torch ranks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import psutil

from tests.faults.cluster import LOST_AFTER_S, TRAIN, Cluster, domain
from tests.nano_workspace import make_workspace
from tests.rig import Rig, RigHost

ISLANDS = {"macs": "node2", "boxes": "node3"}


class IslandCluster(Cluster):
    """This machine does everything but the training, and trains nothing."""

    def __init__(
        self,
        rig: Rig,
        root: Path,
        *,
        steps: int,
        round_s: float = 10.0,
        max_steps: int = 4,
        hub: str = "node1",
        boxes: str = "nodes: [node3], ranks_per_node: 2",
    ) -> None:
        """`max_steps`: of an island in a round; the torch one would else make dozens."""
        self.rig, self.root, self.steps, self.engine = rig, root, steps, None
        make_workspace(root, domain=domain(steps=steps, twin="mlx"))
        kinds = {"node1": "cpu", "node2": "mac", "node3": "cpu"}
        nodes = "".join(
            f"  - {{host: {host.address}, name: {host.name}, device_type: {kinds[host.name]}, role: trainer,"
            f" ssh_user: root, identity: {rig.identity}, environment: own, python: {sys.executable},"
            f" workdir: {host.disk}/jupiter}}\n"
            for host in rig.hosts
        )
        groups = f"  - {{name: macs, nodes: [node2], ranks_per_node: 2}}\n  - {{name: boxes, {boxes}}}\n"
        (root / "config" / "cluster.yaml").write_text(
            "nodes:\n  - {host: localhost, name: here, device_type: cpu, role: hybrid, can_train: false}\n"
            f"{nodes}groups:\n{groups}"
            f"islands:\n  groups: [macs, boxes]\n  hub: {hub}\n"
            f"  rounds: {{round_s: {round_s}, max_steps: {max_steps}, grace_s: 30, quorum: 1}}\n"
            "launch: {threads_per_rank: 1}\n"
            "connection: {keepalive_s: 3, connect_timeout_s: 5, reconnect_max_s: 2}\n"
            f"retries: {{node_lost_after_s: {LOST_AFTER_S}, group_restarts_per_hour: 20}}\n"
        )
        (root / ".jupiter").mkdir(exist_ok=True)
        (root / ".jupiter" / "known_hosts").write_bytes(rig.known_hosts.read_bytes())

    def start_and_wait_for_refusal(self) -> str:
        """Run the cycle until it gives up; what it says then."""
        self.start()
        assert self.engine is not None
        assert self.engine.wait(timeout=180.0) != 0, self.story()
        return self.jupiter("status").stdout

    def island_run(self, name: str) -> Path:
        """An island's run folder on its host, seen from here."""
        host = self.rig[ISLANDS[name]]
        found = list((host.disk / "jupiter" / "workspaces").glob(f"*/runs/{TRAIN}.{name}"))
        return found[0] if found else host.disk / "missing"

    def order(self, host: RigHost) -> dict[str, Any]:
        """The order of the hub."""
        found: dict[str, Any] = json.loads((self.run_on(host) / "spec.json").read_bytes())
        return found

    def workers(self, host: RigHost) -> list[int]:
        """Train workers (hub or island) of a host, by this machine's numbers."""
        found = []
        for pid in host.pids():
            try:
                line = psutil.Process(pid).cmdline()
            except psutil.NoSuchProcess:
                continue
            if line[1:3] == ["-m", "jupiter_engine.worker"]:
                found.append(pid)
        return found

    def story(self) -> str:
        parts = [super().story()]
        for name in ISLANDS:
            run = self.island_run(name)
            logs = [run / "worker.log", run / "events.jsonl", *sorted(run.glob("ranks/*/output.log"))[-1:]]
            parts += [
                f"--- {name} {path}\n{path.read_text(errors='replace')[-3000:]}" for path in logs if path.exists()
            ]
        return "\n".join(parts)
