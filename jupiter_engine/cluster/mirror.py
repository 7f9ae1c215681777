"""A node's run folder, copied here byte by byte as it grows.

How far a file has come is the length of the copy itself: what was appended is received, whatever is killed when.
.mirror.jsonl remembers which file on the node each copy is of (its inode). A file that was replaced over there is
collected under .mirror/ and takes the place of its copy when it is whole: readers never see half of one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from jupiter_engine.cluster.frames import BeatFrame, FileFrame, Position, ResetFrame, checked_path
from jupiter_engine.errors import RemoteError
from jupiter_engine.files import disk_full, whole_lines

PROTECTED: Final = ("spec.json", "keep.json", "placement.json", "lock", "inbox")
"""Files and folders of a run that only this side writes: never taken from a node, whatever the patterns say."""
EVENTS: Final = "events.jsonl"
CHECKED_BYTES: Final = 64 << 10
"""As jupiter_engine.node.tail compares."""
LINE_BYTES: Final = 16 << 20

BeforeEvents = Callable[[bytes], Awaitable[None]]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How much a node may put on our disk through one mirror."""

    files: int = 20_000
    file_bytes: int = 16 << 30
    total_bytes: int = 64 << 30


class _Inode(msgspec.Struct, frozen=True):
    path: str
    inode: int


class _Staged(msgspec.Struct):
    """A new file that is not whole yet."""

    inode: int
    size: int
    path: Path
    received: int = 0


