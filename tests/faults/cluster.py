"""A workspace on this machine that trains on three real hosts (tests.rig), driven as a person drives it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil

from jupiter_engine.api import Workspace
from jupiter_engine.protocol.facts import Metric
from tests.nano_workspace import DOMAIN, make_workspace
from tests.rig import Rig, RigHost

CYCLE = "tiny-0001"
TRAIN = f"{CYCLE}-train"
LOST_AFTER_S = 20


def domain(*, steps: int, twin: str) -> str:
    """The tiny domain with a training that is long enough to be disturbed: some steps a second."""
    # MLX's CPU backend is many times slower than torch.
    batch = 48 if twin == "torch" else 6
    size = f"batch_sequences: {batch}\n  micro_batch_sequences: {min(batch, 16)}"
    return (
        DOMAIN.replace("steps: 12", f"steps: {steps}")
        .replace("batch_sequences: 4\n  micro_batch_sequences: 4", size)
        .replace("checkpoint_every_steps: 3", "checkpoint_every_steps: 10")
    )


class Cluster:
    """Hosts node1, node2, node3; node1 leads the training group, this machine does everything else."""

    def __init__(self, rig: Rig, root: Path, *, launcher: str, twin: str, steps: int, more: str = "") -> None:
        self.rig, self.root = rig, root
        make_workspace(root, domain=domain(steps=steps, twin=twin))
        self.steps = steps
        self.engine: subprocess.Popen[bytes] | None = None
        device = "mac" if twin == "mlx" else "cpu"
        nodes = "".join(
            f"  - {{host: {host.address}, name: {host.name}, device_type: {device}, role: trainer, ssh_user: root,"
            f" identity: {rig.identity}, environment: own, python: {sys.executable}, workdir: {host.disk}/jupiter}}\n"
            for host in rig.hosts
        )
        names = ", ".join(host.name for host in rig.hosts)
        (root / "config" / "cluster.yaml").write_text(
            "nodes:\n  - {host: localhost, name: here, device_type: cpu, role: hybrid, can_train: false}\n"
            f"{nodes}groups:\n  - {{name: all, nodes: [{names}], launcher: {launcher}}}\n"
            "launch: {threads_per_rank: 1}\n"
            "connection: {keepalive_s: 3, connect_timeout_s: 5, reconnect_max_s: 2}\n"
            f"retries: {{node_lost_after_s: {LOST_AFTER_S}, group_restarts_per_hour: 20}}\n{more}"
        )
        (root / ".jupiter").mkdir(exist_ok=True)
        (root / ".jupiter" / "known_hosts").write_bytes(rig.known_hosts.read_bytes())

    # -- as a person -----------------------------------------------------------------------------
    def jupiter(self, *words: str, check: bool = True, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "jupiter_engine.cli", *words, "--workspace", str(self.root)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=timeout_s, cwd=self.root)
        assert not check or done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self) -> None:
        """Run the cycle without questions, or go on with it, in a process of its own."""
        argv = [sys.executable, "-m", "jupiter_engine.cli", "start", "--domain", "tiny", "--auto"]
        with (self.root / "auto.log").open("ab") as log:
            self.engine = subprocess.Popen(
                [*argv, "--workspace", str(self.root)], stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.root
            )

    def kill_engine(self) -> None:
        if self.engine is not None:
            self.engine.kill()
            self.engine.wait()

    # -- what is to be seen ----------------------------------------------------------------------
    def notices(self) -> list[str]:
        with Workspace(self.root) as workspace:
            return [entry.entry.text for entry in workspace.entries() if hasattr(entry.entry, "text")]

    def status(self) -> str:
        with Workspace(self.root) as workspace:
            return workspace.state.cycles[CYCLE].status

    def step_here(self) -> int:
        return last_step(self.root / ".jupiter" / "runs" / TRAIN / "metrics.jsonl")

    def run_on(self, host: RigHost) -> Path:
        """The training's folder on a host, seen from here."""
        found = list((host.disk / "jupiter" / "workspaces").glob(f"*/runs/{TRAIN}"))
        return found[0] if found else host.disk / "missing"

    def step_there(self, host: RigHost) -> int:
        return last_step(self.run_on(host) / "metrics.jsonl")

    def generation(self, host: RigHost) -> int:
        return max((int(p.name) for p in (self.run_on(host) / "ranks").glob("*") if p.name.isdigit()), default=0)

    def rank_pid(self, host: RigHost) -> int:
        """Process of the host's rank in its newest launch, by this machine's numbers."""
        folder = self.run_on(host) / "ranks" / str(self.generation(host))
        for path in folder.glob("rank-*.jsonl"):
            for line in path.read_bytes().splitlines():
                report = json.loads(line)
                if report["report"] == "ready":
                    outer = host.outer_pid(report["process"]["pid"])
                    if outer is not None:
                        return outer
        raise AssertionError(f"no living rank on {host.name}")

    def pid_of(self, host: RigHost, words: tuple[str, ...]) -> int:
        """The host's process in whose command line each of these stands as the end of a word."""
        for pid in host.pids():
            try:
                line = psutil.Process(pid).cmdline()
            except psutil.NoSuchProcess:
                continue
            if all(any(part.endswith(word) for part in line) for word in words):
                return pid
        raise AssertionError(f"{host.name} has no process {words}")

    def jupiter_processes(self, host: RigHost) -> list[list[str]]:
        found = []
        for pid in host.pids():
            try:
                line = psutil.Process(pid).cmdline()
            except psutil.NoSuchProcess:
                continue
            if any("jupiter_engine" in word or ".pyz" in word for word in line):
                found.append(line)
        return found

    # -- waiting ---------------------------------------------------------------------------------
    def wait(self, what: Callable[[], object], name: str, timeout_s: float = 90.0) -> float:
        """Seconds it took."""
        began = time.monotonic()
        while time.monotonic() - began < timeout_s:
            if what():
                return time.monotonic() - began
            time.sleep(0.1)
        raise AssertionError(f"{name} did not come within {timeout_s:.0f} s\n{self.story()}")

    def wait_for_steps(self, more: int, *, host: RigHost | None = None, timeout_s: float = 120.0) -> float:
        """Until so many further steps are done (seen on a host's disk, else in the workspace)."""

        def look() -> int:
            return self.step_there(host) if host is not None else self.step_here()

        first = look()
        return self.wait(lambda: look() >= first + more, f"{more} steps after step {first}", timeout_s)

    def wait_for_notice(self, *words: str, timeout_s: float = 90.0) -> float:
        def said() -> bool:
            return any(all(word in text for word in words) for text in self.notices())

        return self.wait(said, f"a notice with {words}", timeout_s)

    def finish(self, timeout_s: float = 300.0) -> None:
        assert self.engine is not None
        try:
            status = self.engine.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the cycle did not end\n{self.story()}") from None
        assert (status, self.status()) == (0, "finished"), self.story()

    def story(self) -> str:
        """Everything that helps to see what went wrong."""
        parts = ["journal: ", *self.notices()[-40:]]
        for host in self.rig.hosts:
            run = self.run_on(host)
            logs = [run / "worker.log", *sorted(run.glob("ranks/*/output.log"))[-1:]]
            logs += sorted(run.glob("ranks/*/group.jsonl"))[-2:]
            parts += [f"--- {host.name} {p}\n{p.read_text(errors='replace')[-3000:]}" for p in logs if p.exists()]
        parts.append((self.root / "auto.log").read_text()[-2000:])
        return "\n".join(parts)

    # -- what must be true at the end ------------------------------------------------------------
    def check_whole(self) -> None:
        """Every step once, every fact once and in order, the model here, nothing left running anywhere."""
        run = self.root / ".jupiter" / "runs" / TRAIN
        metrics = [msgspec.json.decode(line, type=Metric) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
        assert [metric.step for metric in metrics] == list(range(1, self.steps + 1))
        facts: list[dict[str, Any]] = [json.loads(line) for line in (run / "events.jsonl").read_bytes().splitlines()]
        assert [fact["seq"] for fact in facts] == list(range(1, len(facts) + 1))
        assert facts[-1]["fact"] == "finished"
        assert (self.root / ".jupiter" / "models" / CYCLE / "model.safetensors").exists()
        for host in self.rig.hosts:
            deadline = time.monotonic() + 90.0
            while host.up and (left := self.jupiter_processes(host)):
                assert time.monotonic() < deadline, f"{host.name} still has {left}"
                time.sleep(0.2)


def last_step(path: Path) -> int:
    if not path.exists():
        return 0
    lines = [line for line in path.read_bytes().split(b"\n")[:-1] if line]
    return msgspec.json.decode(lines[-1], type=Metric).step if lines else 0
