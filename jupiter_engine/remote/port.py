"""The one port through which the control wing touches a machine: start, watch, read, write, stop."""

from __future__ import annotations

from pathlib import PurePath
from typing import Protocol

from jupiter_engine.files import ProcessIdentity


class Remote(Protocol):
    """A machine. Every method may raise RemoteError with the facts of what failed."""

    name: str

    async def start(
        self, argv: tuple[str, ...], *, folder: PurePath, log: PurePath, env: dict[str, str]
    ) -> ProcessIdentity:
        """Start a process of its own session that outlives us; its output is appended to `log`."""

    async def alive(self, process: ProcessIdentity) -> bool:
        """Whether exactly this process (pid and start time) still runs."""

    async def stop(self, process: ProcessIdentity, *, grace_s: float) -> None:
        """End the process's session: SIGTERM, and SIGKILL once `grace_s` has passed."""

    async def read(self, path: PurePath, offset_bytes: int = 0) -> bytes:
        """Content from the offset on; empty if the file does not exist."""

    async def write(self, path: PurePath, data: bytes) -> None:
        """Write whole or not at all, creating the folder."""

    async def remove(self, path: PurePath) -> None:
        """Remove a file; a missing one is fine."""