class Mirror:
    """The copy of one run folder. One connection feeds it at a time; call `have` for each new one."""

    def __init__(
        self,
        folder: Path,
        patterns: Sequence[str],
        *,
        before_events: BeforeEvents | None = None,
        limits: Limits | None = None,
        protected: Sequence[str] = PROTECTED,
        host: str = "the node",
    ) -> None:
        """`before_events` is awaited with each complete line of the run's events.jsonl (without its end), in order,
        before the line appears in the copy. After a kill of this side it may be called again for the last line."""
        self._folder = folder
        self._patterns = tuple(patterns)
        self._before_events = before_events
        self._limits = limits or Limits()
        self._protected = {name.casefold() for name in protected}
        self._host = host
        self._inodes: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        self._staged: dict[str, _Staged] = {}
        self._partial = b""
        """What has come of a line of events.jsonl that is not complete."""

    # -- positions -------------------------------------------------------------------------------
    def have(self) -> dict[str, Position]:
        """How far each file is, for `follow`. Forgets what a lost connection left incomplete."""
        shutil.rmtree(self._folder / ".mirror", ignore_errors=True)
        self._staged.clear()
        self._partial = b""
        self._inodes = self._read_inodes()
        if self._before_events is not None:
            self._cut_torn_event()
        self._sizes.clear()
        found: dict[str, Position] = {}
        for pattern in self._patterns:
            for path in self._folder.glob(pattern):
                name = path.relative_to(self._folder).as_posix()
                if name in found or path.is_symlink() or not path.is_file() or self._refused(name):
                    continue
                size = path.stat().st_size
                self._sizes[name] = size
                found[name] = Position(inode=self._inodes.get(name, 0), offset=size, check=_check(path, size))
        return found

    def _read_inodes(self) -> dict[str, int]:
        path = self._folder / ".mirror.jsonl"
        if not path.exists():
            return {}
        known: dict[str, int] = {}
        for line, _ in whole_lines(path):
            # A line that a power cut has torn. If the copy's inode is lost with it, or an older one is left, the file
            # is fetched anew: the node compares the inode and what the copy ends with.
            with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
                entry = msgspec.json.decode(line, type=_Inode)
                known[entry.path] = entry.inode
        return known

    def _remember(self, name: str, inode: int) -> None:
        """Written before the first byte: a copy whose inode nobody knows would be fetched anew."""
        if self._inodes.get(name) == inode:
            return
        path = self._folder / ".mirror.jsonl"
        torn = path.exists() and not _ends_line(path)
        line = msgspec.json.encode(_Inode(name, inode)) + b"\n"
        _append(path, b"\n" + line if torn else line)
        self._inodes[name] = inode

    def _cut_torn_event(self) -> None:
        path = self._folder / EVENTS
        if path.exists():
            end = max((offset for _, offset in whole_lines(path)), default=0)
            os.truncate(path, end)

    # -- frames ----------------------------------------------------------------------------------
    async def apply(self, frame: FileFrame | ResetFrame | BeatFrame) -> None:
        """Take in one frame. RemoteError if it does not fit to what has come before, or may not be written here."""
        if isinstance(frame, BeatFrame):
            return
        name = checked_path(frame.path, self._patterns, self._host)
        if self._refused(name):
            raise self._error(f"it wants to write {name}, which is not its to write")
        if isinstance(frame, ResetFrame):
            self._check_room(name, frame.size, frame.size - self._sizes.get(name, 0))
            self._stage(name, frame)
        elif name in self._staged:
            self._collect(name, frame)
        else:
            await self._take_in(name, frame)
        staged = self._staged.get(name)
        if staged is not None and staged.received >= staged.size:
            await self._put_in_place(name, staged)

    def _refused(self, name: str) -> bool:
        # Some file systems do not tell Spec.json from spec.json.
        return name.split("/")[0].casefold() in self._protected

    def _error(self, what: str) -> RemoteError:
        return RemoteError(f"{self._host} sends a run folder that cannot be: {what}", host=self._host)

    def _check_room(self, name: str, size: int, more_bytes: int) -> None:
        limits = self._limits
        total = sum(self._sizes.values()) + more_bytes
        if size > limits.file_bytes or total > limits.total_bytes:
            raise self._error(f"{name} with {size} bytes, {total} in all")
        if name not in self._sizes and len(self._sizes) >= limits.files:
            raise self._error(f"more than {limits.files} files")

    async def _take_in(self, name: str, frame: FileFrame) -> None:
        here = self._sizes.get(name, 0)
        withheld = self._before_events is not None and name == EVENTS
        expected = here + (len(self._partial) if withheld else 0)
        if frame.offset != expected:
            raise self._error(f"{name} goes on at {frame.offset}, not at {expected}")
        if expected and self._inodes.get(name) != frame.inode:
            raise self._error(f"{name} is another file (inode {frame.inode}) without having been reset")
        self._check_room(name, expected + len(frame.data), len(frame.data))
        self._remember(name, frame.inode)
        if withheld:
            await self._take_in_events(frame.data)
        else:
            self._grow(name, frame.data)

    def _grow(self, name: str, data: bytes) -> None:
        path = self._place(name)
        _append(path, data)
        self._sizes[name] = self._sizes.get(name, 0) + len(data)

    async def _take_in_events(self, data: bytes) -> None:
        """Each line appears after `before_events` has seen it; an incomplete one waits in memory."""
        assert self._before_events is not None
        self._sizes.setdefault(EVENTS, 0)
        waiting, taken = self._partial + data, 0
        # Even if the call fails or is cancelled, what is here and what waits stay one sequence of bytes.
        self._partial = waiting
        try:
            for line in waiting.split(b"\n")[:-1]:
                await self._before_events(line)
                self._grow(EVENTS, line + b"\n")
                taken += len(line) + 1
        finally:
            self._partial = waiting[taken:]
        if len(self._partial) > LINE_BYTES:
            raise self._error(f"a line of {len(self._partial)} bytes in {EVENTS}")

    # -- files that were replaced ----------------------------------------------------------------
    def _stage(self, name: str, frame: ResetFrame) -> None:
        folder = self._folder / ".mirror"
        folder.mkdir(exist_ok=True)
        path = folder / hashlib.sha256(name.encode()).hexdigest()[:32]
        try:
            path.write_bytes(b"")
        except OSError as error:
            raise disk_full(error, path) from error
        self._staged[name] = _Staged(inode=frame.inode, size=frame.size, path=path)
        if name == EVENTS:
            self._partial = b""

    def _collect(self, name: str, frame: FileFrame) -> None:
        staged = self._staged[name]
        if frame.offset != staged.received or frame.inode != staged.inode:
            raise self._error(f"{name} goes on at {frame.offset}, not at {staged.received}, after its reset")
        self._check_room(
            name, frame.offset + len(frame.data), frame.offset + len(frame.data) - self._sizes.get(name, 0)
        )
        _append(staged.path, frame.data)
        staged.received += len(frame.data)

    async def _put_in_place(self, name: str, staged: _Staged) -> None:
        if self._before_events is not None and name == EVENTS:
            self._partial = await self._announce_new(staged.path)
            staged.received -= len(self._partial)
        _sync(staged.path)
        target = self._place(name)
        # The inode comes second: killed in between, the whole file is asked for once more, and nothing is mixed.
        staged.path.replace(target)
        self._sizes[name] = staged.received
        del self._staged[name]
        self._remember(name, staged.inode)

    async def _announce_new(self, path: Path) -> bytes:
        """Await `before_events` for the lines that the present copy does not have; cut off and return the rest."""
        assert self._before_events is not None
        *lines, partial = _lines(path)
        seen = _lines(self._folder / EVENTS)[:-1]
        fresh = next((at for at, line in enumerate(lines) if at >= len(seen) or line != seen[at]), len(lines))
        for line in lines[fresh:]:
            await self._before_events(line)
        os.truncate(path, sum(len(line) + 1 for line in lines))
        return partial

    def _place(self, name: str) -> Path:
        """Where a copy lies; its folder is made, and is no link to anywhere else."""
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if "/" in name and not path.parent.resolve().is_relative_to(self._folder.resolve()):
            raise self._error(f"{name} lies outside its folder: a part of it is a link here")
        return path


def _append(path: Path, data: bytes) -> None:
    """One write at the end of a file that is no link; a disk that fills up leaves the file as it was."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        before = os.fstat(fd).st_size
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(fd, view) :]
        except OSError as error:
            os.ftruncate(fd, before)
            raise disk_full(error, path) from error
    finally:
        os.close(fd)


def _sync(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def _lines(path: Path) -> list[bytes]:
    """All lines without their ends; the last one is what follows the last newline. [b""] for a missing file."""
    return path.read_bytes().split(b"\n") if path.exists() else [b""]


def _ends_line(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size == 0:
            return True
        file.seek(size - 1)
        return file.read(1) == b"\n"


def _check(path: Path, size: int) -> str:
    with path.open("rb") as file:
        file.seek(max(0, size - CHECKED_BYTES))
        return hashlib.sha256(file.read(min(size, CHECKED_BYTES))).hexdigest()
