"""This machine as a Remote: the same contract without a network."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from pathlib import Path, PurePath
from typing import Any

import psutil

from jupiter_engine.errors import RemoteError
from jupiter_engine.files import ProcessIdentity, disk_full, write_atomic

READ_BYTES = 64 << 20
"""Most that is read at once: a run folder may be a mirror of another machine's, which does not get all our memory."""


class LocalRemote:
    """Runs workers as detached processes of this machine."""

    name = "this machine"

    def __init__(self) -> None:
        # Kept so that ended children are reaped; a process we did not start ourselves is init's to reap.
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    async def start(
        self, argv: tuple[str, ...], *, folder: PurePath, log: PurePath, env: dict[str, str]
    ) -> ProcessIdentity:
        try:
            with Path(log).open("ab") as output:
                child = subprocess.Popen(
                    argv,
                    cwd=folder,
                    env={**os.environ, **env},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise RemoteError(f"{argv[0]} could not be started: {error}", host=self.name, argv=argv) from error
        self._children[child.pid] = child
        try:
            return ProcessIdentity.of(child.pid)
        except psutil.NoSuchProcess:
            # Ended within microseconds; its log says why, and `alive` will say so.
            return ProcessIdentity(pid=child.pid, started_at=0.0)

    async def alive(self, process: ProcessIdentity) -> bool:
        child = self._children.get(process.pid)
        if child is None:
            return process.alive()
        if child.poll() is None:
            return True
        del self._children[process.pid]
        return False

    async def stop(self, process: ProcessIdentity, *, grace_s: float) -> None:
        if not process.alive():
            return
        os.kill(process.pid, signal.SIGTERM)
        for _ in range(int(grace_s / 0.1) + 1):
            if not await self.alive(process):
                return
            await asyncio.sleep(0.1)
        # The worker leads its own session: its ranks go with it.
        if process.alive():
            os.killpg(process.pid, signal.SIGKILL)

    async def read(self, path: PurePath, offset_bytes: int = 0) -> bytes:
        try:
            with Path(path).open("rb") as file:
                file.seek(offset_bytes)
                return file.read(READ_BYTES)
        except FileNotFoundError:
            return b""

    async def write(self, path: PurePath, data: bytes) -> None:
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_full(error, target) from error
        write_atomic(target, data)

    async def remove(self, path: PurePath) -> None:
        Path(path).unlink(missing_ok=True)

    def localise(self, result: dict[str, Any]) -> dict[str, Any]:
        return result
