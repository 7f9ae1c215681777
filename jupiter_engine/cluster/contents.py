"""What a folder of this machine holds, by hash, remembered so that unchanged gigabytes are not read again."""

from __future__ import annotations

import contextlib
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

    path: Path
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
        named = dict(walk(source)) if isinstance(source, Path) else dict(source)
        stats: dict[str, os.stat_result] = {}
        for name, path in named.items():
            try:
                wire.relative(name).encode()
                stats[name] = path.stat()
            except (NodeError, UnicodeEncodeError) as error:
                raise StageFailed(f"{path} has a name that cannot be sent: {error}", fix="rename it") from error
            except OSError as error:
                raise StageFailed(f"{path} cannot be read: {error.strerror}") from error
            if not stat.S_ISREG(stats[name].st_mode):
                raise StageFailed(f"{path} is no regular file", fix="send files and folders only")
        hashes = self._hashes({path: stats[name] for name, path in named.items()})
        files = {
            name: LocalFile(path, hashes[path], stats[name].st_size, bool(stats[name].st_mode & stat.S_IXUSR))
            for name, path in named.items()
        }
        found = Contents(files, "")
        return Contents(files, manifest_sha(found.manifest()))

    def _hashes(self, stats: dict[Path, os.stat_result]) -> dict[Path, str]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(self.path, timeout=30.0)) as database:
            database.execute("pragma journal_mode = wal")
            database.execute(_TABLE)
            known = _known(database, {os.path.abspath(path): at for path, at in stats.items()})  # noqa: PTH100 - keeps links
            hashes = {path: known[key] for path in stats if (key := os.path.abspath(path)) in known}  # noqa: PTH100
            fresh = [path for path in stats if path not in hashes]
            settled_ns = time.time_ns() - SETTLED_NS
            with ThreadPoolExecutor(_HASHING_THREADS) as pool:
                hashes.update(zip(fresh, pool.map(sha256_file, fresh), strict=True))
            rows = [
                (os.path.abspath(path), at.st_size, at.st_mtime_ns, at.st_ino, hashes[path])  # noqa: PTH100
                for path in fresh
                if (at := stats[path]).st_mtime_ns < settled_ns
            ]
            with database:
                database.executemany("insert or replace into files values (?, ?, ?, ?, ?)", rows)
        return hashes


def _known(database: sqlite3.Connection, stats: dict[str, os.stat_result]) -> dict[str, str]:
    known: dict[str, str] = {}
    question = "select size, mtime_ns, inode, sha256 from files where path = ?"
    for path, at in stats.items():
        row = database.execute(question, (path,)).fetchone()
        if row is not None and row[:3] == (at.st_size, at.st_mtime_ns, at.st_ino):
            known[path] = row[3]
    return known


def walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name below the folder and path of each file; links are followed, each folder once."""
    if not folder.is_dir():
        raise StageFailed(f"{folder} is no folder", fix="name a folder that exists")
    seen: set[tuple[int, int]] = set()
    pending = [("", folder)]
    while pending:
        prefix, where = pending.pop()
        at = where.stat()
        if (at.st_dev, at.st_ino) in seen:
            continue
        seen.add((at.st_dev, at.st_ino))
        with os.scandir(where) as entries:
            for entry in entries:
                if entry.is_dir():
                    pending.append((f"{prefix}{entry.name}/", Path(entry.path)))
                else:
                    yield prefix + entry.name, Path(entry.path)
