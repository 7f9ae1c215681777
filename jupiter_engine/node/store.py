"""Files of a node by the hash of their content: what it ever got is not sent again.

    <workdir>/store/<sha256>            one file, read-only
    <workdir>/store/<sha256>.part       one that has not wholly arrived; goes on where it ended
    <workdir>/store/packs/<id>.pack     many files up to SMALL_BYTES, one after the other
    <workdir>/store/packs/<id>.json     which and where; written last

Thousands of small files cost one write each where they are used and none here. Files of the store
are linked into the folders that use them, so a program could change them there. All carry one fixed
modification time (UNTOUCHED_S): whoever writes to one also changes that, and it is hashed anew before
it is used again. The time of access is set by us and says when a file was last of use.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from .errors import NodeError
from .files import write_all
from .wire import (
    CHUNK_BYTES,
    LIST_BYTES,
    SMALL_BYTES,
    UNTOUCHED_S,
    argument,
    count_of,
    hash_file,
    is_full,
    items_of,
    locked,
    no_room,
    pieces,
    read_header,
    say,
    sha_of,
    standard_input,
    write_whole,
)

PACK_BYTES = 16 << 20
"""A pack is closed once it holds so much: what an interruption can cost."""
PACK_AGE_S = 2.0
FLUSH_BYTES = 16 << 20
REMEMBERED_BYTES = 64 << 20
"""Small files that have just arrived and been checked are placed from memory, up to so much."""
PART_KEPT_S = 7 * 86400.0


class Refused(Exception):
    """One file that was not taken; the others go on."""


# -- the store -----------------------------------------------------------------------------------------
class Store:
    """The store of one work folder."""

    def __init__(self, workdir: str) -> None:
        self.workdir = Path(workdir).expanduser().absolute()
        self.folder = self.workdir / "store"
        self.packs = self.folder / "packs"
        self.packs.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._small: dict[str, tuple[Path, int, int]] | None = None
        self._remembered: dict[str, bytes] = {}
        self._remembered_bytes = 0

    def remember(self, sha256: str, data: bytes) -> None:
        """Keep checked content of a small file at hand."""
        if self._remembered_bytes + len(data) <= REMEMBERED_BYTES:
            self._remembered[sha256] = data
            self._remembered_bytes += len(data)

    def path(self, sha256: str) -> Path:
        return self.folder / sha256

    def part(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.part"

    def small(self) -> dict[str, tuple[Path, int, int]]:
        """sha256 -> pack, offset, size of all files in packs."""
        if self._small is None:
            self._small = {}
            for index in self.packs.glob("*.json"):
                pack = index.with_suffix(".pack")
                self._small.update({sha: (pack, offset, size) for sha, offset, size in _read_index(index)})
        return self._small

    def has(self, sha256: str, size: int) -> bool:
        """Whether it is here and unharmed; marks it as used now."""
        if size <= SMALL_BYTES and sha256 in self.small():
            return True
        path = self.path(sha256)
        try:
            found = path.stat()
        except FileNotFoundError:
            return False
        if (found.st_mtime != UNTOUCHED_S and hash_file(path) != sha256) or found.st_size != size:
            path.unlink()
            return False
        os.utime(path, (time.time(), UNTOUCHED_S))
        return True

    def missing(self, items: Iterable[tuple[str, int]]) -> list[dict[str, Any]]:
        """What of `items` (sha256, size) is not here, with the bytes that are."""
        wanted: list[dict[str, Any]] = []
        packs: set[Path] = set()
        for sha256, size in dict(items).items():
            if size <= SMALL_BYTES and sha256 in self.small():
                packs.add(self.small()[sha256][0])
            elif not self.has(sha256, size):
                here = 0
                if size > SMALL_BYTES:
                    with contextlib.suppress(FileNotFoundError):
                        here = min(self.part(sha256).stat().st_size, size)
                wanted.append({"sha256": sha256, "have": here})
        for pack in packs:
            with contextlib.suppress(FileNotFoundError):
                os.utime(pack)
        return wanted

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.folder).free

    def read_small(self, sha256: str) -> bytes | None:
        """Content of a file in a pack, checked; a damaged one is forgotten and None."""
        if sha256 in self._remembered:
            return self._remembered[sha256]
        place = self.small().get(sha256)
        if place is None:
            return None
        pack, offset, size = place
        try:
            with pack.open("rb") as file:
                file.seek(offset)
                data = file.read(size)
        except FileNotFoundError:
            data = b""
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
        del self.small()[sha256]
        index = pack.with_suffix(".json")
        _write_index(index, [entry for entry in _read_index(index) if entry[0] != sha256])
        return None

    def keep(self, path: Path, sha256: str) -> None:
        """Take a file whose content was verified (same file system) into the store by renaming it."""
        path.chmod(0o444)
        os.utime(path, (time.time(), UNTOUCHED_S))
        path.replace(self.path(sha256))

    def place(self, sha256: str, size: int, target: str, *, executable: bool = False) -> None:
        """Make `target` (must not exist) out of the store: large files as links to it."""
        data = self.read_small(sha256) if size <= SMALL_BYTES else None
        if data is not None:
            write_placed(target, [data], executable=executable)
            return
        if not self.has(sha256, size):
            raise NodeError("store_damaged", f"{sha256} is not in the store or was damaged there", "send it again")
        if not executable:
            try:
                os.link(self.path(sha256), target)
                return
            except OSError as error:
                # Another file system, or one without links: a copy does as well.
                if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP):
                    raise
        write_placed(target, pieces(self.path(sha256)), executable=executable)

    def prune(self, unused_s: float) -> dict[str, int]:
        """Remove what nobody used for so long and no folder holds; returns counts and bytes."""
        removed = freed = kept = 0
        now = time.time()
        for path in [*self.folder.iterdir(), *self.packs.iterdir()]:
            try:
                found = path.lstat()
            except FileNotFoundError:
                # The index of a pack that has just gone.
                continue
            if not stat.S_ISREG(found.st_mode) or path.suffix in (".json", ".lock"):
                continue
            if path.suffix in (".part", ".tmp", ".open"):
                old = now - found.st_mtime > min(unused_s, PART_KEPT_S)
            else:
                old = now - found.st_atime > unused_s and found.st_nlink == 1
            if not old:
                kept += found.st_size
                continue
            if path.suffix == ".pack":
                with contextlib.suppress(FileNotFoundError):
                    path.with_suffix(".json").unlink()
            path.unlink()
            removed, freed = removed + 1, freed + found.st_size
        self._small = None
        return {"removed": removed, "freed_bytes": freed, "kept_bytes": kept, "free_bytes": self.free_bytes()}


def _read_index(index: Path) -> list[tuple[str, int, int]]:
    try:
        return [(str(sha), int(offset), int(size)) for sha, offset, size in json.loads(index.read_bytes())["files"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError):
        # Ours and written whole, so the disk damaged it: without an index the pack is only garbage.
        index.unlink()
        return []


def _write_index(index: Path, entries: list[tuple[str, int, int]]) -> None:
    write_whole(index, json.dumps({"files": entries}).encode())


def write_placed(target: str, data: Iterable[bytes], *, executable: bool) -> None:
    """A new file with the fixed modification time."""
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o755 if executable else 0o644)
    try:
        for piece in data:
            write_all(descriptor, piece)
        os.utime(descriptor, (time.time(), UNTOUCHED_S))
    finally:
        os.close(descriptor)


class Flusher:
    """Brings a file to the disk while it is still being written: at its end little is left to wait for."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._since_bytes = 0
        self._thread: threading.Thread | None = None
        self._failed: list[OSError] = []

    def __enter__(self) -> Flusher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._thread is not None:
            self._thread.join()
        if kind is None:
            self._sync()
            if self._failed:
                # The system tells an error of writing once; it must not get lost in the thread.
                raise self._failed[0]

    def written(self, size_bytes: int) -> None:
        self._since_bytes += size_bytes
        if self._since_bytes >= FLUSH_BYTES and (self._thread is None or not self._thread.is_alive()):
            self._since_bytes = 0
            self._thread = threading.Thread(target=self._sync)
            self._thread.start()

    def _sync(self) -> None:
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._failed.append(error)


