"""The ports through which the control wing touches a machine.

`Remote` is one run's worker: start, watch, read, write, stop. `Connection` is a whole machine:
commands, streams and files. Both have an adapter for this machine, for ssh, and a scripted one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any, Protocol

import msgspec

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
        """Content from the offset on, 64 MiB at most; empty if the file does not exist."""

    async def write(self, path: PurePath, data: bytes) -> None:
        """Write whole or not at all, creating the folder."""

    async def remove(self, path: PurePath) -> None:
        """Remove a file; a missing one is fine."""

    def localise(self, result: dict[str, Any]) -> dict[str, Any]:
        """A worker's result with its paths as paths of this machine."""


class Completed(msgspec.Struct, frozen=True, kw_only=True):
    """A command that has ended."""

    exit_status: int | None
    """None if a signal ended it."""
    signal: str = ""
    """TERM, KILL, ...; empty if it ended by itself."""
    stdout: bytes = b""
    stderr: bytes = b""
    """Raw: pass through units.plain_text before showing."""


class Stream(Protocol):
    """A command that runs, with its standard output to read piece by piece."""

    async def write(self, data: bytes) -> None:
        """To its standard input; waits while the other side is slow. RemoteError once it has gone."""

    async def close_input(self) -> None: ...

    async def read(self, size_bytes: int) -> bytes:
        """At most `size_bytes` of its output, as soon as there is any; empty at its end."""

    async def read_exactly(self, size_bytes: int) -> bytes:
        """RemoteError if the output ends before."""

    async def read_line(self, limit_bytes: int) -> bytes:
        """One line without its end; empty at the end of output. RemoteError for one longer than the limit."""

    async def wait(self) -> Completed:
        """stdout of the result is empty: it was read from here."""

    async def close(self) -> None:
        """Let go of it; the command is told by the end of its standard input and may live on."""


Progress = Callable[[int], None]
"""Called with the bytes sent or fetched so far."""


class Connection(Protocol):
    """A machine that commands can be run on. All paths are paths there; `~/` is not expanded."""

    name: str
    host: str

    async def run(
        self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 30.0, limit_bytes: int = 16 << 20
    ) -> Completed:
        """Run to its end, whatever its exit status. RemoteError (with host and argv) if the connection fails, the
        time is up, or the output passes the limit. The vector arrives exactly as given, whatever it contains."""

    async def stream(self, argv: Sequence[str]) -> Stream: ...

    async def read(self, path: str, *, offset_bytes: int = 0, limit_bytes: int = 64 << 20) -> bytes:
        """Content from the offset on; empty if the file does not exist."""

    async def write(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """Whole or not at all (temporary name, fsync, rename); makes the folder."""

    async def send(self, files: Sequence[tuple[Path, str]], folder: str, progress: Progress | None = None) -> None:
        """Copy local files to names below `folder`, as one stream."""

    async def fetch(self, folder: str, names: Sequence[str], target: Path, progress: Progress | None = None) -> None:
        """Copy files below `folder` into the local `target`, as one stream. Names from the other side are checked:
        nothing is written outside `target`."""

    async def close(self) -> None: ...
