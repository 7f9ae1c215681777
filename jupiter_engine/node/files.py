"""Files of the node runner: written whole or not at all, read without surprises."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""A full disk, a used up quota, a size limit: writing may work again later."""


def write_all(fd: int, data: bytes) -> None:
    """Write every byte; a file may take less than asked for when it meets a limit."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def write_atomic(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Temporary name, fsync, rename, fsync of the folder. OSError as the system gives it; then nothing has changed.

    Without `sync` a loss of power may leave an empty file: for what is written often and can be found again.
    """
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            write_all(fd, data)
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
        temp.replace(path)
        if sync:
            sync_folder(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            temp.unlink()
        raise


def write_json(path: Path, value: object, *, sync: bool = True) -> None:
    """A JSON document and a newline, as `write_atomic` writes."""
    write_atomic(path, json.dumps(value, indent=1).encode("utf-8") + b"\n", sync=sync)


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder survive a loss of power."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        # Some network file systems cannot sync a folder; the rename has been done all the same.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None if the file is missing or holds no such thing (a loss of power can leave it empty)."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def no_room(folder: Path, least_bytes: int = 64 << 10) -> bool:
    """Whether the file system of `folder` has less than `least_bytes` left for us."""
    usage = os.statvfs(folder)
    return usage.f_bavail * usage.f_frsize < least_bytes


def complain(text: str) -> None:
    """A line for whoever reads our log. The log may lie on the very disk that is full: that must not end us."""
    with contextlib.suppress(OSError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
