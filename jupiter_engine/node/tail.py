"""What is new in the files below a folder: found by looking again and again, read without following any link.

A file is known by its inode and how far it was read. It counts as another file (and is sent anew) when the inode has
changed, when it has shrunk, or when the bytes just before the read position are not those that were read: systems give
inode numbers of removed files out again at once, and a file can be cut and grow in between two looks.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import stat
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

CHECKED_BYTES = 64 << 10
"""So many bytes before the read position are compared when a file has changed."""
SETTLED_NS = 100_000_000
"""A file changed less than this ago is looked into again: two changes within one tick of the clock look like one."""
LAST = "events.jsonl"
"""Files of this name announce what is in others: they are sent after them."""
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


class Known(NamedTuple):
    """How far a file was read."""

    inode: int
    offset: int
    check: str
    """SHA-256 of the last CHECKED_BYTES (or all) before `offset`; empty: the receiver does not want it compared."""
    changed_ns: int = -1
    """Its change time when it was last compared; -1: compare in any case."""


class Found(NamedTuple):
    """A file as one look shows it."""

    path: str
    inode: int
    size: int
    changed_ns: int


def problem_of(pattern: str) -> str:
    """What is wrong with a pattern, one sentence; empty if it can be used."""
    parts = pattern.split("/")
    if not pattern or "\0" in pattern or any(not part or part[0] == "." for part in parts) or len(parts) > 8:
        return f"a pattern names files below the folder, none of them hidden, at most 8 levels deep: {pattern!r}"
    return ""


class Tail:
    """Files of one folder that match the patterns (`*` and `?` within one level)."""

    def __init__(self, root: str, patterns: list[str], have: dict[str, Known]) -> None:
        self._root = root
        self._patterns = [pattern.split("/") for pattern in patterns]
        self.known = have

    def look(self) -> list[Found]:
        """All matching regular files there are, in the order in which they are to be sent.

        Sizes of files called LAST are taken before those of all others: a line that is there announces only what
        can already be found.
        """
        last = self._matching(only_last=True)
        others = self._matching(only_last=False)
        return [*sorted(others), *sorted(last, key=lambda found: (-found.path.count("/"), found.path))]

    def _matching(self, *, only_last: bool) -> list[Found]:
        try:
            root = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return []
        found: dict[str, Found] = {}
        try:
            for parts in self._patterns:
                if only_last and not fnmatch.fnmatchcase(LAST, parts[-1]):
                    continue
                for entry in _walk(root, parts, ""):
                    if (entry.path.rpartition("/")[2] == LAST) is only_last:
                        found[entry.path] = entry
        finally:
            os.close(root)
        return list(found.values())

    def news(self, found: Found, piece_bytes: int) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Frames (header, content) that bring a receiver up to the size that `look` saw."""
        known = self.known.get(found.path)
        if known is not None and (known.inode, known.offset, known.changed_ns) == (
            found.inode,
            found.size,
            found.changed_ns,
        ):
            return
        file = self._open(found.path)
        if file is None:
            return
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                return
            yield from self._read(file, status, found, known, piece_bytes)
        finally:
            os.close(file)

    def _read(
        self, file: int, status: os.stat_result, found: Found, known: Known | None, piece_bytes: int
    ) -> Iterator[tuple[dict[str, Any], bytes]]:
        inode, offset, check = status.st_ino, 0, ""
        # Opened later than looked at, it may have grown, or be another file already.
        end = min(found.size, status.st_size) if inode == found.inode else status.st_size
        if known is not None:
            same = known.inode == inode and known.offset <= status.st_size
            same = same and (not known.check or known.check == _check(file, known.offset))
            if same:
                offset, check = known.offset, known.check
            else:
                yield {"f": "reset", "path": found.path, "inode": inode, "size": end}, b""
        elif end == 0:
            # An empty file is a file, too.
            yield {"f": "reset", "path": found.path, "inode": inode, "size": 0}, b""
        changed = False
        while offset < end:
            piece = os.pread(file, min(piece_bytes, end - offset), offset)
            if not piece:
                # It was cut while we read: the next look sees that.
                break
            header = {"f": "file", "path": found.path, "inode": inode, "offset": offset, "size": len(piece)}
            offset += len(piece)
            changed = True
            # Taken in before it is handed out: what was handed out counts as sent.
            self.known[found.path] = Known(inode, offset, "")
            yield header, piece
        check = _check(file, offset) if changed or not check else check
        settled = time.time_ns() - status.st_ctime_ns > SETTLED_NS and offset == status.st_size
        self.known[found.path] = Known(inode, offset, check, status.st_ctime_ns if settled else -1)

    def _open(self, path: str) -> int | None:
        """The file, reached from the root without passing any link; None if it is gone or something else now."""
        *folders, name = path.split("/")
        try:
            folder = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            for part in folders:
                inner = os.open(part, _FOLDER_FLAGS, dir_fd=folder)
                os.close(folder)
                folder = inner
            return os.open(name, _FILE_FLAGS, dir_fd=folder)
        except OSError:
            return None
        finally:
            os.close(folder)


def _check(file: int, offset: int) -> str:
    start = max(0, offset - CHECKED_BYTES)
    content = b""
    while len(content) < offset - start:
        piece = os.pread(file, offset - start - len(content), start + len(content))
        if not piece:
            break
        content += piece
    return hashlib.sha256(content).hexdigest()


def _walk(folder: int, parts: list[str], prefix: str) -> Iterator[Found]:
    """Regular files below an open folder that match the parts of a pattern."""
    first, rest = parts[0], parts[1:]
    plain = not any(letter in first for letter in "*?[")
    try:
        names = [first] if plain else fnmatch.filter(os.listdir(folder), first)
    except OSError:
        return
    for name in names:
        if name.startswith("."):
            continue
        try:
            if rest:
                inner = os.open(name, _FOLDER_FLAGS, dir_fd=folder)
                try:
                    yield from _walk(inner, rest, f"{prefix}{name}/")
                finally:
                    os.close(inner)
            else:
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                if stat.S_ISREG(status.st_mode):
                    yield Found(prefix + name, status.st_ino, status.st_size, status.st_ctime_ns)
        except OSError:
            # Gone since it was listed, a link, no folder, or closed to us: nothing that could be sent.
            continue
