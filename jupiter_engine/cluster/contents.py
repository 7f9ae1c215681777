"""What a folder of this machine holds, by hash, remembered so that unchanged gigabytes are not read again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import stat
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from jupiter_engine.errors import StageFailed
from jupiter_engine.files import sha256_file
from jupiter_engine.node import wire
from jupiter_engine.node.errors import NodeError
from jupiter_engine.node.trees import SETTLED_NS, Manifest, manifest_sha

_TABLE = """create table if not exists files (
    path text primary key, size integer not null, mtime_ns integer not null, inode integer not null,
    sha256 text not null) without rowid"""
_HASHING_THREADS = 4


@dataclass(frozen=True, slots=True)
class LocalFile:
    """One file as it was when it was hashed."""

    path: str
    sha256: str
    size: int
    executable: bool


@dataclass(frozen=True, slots=True)
class Contents:
    """Files by the name they have below a folder."""

    files: dict[str, LocalFile]
    sha256: str
    """Hash of the manifest: equal for equal contents, here and on nodes."""

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files.values())

    def manifest(self) -> Manifest:
        return {name: (file.sha256, file.size, file.executable) for name, file in self.files.items()}


class HashCache:
    """SHA-256 of files by path, size, modification time and inode, in one SQLite file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def contents(self, source: Path | Mapping[str, Path]) -> Contents:
        """Hash a folder (links are followed), or files by the name they are to have. Blocks; run it in a thread.

        StageFailed for a name that another machine could not hold, or a file that cannot be read.
        """
        named = walk(source) if isinstance(source, Path) else _stats(source)
        found: dict[str, tuple[str, os.stat_result]] = {}
        for name, path, at in named:
            try:
                wire.relative(name).encode()
            except (NodeError, UnicodeEncodeError) as error:
                raise StageFailed(f"{path} has a name that cannot be sent: {error}", fix="rename it") from error
            if not stat.S_ISREG(at.st_mode):
                raise StageFailed(f"{path} is no regular file", fix="send files and folders only")
            found[name] = (path, at)
        hashes = self._hashes(dict(found.values()))
        files = {
            name: LocalFile(path, hashes[path], at.st_size, bool(at.st_mode & stat.S_IXUSR))
            for name, (path, at) in found.items()
        }
        manifest = {name: (file.sha256, file.size, file.executable) for name, file in files.items()}
        return Contents(files, manifest_sha(manifest))

    def _hashes(self, stats: dict[str, os.stat_result]) -> dict[str, str]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(self.path, timeout=30.0)) as database:
            database.execute("pragma journal_mode = wal")
            database.execute(_TABLE)
            hashes = _known(database, stats)
            fresh = [path for path in stats if path not in hashes]
            settled_ns = time.time_ns() - SETTLED_NS
            hashes.update(_hash_all({path: stats[path].st_size for path in fresh}))
            rows = [
                (path, at.st_size, at.st_mtime_ns, at.st_ino, hashes[path])
                for path in fresh
                if (at := stats[path]).st_mtime_ns < settled_ns
            ]
            with database:
                database.executemany("insert or replace into files values (?, ?, ?, ?, ?)", rows)
        return hashes


def _known(database: sqlite3.Connection, stats: dict[str, os.stat_result]) -> dict[str, str]:
    if not stats:
        return {}
    # What lies between the first and the last path is (nearly) what is asked for: one question instead of thousands.
    between = "select path, size, mtime_ns, inode, sha256 from files where path between ? and ?"
    known: dict[str, str] = {}
    for path, size, mtime_ns, inode, sha256 in database.execute(between, (min(stats), max(stats))):
        at = stats.get(path)
        if at is not None and (size, mtime_ns, inode) == (at.st_size, at.st_mtime_ns, at.st_ino):
            known[path] = sha256
    return known


def _hash_all(sizes: dict[str, int]) -> dict[str, str]:
    """Small files one after the other, large ones several at once."""
    try:
        hashes = {path: _hash_small(path) for path, size in sizes.items() if size <= wire.SMALL_BYTES}
        large = [path for path in sizes if path not in hashes]
        with ThreadPoolExecutor(_HASHING_THREADS) as pool:
            hashes.update(zip(large, pool.map(_hash_large, large), strict=True))
    except OSError as error:
        raise StageFailed(f"{error.filename} cannot be read: {error.strerror}") from error
    return hashes


def _hash_small(path: str) -> str:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        digest = hashlib.sha256()
        while piece := os.read(descriptor, 2 * wire.SMALL_BYTES):
            digest.update(piece)
        return digest.hexdigest()
    finally:
        os.close(descriptor)


def _hash_large(path: str) -> str:
    return sha256_file(Path(path))


def _stats(files: Mapping[str, Path]) -> Iterator[tuple[str, str, os.stat_result]]:
    for name, path in files.items():
        try:
            yield name, str(path.absolute()), path.stat()
        except OSError as error:
            raise StageFailed(f"{path} cannot be read: {error.strerror}") from error


def walk(folder: Path) -> Iterator[tuple[str, str, os.stat_result]]:
    """Name below the folder, path and stat of each file; links are followed, each folder once."""
    if not folder.is_dir():
        raise StageFailed(f"{folder} is no folder", fix="name a folder that exists")
    seen: set[tuple[int, int]] = set()
    pending = [("", str(folder.absolute()))]
    while pending:
        prefix, where = pending.pop()
        at = os.stat(where)  # noqa: PTH116 - text, as scandir gives it
        if (at.st_dev, at.st_ino) in seen:
            continue
        seen.add((at.st_dev, at.st_ino))
        with os.scandir(where) as entries:
            for entry in entries:
                try:
                    if entry.is_dir():
                        pending.append((f"{prefix}{entry.name}/", entry.path))
                    else:
                        yield prefix + entry.name, entry.path, entry.stat()
                except OSError as error:
                    raise StageFailed(f"{entry.path} cannot be read: {error.strerror}") from error
