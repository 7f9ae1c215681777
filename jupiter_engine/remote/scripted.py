"""A fake machine for tests: processes are scripts in memory, files live in a folder of this machine."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path, PurePath

from jupiter_engine.errors import RemoteError
from jupiter_engine.files import ProcessIdentity
from jupiter_engine.remote.local import LocalRemote

Script = Callable[[Path], bool]
"""Called with the run folder when its worker starts; returns whether the worker goes on living."""


class ScriptedRemote(LocalRemote):
    """Records what was started; `script` plays the worker (writes facts), `die` ends it."""

    name = "scripted"

    def __init__(self, script: Script) -> None:
        super().__init__()
        self.script = script
        self.started: list[tuple[str, ...]] = []
        self.stopped: list[ProcessIdentity] = []
        self._living: set[int] = set()
        # Above every real pid, so a test can never signal a real process.
        self._pids = itertools.count(1 << 30)

    async def start(
        self, argv: tuple[str, ...], *, folder: PurePath, log: PurePath, env: dict[str, str]
    ) -> ProcessIdentity:
        if not argv:
            raise RemoteError("nothing to start", host=self.name)
        self.started.append(argv)
        pid = next(self._pids)
        if self.script(Path(argv[-1])):
            self._living.add(pid)
        return ProcessIdentity(pid=pid, started_at=1.0)

    async def alive(self, process: ProcessIdentity) -> bool:
        return process.pid in self._living

    async def stop(self, process: ProcessIdentity, *, grace_s: float) -> None:
        self.stopped.append(process)
        self._living.discard(process.pid)

    def die(self) -> None:
        """Kill every living scripted worker, as kill -9 would."""
        self._living.clear()
