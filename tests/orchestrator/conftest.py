"""A workspace with an engine whose workers are played."""

from __future__ import annotations

from pathlib import Path

import pytest

from jupiter_engine.orchestrator.engine import Engine
from jupiter_engine.protocol.commands import AnyCommand
from jupiter_engine.protocol.state import CycleState
from jupiter_engine.remote.scripted import ScriptedRemote
from jupiter_engine.settings.workspace import create
from tests.orchestrator.scripted_worker import ScriptedWorker


class Rig:
    """An engine that can be killed and started anew on the same workspace."""

    def __init__(self, root: Path) -> None:
        create(root)
        self.root = root
        self.worker = ScriptedWorker()
        self.remote = ScriptedRemote(self.worker)
        self.engine = Engine(root, self.remote)

    def kill_engine(self) -> None:
        """As kill -9 would: nothing is closed or told; a new engine opens the same files."""
        self.engine = Engine(self.root, self.remote)

    def ask(self, command: AnyCommand) -> str | None:
        """Submit; the refusal's sentence or None. Only the command is carried out, no cycle is advanced."""
        number = self.engine.database.submit(command)
        self.engine._carry_out_commands()
        answered, refusal = self.engine.database.command_answer(number)
        assert answered
        return None if refusal is None else f"{refusal.detail} -> {refusal.fix}"

    async def steps(self, most: int = 200) -> int:
        """Step until nothing happens any more; the number of steps taken."""
        for count in range(most):
            if not await self.engine.step():
                return count
        raise AssertionError(f"still busy after {most} steps")

    def cycle(self, name: str = "python-0001") -> CycleState:
        return self.engine.state.cycles[name]


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)
