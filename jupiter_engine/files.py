"""Writing whole or not at all, hashing, and knowing whether a process is still ours."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil

from jupiter_engine.errors import DiskFull, StateError
from jupiter_engine.units import bytes_text


def disk_full(error: OSError, path: Path) -> OSError | DiskFull:
    """Translate ENOSPC/EDQUOT into DiskFull; any other OSError is returned unchanged."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(f"no room left while writing {path}", fix="free some space, then run the same command again")
    return error


def write_atomic(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write `data` to `path` whole or not at all: temp file, fsync, rename, fsync of the folder."""
    # A name of this call alone: two threads of one process may write the same file.
    temp = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            sync_file(file.fileno())
        temp.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        temp.unlink(missing_ok=True)
        raise disk_full(error, path) from error


def write_json(path: Path, value: object, *, mode: int = 0o644) -> None:
    """Write `value` (msgspec structs included) as indented JSON, atomically."""
    write_atomic(path, msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n", mode=mode)


def sync_file(descriptor: int) -> None:
    """Return once what was written lies on the disk and survives a power cut.

    On macOS fsync(2) only hands the bytes to the drive, whose cache may lose them; F_FULLFSYNC empties that, too.
    File systems that lack it (network shares) say so, and fsync is what remains.
    """
    if sys.platform == "darwin":
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY):
                raise
        else:
            return
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def require_free(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Raise DiskFull before work starts that could not be stored."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise DiskFull(
            f"{purpose} needs {bytes_text(needed_bytes)} in {folder}, {bytes_text(free)} are free",
            fix="free some space or put the workspace on another disk (--workspace)",
        )


def whole_lines(path: Path, offset_bytes: int = 0) -> Iterator[tuple[bytes, int]]:
    """Yield (line without newline, offset after it) for each complete line at or after `offset_bytes`.

    A torn last line (a writer killed in mid-write) is not yielded.
    """
    with path.open("rb") as file:
        file.seek(offset_bytes)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset_bytes += len(line)
            yield line[:-1], offset_bytes


def drop_torn_tail(path: Path) -> None:
    """Cut a file back to its last complete line (after a kill in mid-write)."""
    if not path.exists():
        return
    end = max((offset for _, offset in whole_lines(path)), default=0)
    if end != path.stat().st_size:
        with path.open("r+b") as file:
            file.truncate(end)


class ProcessIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """A process by pid and start time: a reused pid is never mistaken for ours."""

    pid: int
    started_at: float
    """Seconds since the epoch, as the operating system reports it."""

    @staticmethod
    def of(pid: int) -> ProcessIdentity:
        return ProcessIdentity(pid=pid, started_at=psutil.Process(pid).create_time())

    def process(self) -> psutil.Process | None:
        """The live process, or None once it has ended (zombies count as ended)."""
        try:
            process = psutil.Process(self.pid)
            # create_time is derived from jiffies: two readings may differ by a tick.
            if abs(process.create_time() - self.started_at) > 1.0 or process.status() == psutil.STATUS_ZOMBIE:
                return None
        except psutil.NoSuchProcess:
            return None
        return process

    def alive(self) -> bool:
        return self.process() is not None


def read_json(path: Path, kind: type[msgspec.Struct]) -> msgspec.Struct:
    """Read a JSON file of our own; a damaged one is a StateError naming the file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StateError(
            f"{path} cannot be read: {error}", fix="restore the file from a backup, or remove it to redo that step"
        ) from error