# -- receiving -----------------------------------------------------------------------------------------
class Receiver:
    """Takes a framed stream of files into the store: header line, then its bytes from the offset on."""

    def __init__(self, store: Store, source: BinaryIO) -> None:
        self.store = store
        self.source = source
        self.stored = 0
        self.refused: list[dict[str, str]] = []
        self._pack: BinaryIO | None = None
        self._pack_path = store.packs
        self._entries: list[tuple[str, int, int]] = []
        self._pack_bytes = 0
        self._pack_begun = 0.0

    def run(self) -> dict[str, Any]:
        """Until {"end": true}; an input that ends before is NodeError `interrupted`, what arrived stays."""
        try:
            try:
                self._take_all()
            finally:
                self._seal()
        except OSError as error:
            if is_full(error):
                raise no_room(self.store.folder, 0) from error
            raise
        return {"stored": self.stored, "refused": self.refused}

    def _take_all(self) -> None:
        while True:
            header = read_header(self.source)
            if header is None:
                raise NodeError("interrupted", f"the input ended after {self.stored} files")
            if header.get("end") is True:
                return
            self._take(header)

    def _take(self, header: dict[str, Any]) -> None:
        sha256, size = sha_of(header.get("sha256")), count_of(header.get("size"))
        offset = count_of(header.get("offset"))
        if offset > size or (size <= SMALL_BYTES and offset):
            raise NodeError("protocol", f"offset {offset} of a file of {size} bytes")
        try:
            if size <= SMALL_BYTES:
                self._take_small(sha256, size)
            else:
                self._take_large(sha256, size, offset)
        except Refused as refused:
            self.refused.append({"sha256": sha256, "why": str(refused)})
        except OSError as error:
            if is_full(error):
                raise no_room(self.store.folder, size - offset) from error
            raise
        else:
            self.stored += 1

    def _take_small(self, sha256: str, size: int) -> None:
        data = self.source.read(size)
        if len(data) != size:
            raise NodeError("interrupted", f"the input ended within a file, after {self.stored} files")
        if hashlib.sha256(data).hexdigest() != sha256:
            raise Refused("hash")
        if self._pack is None:
            self._pack_path = self.store.packs / f"{os.urandom(16).hex()}.open"
            self._pack = self._pack_path.open("wb", buffering=CHUNK_BYTES)
            self._entries, self._pack_bytes, self._pack_begun = [], 0, time.monotonic()
        self._pack.write(data)
        self.store.remember(sha256, data)
        self._entries.append((sha256, self._pack_bytes, size))
        self._pack_bytes += size
        if self._pack_bytes >= PACK_BYTES or time.monotonic() - self._pack_begun > PACK_AGE_S:
            self._seal()

    def _seal(self) -> None:
        """Make what the open pack holds part of the store."""
        file, self._pack = self._pack, None
        if file is None:
            return
        try:
            with file:
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            # What it held is asked for again.
            self._pack_path.unlink()
            raise
        pack = self._pack_path.with_suffix(".pack")
        self._pack_path.replace(pack)
        _write_index(pack.with_suffix(".json"), self._entries)
        self.store.small().update({sha: (pack, offset, size) for sha, offset, size in self._entries})

    def _take_large(self, sha256: str, size: int, offset: int) -> None:
        part = self.store.part(sha256)
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            problem = _not_ready(part, descriptor, offset)
            if problem:
                self._drain(size - offset)
                raise Refused(problem)
            os.ftruncate(descriptor, offset)
            digest = hashlib.sha256()
            for piece in pieces(part):
                digest.update(piece)
            self._copy(descriptor, digest, size - offset)
            if digest.hexdigest() != sha256:
                part.unlink()
                raise Refused("hash")
            self.store.keep(part, sha256)
        finally:
            os.close(descriptor)

    def _copy(self, descriptor: int, digest: Any, left_bytes: int) -> None:
        os.lseek(descriptor, 0, os.SEEK_END)
        with Flusher(descriptor) as flusher:
            while left_bytes:
                piece = self.source.read(min(left_bytes, CHUNK_BYTES))
                # What came before the end is kept: the next attempt goes on after it.
                write_all(descriptor, piece)
                flusher.written(len(piece))
                digest.update(piece)
                left_bytes -= len(piece)
                if not piece:
                    raise NodeError("interrupted", f"the input ended {left_bytes} bytes before the end of a file")

    def _drain(self, left_bytes: int) -> None:
        while left_bytes:
            got = len(self.source.read(min(left_bytes, CHUNK_BYTES)))
            if not got:
                raise NodeError("interrupted", "the input ended within a file")
            left_bytes -= got


