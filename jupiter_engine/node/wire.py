"""What crosses between a verb and its caller: JSON lines, counted bytes, and names that are not trusted."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .errors import NodeError
from .files import write_atomic

CHUNK_BYTES = 1 << 20
SMALL_BYTES = 64 * 1024
"""Files up to this size lie in packs of the store; see node.store."""
UNTOUCHED_S = 1_000_000_000
"""Modification time of files that we placed: another one means that somebody wrote to them."""
HEADER_BYTES = 64 * 1024
LIST_BYTES = 256 << 20
"""A list of files: some two million of them."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


def standard_input() -> BinaryIO:
    """Standard input, buffered for many small reads."""
    return open(0, "rb", buffering=1 << 18, closefd=False)


def say(answer: dict[str, Any]) -> None:
    """One JSON line to the caller."""
    sys.stdout.write(json.dumps(answer, separators=(",", ":")) + "\n")
    sys.stdout.flush()


def read_header(source: BinaryIO, limit_bytes: int = HEADER_BYTES) -> dict[str, Any] | None:
    """The next JSON line, None at the end of input. NodeError for anything else."""
    line = source.readline(limit_bytes + 1)
    if not line:
        return None
    if len(line) > limit_bytes:
        raise NodeError("protocol", f"a line of the input has more than {limit_bytes} bytes")
    if not line.endswith(b"\n"):
        raise NodeError("interrupted", "the input ended in the middle of a line")
    try:
        value = json.loads(line.decode("utf-8", "surrogateescape"))
    except ValueError as error:
        raise NodeError("protocol", f"a line of the input is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise NodeError("protocol", "a line of the input is no JSON object")
    return value


def sha_of(value: object) -> str:
    """`value` if it is a SHA-256 in lower-case hex."""
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise NodeError("protocol", f"{str(value)[:100]!r} is no sha256 in lower-case hex")
    return value


def count_of(value: object) -> int:
    """`value` if it is a number of bytes."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise NodeError("protocol", f"{str(value)[:100]!r} is no number of bytes")
    return value


def items_of(value: object) -> list[tuple[str, int]]:
    """[{"sha256", "size"}, ...] as pairs."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise NodeError("protocol", 'a list of {"sha256", "size"} is expected')
    return [(sha_of(item.get("sha256")), count_of(item.get("size"))) for item in value]


def relative(path: object) -> str:
    """A path below a folder, as it is; NodeError for one that could lead out of it."""
    if isinstance(path, str) and 0 < len(path) <= 4096 and "\0" not in path:
        parts = path.split("/")
        if not any(part in ("", ".", "..") or len(os.fsencode(part)) > 255 for part in parts):
            return path
    raise NodeError("path", f"{str(path)[:200]!r} is no path below the folder")


def argument(arguments: list[str], position: int, name: str) -> str:
    """An argument of a verb; NodeError if it is not there."""
    if position >= len(arguments):
        raise NodeError("usage", f"argument {position + 1} ({name}) is missing")
    return arguments[position]


def is_full(error: OSError) -> bool:
    """Whether a disk or a quota is at its end."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def no_room(path: Path, needed_bytes: int) -> NodeError:
    """The error of a full disk, with what is free there now."""
    import shutil

    folder = path if path.is_dir() else path.parent
    free = shutil.disk_usage(folder).free
    needed = f"{needed_bytes} bytes are needed and " if needed_bytes else ""
    return NodeError(
        "DiskFull", f"no room left in {folder}: {needed}{free} bytes are free", "free some space there, then repeat"
    )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone among the processes of this machine; waits for others."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Whole or not at all; NodeError `DiskFull` without room."""
    try:
        write_atomic(path, data)
    except OSError as error:
        if is_full(error):
            raise no_room(path, len(data)) from error
        raise


def pieces(path: Path) -> Iterator[bytes]:
    """The content, CHUNK_BYTES at a time."""
    with path.open("rb", buffering=0) as file:
        while True:
            piece = file.read(CHUNK_BYTES)
            if not piece:
                return
            yield piece


def hash_file(path: Path) -> str:
    """SHA-256 of the content, hexadecimal."""
    digest = hashlib.sha256()
    for piece in pieces(path):
        digest.update(piece)
    return digest.hexdigest()
