"""What a node runner says, in types, and every doubt about it.

A node is another machine: it may be broken, or hostile. Nothing it sends is believed before it was checked here.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from jupiter_engine.errors import RemoteError
from jupiter_engine.units import plain_text

HEADER_BYTES = 64 << 10
PIECE_BYTES = 1 << 20
"""Most content of one frame."""
PATH_BYTES = 512
PATH_DEPTH = 8
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\\\ud800-\udfff]")


class RunnerState(msgspec.Struct, frozen=True, kw_only=True):
    """The runner of a keep folder."""

    alive: bool
    pid: int = 0
    started_at: float = 0.0
    boot_id: str = ""
    version: str = ""
    round: int = 0
    beat_at: float = 0.0
    """By the node's own clock."""
    ended_at: float | None = None
    """When it had seen everything through to its end."""
    waiting_events: int = 0
    """Events it could not write yet because the node's disk is full."""


class ProcessState(msgspec.Struct, frozen=True, kw_only=True):
    """One kept process as the node sees it."""

    state: Literal["waiting", "running", "exited", "lost"]
    """`lost`: it has ended and nobody can know how (the node restarted, or its parent was killed)."""
    pid: int = 0
    started_at: float = 0.0
    """Seconds since the epoch by the node's clock; with `pid` and `boot_id` it is the process's identity."""
    boot_id: str = ""
    round: int = 0
    status: str = ""
    """Of a running one, the letter ps gives: T is stopped, D hangs in a driver."""
    exit_status: int | None = None
    signal: str | None = None
    """TERM, KILL, ...: what ended it."""
    ended_at: float | None = None
    error: str = ""
    """Why it could not be started."""


class KeepState(msgspec.Struct, frozen=True, kw_only=True):
    """A keep folder as verb `state` and the beats of `follow` tell it."""

    runner: RunnerState
    processes: dict[str, ProcessState]
    round: int = 0
    events_seq: int = 0
    disk_full: bool = False

    def at_work(self) -> bool:
        """Whether anything of it lives or is still to be seen through: a process, or their runner."""
        return self.runner.alive or any(process.state == "running" for process in self.processes.values())


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to a command."""

    id: str
    done: bool
    processes: dict[str, ProcessState] = {}
    stuck: tuple[int, ...] = ()
    """Pids that not even SIGKILL ended: they hang in a driver."""
    sent: int | None = None
    """To how many processes a signal went."""
    uncertain: bool = False
    """The runner was killed while it sent a signal: it may have gone, and is not sent again."""


class FileFrame(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes appended to a file."""

    path: str
    inode: int
    offset: int
    data: bytes


class ResetFrame(msgspec.Struct, frozen=True, kw_only=True):
    """A file is another one now: its content follows from the beginning, at least `size` bytes of it."""

    path: str
    inode: int
    size: int


class BeatFrame(msgspec.Struct, frozen=True, kw_only=True):
    """The node lives."""

    at: float
    """By the node's clock."""
    state: KeepState | None
    """None: nothing is kept there (yet)."""


Frame = FileFrame | ResetFrame | BeatFrame


class Position(msgspec.Struct, frozen=True, kw_only=True):
    """How far a file has been received, as `follow` is asked to go on."""

    inode: int
    offset: int
    check: str
    """SHA-256 of the last 64 KiB (or all) before `offset`."""


class _File(msgspec.Struct, frozen=True, tag_field="f", tag="file"):
    path: str
    inode: int
    offset: int
    size: int


class _Reset(msgspec.Struct, frozen=True, tag_field="f", tag="reset"):
    path: str
    inode: int
    size: int = 0


class _Beat(msgspec.Struct, frozen=True, tag_field="f", tag="beat"):
    at: float
    state: Any = None


class _Error(msgspec.Struct, frozen=True):
    kind: str = ""
    detail: str = ""
    fix: str = ""


class _Failed(msgspec.Struct, frozen=True):
    error: _Error


class NodeRefused(RemoteError):
    """The node runner could not do what it was asked, and said why."""

    title = "The node could not do it"

    def __init__(self, reason: str, detail: str, fix: str, *, host: str) -> None:
        """`reason` is the runner's slug for the failure: usage, missing, order, runner, timeout, internal, ..."""
        super().__init__(detail, host=host, fix=fix)
        self.reason = reason


_header = msgspec.json.Decoder(_File | _Reset | _Beat)
_failed = msgspec.json.Decoder(_Failed)


def refusal(line: bytes, host: str) -> NodeRefused | None:
    """The error that an answer of the runner is; None if it is something else."""
    try:
        error = _failed.decode(line).error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return NodeRefused(plain_text(error.kind), plain_text(error.detail), plain_text(error.fix), host=host)


def distrusted(what: str, host: str) -> RemoteError:
    """An answer that no honest node runner gives."""
    return RemoteError(f"{host} answered what no node runner answers: {plain_text(what)[:300]}", host=host)


def plain(value: Any) -> Any:
    """A JSON value with all texts in it made safe to show."""
    if isinstance(value, str):
        return plain_text(value)
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    if isinstance(value, dict):
        return {plain_text(key): plain(entry) for key, entry in value.items()}
    return value


def checked_path(path: str, patterns: Sequence[str], host: str) -> str:
    """The path of a file frame if it lies below the folder and was asked for; else RemoteError."""
    parts = path.split("/")
    if len(path.encode("utf-8", "replace")) > PATH_BYTES or len(parts) > PATH_DEPTH or _UNPRINTABLE.search(path):
        raise distrusted(f"a file called {path!r}", host)
    if any(not part or part.startswith(".") for part in parts):
        raise distrusted(f"a file called {path!r}", host)
    if not any(matches(path, pattern) for pattern in patterns):
        raise distrusted(f"the file {path!r}, which nobody asked for", host)
    return path


def matches(path: str, pattern: str) -> bool:
    """Whether a path is one of a pattern's, level by level."""
    parts, wanted = path.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def header_of(line: bytes, patterns: Sequence[str], host: str) -> tuple[FileFrame | ResetFrame | BeatFrame, int]:
    """A frame without its content, and how many bytes of content follow. RemoteError for what cannot be."""
    try:
        header = _header.decode(line)
        state = None
        if isinstance(header, _Beat) and header.state is not None and "error" not in header.state:
            state = msgspec.convert(plain(header.state), KeepState)
    except (msgspec.DecodeError, UnicodeDecodeError, TypeError, RecursionError) as error:
        if (refused := refusal(line, host)) is not None:
            raise refused from error
        raise distrusted(f"a frame with {error}", host) from error
    if isinstance(header, _Beat):
        return BeatFrame(at=header.at, state=state), 0
    path = checked_path(header.path, patterns, host)
    if not 0 <= header.inode < 1 << 64:
        raise distrusted(f"inode {header.inode}", host)
    if isinstance(header, _Reset):
        if not 0 <= header.size < 1 << 53:
            raise distrusted(f"a file of {header.size} bytes", host)
        return ResetFrame(path=path, inode=header.inode, size=header.size), 0
    if not 0 <= header.offset < 1 << 53 or not 0 < header.size <= PIECE_BYTES:
        raise distrusted(f"a piece of {header.size} bytes at {header.offset} in {path}", host)
    return FileFrame(path=path, inode=header.inode, offset=header.offset, data=b""), header.size
