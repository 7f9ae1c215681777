"""kill -9 of the engine, a worker or the console in every stage, with real processes: nothing lost, nothing twice.

One uninterrupted cycle is the reference. Before each of its stages the workspace is kept;
each case restores one, kills in that stage, starts again and must end with the same results.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import psutil
import pytest

from jupiter_engine.api import Workspace
from jupiter_engine.errors import ExitCode
from jupiter_engine.orchestrator.engine import Engine
from jupiter_engine.protocol.commands import StartCycles
from jupiter_engine.protocol.facts import RunState
from jupiter_engine.protocol.journal import ENGINE_STAGES, STAGES
from jupiter_engine.protocol.state import CycleState
from tests.nano_workspace import make_workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WORKER_STAGES = [stage for stage in STAGES if stage not in ENGINE_STAGES]
CYCLE = "tiny-0001"
VOLATILE = {"tokens_per_s", "seconds"}


class Reference:
    """The uninterrupted cycle and the workspace as it stood before each stage."""

    def __init__(self, root: Path, kept: Path) -> None:
        self.root = root
        self.kept = kept
        self.cycle: CycleState | None = None

    def restore(self, stage: str) -> None:
        shutil.rmtree(self.root)
        shutil.copytree(self.kept / stage, self.root, symlinks=True)


def results(cycle: CycleState) -> dict[str, object]:
    """What the stages found, without what depends on the clock."""
    return {
        name: {key: value for key, value in stage.result.items() if key not in VOLATILE}
        for name, stage in cycle.stages.items()
    }


def auto(root: Path) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "jupiter_engine.cli", "start", "--workspace", str(root), "--domain", "tiny", "--auto"]
    with (root / "auto.log").open("ab") as log:
        return subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=root)


def wait_for(condition: object, what: str, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return
        time.sleep(0.01)
    raise AssertionError(f"timed out waiting for {what}")


def worker_of(root: Path, stage: str) -> int | None:
    path = root / ".jupiter" / "runs" / f"{CYCLE}-{stage}" / "state.json"
    if not path.exists():
        return None
    state = msgspec.json.decode(path.read_bytes(), type=RunState)
    return state.worker.pid if state.worker.alive() else None


def kill(pid: int) -> None:
    # Having just finished is also an instant at which a kill may come.
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


async def uninterrupted(reference: Reference) -> CycleState:
    """Run the cycle with an engine in this process and real workers, keeping the workspace before each stage."""
    engine = Engine(reference.root)
    engine.database.submit(StartCycles(domain="tiny", mode="auto"))
    engine._carry_out_commands()
    kept: set[str] = set()
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        cycle = engine.state.cycles.get(CYCLE)
        stage = cycle.current_stage() if cycle is not None else None
        if stage is not None and stage.status == "pending" and stage.stage not in kept:
            kept.add(stage.stage)
            shutil.copytree(reference.root, reference.kept / stage.stage, symlinks=True)
        if not await engine.step():
            if cycle is not None and cycle.status in ("finished", "failed"):
                break
            await asyncio.sleep(0.02)
    finished = engine.state.cycles[CYCLE]
    assert finished.status == "finished", [n.text for n in engine.state.notices]
    assert kept >= set(WORKER_STAGES)
    engine.database.close()
    return finished


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    base = tmp_path_factory.mktemp("faults")
    reference = Reference(base / "workspace", base / "kept")
    make_workspace(reference.root)
    reference.cycle = asyncio.run(uninterrupted(reference))
    return reference


@pytest.mark.parametrize("victim", ["worker", "engine"])
@pytest.mark.parametrize("stage", WORKER_STAGES)
def test_kill_9_in_every_stage(reference: Reference, stage: str, victim: str) -> None:
    reference.restore(stage)
    root = reference.root
    process = auto(root)
    wait_for(lambda: worker_of(root, stage) or process.poll() is not None, f"the {stage} worker")
    worker = worker_of(root, stage)
    if victim == "worker":
        if worker is not None:
            kill(worker)
    else:
        kill(process.pid)
        process.wait()
        process = auto(root)
    assert process.wait(timeout=300) == ExitCode.DONE, (root / "auto.log").read_text()[-3000:]
    workspace = Workspace(root)
    cycle = workspace.state.cycles[CYCLE]
    assert reference.cycle is not None
    assert cycle.status == "finished"
    assert results(cycle) == results(reference.cycle)
    assert cycle.counts == reference.cycle.counts
    assert len(workspace.state.cycles) == 1
    workspace.close()
    left = [p for p in psutil.process_iter(["cmdline"]) if str(root) in " ".join(p.info["cmdline"] or [])]
    assert left == []
