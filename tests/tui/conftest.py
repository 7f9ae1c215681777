"""The console on a recorded workspace, driven by keys."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from textual.pilot import Pilot

from jupiter_engine.protocol.commands import AnyCommand
from jupiter_tui.app import ConsoleApp
from tests.tui.played_fleet import PlayedMachines, several
from tests.tui.recorded import RecordedWorkspace, Until, record


@dataclass
class Session:
    """The console under test: what it shows, and the commands that it gave."""

    app: ConsoleApp
    pilot: Pilot[Any]
    root: Path
    commands: list[AnyCommand] = field(default_factory=list)
    machines: PlayedMachines = field(default_factory=PlayedMachines)

    def screen(self) -> str:
        strips = self.app.screen._compositor.render_strips()
        return "\n".join("".join(segment.text for segment in strip) for strip in strips)

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        for _ in range(200):
            await self.pilot.pause()
            if condition():
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"never: {what}\n{self.screen()}")

    async def shows(self, *parts: str) -> str:
        """Wait until the screen holds all parts; returns it."""
        await self.until(lambda: all(part in self.screen() for part in parts), f"shown: {parts}")
        return self.screen()

    async def gave(self, command: AnyCommand) -> None:
        await self.until(lambda: command in self.commands, f"given: {command}; there: {self.commands}")

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.pilot.pause()

    async def type(self, text: str) -> None:
        await self.pilot.press(*text, "enter")
        await self.pilot.pause()


Open = Callable[..., AbstractAsyncContextManager[Session]]


@pytest.fixture
def console(tmp_path: Path) -> Open:
    @asynccontextmanager
    async def opened(
        until: Until,
        size: tuple[int, int] = (120, 36),
        *,
        verdict: Literal["promote", "worse"] = "promote",
        engine: bool = True,
        machines: PlayedMachines | None = None,
        **options: Any,
    ) -> AsyncIterator[Session]:
        root = record(tmp_path / "w", until, verdict=verdict)
        commands: list[AnyCommand] = []
        played = machines or PlayedMachines(several())
        opener = lambda _: RecordedWorkspace(root, commands, engine=engine, machines=played)  # noqa: E731
        app = ConsoleApp(opener=opener, **options)
        async with app.run_test(size=size, notifications=True) as pilot:
            session = Session(app, pilot, root, commands, played)
            await session.until(lambda: app.desk.picture.loaded, "the first picture")
            yield session

    return opened
