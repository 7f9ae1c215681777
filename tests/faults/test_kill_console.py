"""kill -9 of the console in every stage: the work goes on, and the next console shows it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from jupiter_engine.api import Workspace
from jupiter_engine.protocol.commands import StartCycles
from jupiter_engine.protocol.journal import STAGES
from tests.nano_workspace import make_workspace
from tests.pty.terminal import Terminal, console

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_a_console_killed_in_every_stage_changes_nothing(tmp_path: Path) -> None:
    make_workspace(tmp_path)
    with Workspace(tmp_path) as workspace:
        workspace.perform(StartCycles(domain="tiny", mode="auto"))
        engine = workspace.engine()
        assert engine is not None
        killed_in: set[str] = set()
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            workspace.refresh()
            cycle = workspace.state.cycles["tiny-0001"]
            if cycle.status != "running":
                break
            stage = cycle.current_stage()
            with Terminal(console(workspace=tmp_path)) as terminal:
                terminal.wait_for("tiny")
                terminal.process.send_signal(signal.SIGKILL)
            killed_in.add(stage.stage if stage is not None else "report")
        assert cycle.status == "finished", [n.text for n in workspace.state.notices]
        assert workspace.engine() == engine
        # Stages of milliseconds may pass between two consoles.
        assert len(killed_in) >= 3, killed_in
        assert killed_in <= set(STAGES)
        assert all(s.attempt == 1 for s in cycle.stages.values())
        os.kill(engine.identity.pid, signal.SIGTERM)
        while workspace.engine() is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert workspace.engine() is None