def _not_ready(part: Path, descriptor: int, offset: int) -> str:
    """Why a partial file cannot be gone on with; locks it if it can."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever held the lock may have finished: then this is a file of the store, not to be written to.
        if not os.path.samestat(os.fstat(descriptor), part.stat()):
            return "busy"
    except (BlockingIOError, FileNotFoundError):
        return "busy"
    return "offset" if os.fstat(descriptor).st_size < offset else ""


# -- verbs ---------------------------------------------------------------------------------------------
def have(arguments: list[str]) -> int:
    """WORKDIR; stdin {"files": [{"sha256", "size"}]} -> {"missing": [{"sha256", "have"}], "free_bytes"}."""
    store = Store(argument(arguments, 0, "WORKDIR"))
    asked = read_header(standard_input(), LIST_BYTES) or {}
    say({"missing": store.missing(items_of(asked.get("files"))), "free_bytes": store.free_bytes()})
    return 0


def receive(arguments: list[str]) -> int:
    """WORKDIR; stdin frames, then {"end": true} -> {"stored": n, "refused": [{"sha256", "why"}]}."""
    say(Receiver(Store(argument(arguments, 0, "WORKDIR")), standard_input()).run())
    return 0


def send(arguments: list[str]) -> int:
    """WORKDIR; stdin {"files": [{"sha256", "size", "offset"}]} -> frames of the same form, then {"end": true}."""
    store = Store(argument(arguments, 0, "WORKDIR"))
    asked = (read_header(standard_input(), LIST_BYTES) or {}).get("files")
    output = sys.stdout.buffer
    for i, (sha256, size) in enumerate(items_of(asked)):
        offset = count_of(asked[i].get("offset", 0)) if isinstance(asked, list) else 0
        data = store.read_small(sha256) if size <= SMALL_BYTES else None
        if data is None and not store.has(sha256, size):
            raise NodeError("missing", f"{sha256} is not in the store")
        output.write(json.dumps({"sha256": sha256, "size": size, "offset": offset}).encode() + b"\n")
        if data is not None:
            output.write(data[offset:])
        else:
            send_file(store.path(sha256), offset, size, output)
    output.write(b'{"end":true}\n')
    output.flush()
    return 0


def send_file(path: Path, offset: int, size: int, output: BinaryIO) -> None:
    """Exactly the bytes from `offset` to `size`; NodeError if the file is shorter now."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0) as file:
        file.seek(offset)
        left = size - offset
        while left > 0:
            piece = file.read(min(left, CHUNK_BYTES))
            if not piece:
                raise NodeError("changed", f"{path} became shorter while it was being sent", "repeat")
            output.write(piece)
            left -= len(piece)


def prune(arguments: list[str]) -> int:
    """WORKDIR UNUSED_S -> {"removed", "freed_bytes", "kept_bytes", "free_bytes"}."""
    store = Store(argument(arguments, 0, "WORKDIR"))
    with locked(store.folder / "prune.lock"):
        say(store.prune(float(argument(arguments, 1, "UNUSED_S"))))
    return 0
