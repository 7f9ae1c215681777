"""The receiving end here: what a node may write, where it waits, and how it becomes a folder.

<parent>/.<name>.fetch/<sha256>         a file that is complete and checked
<parent>/.<name>.fetch/<sha256>.part    one that is not; the next attempt goes on after it
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from jupiter_engine.cluster.contents import Contents, HashCache
from jupiter_engine.cluster.conversation import Node, nonsense
from jupiter_engine.errors import RemoteError
from jupiter_engine.files import disk_full, require_free, sha256_file, sync_folder
from jupiter_engine.node import wire
from jupiter_engine.node.errors import NodeError
from jupiter_engine.node.trees import Manifest, manifest_of, manifest_sha
from jupiter_engine.units import bytes_text

SYNCED_SINGLY = 64
"""Up to so many files are written through one by one; beyond, all of the system at once."""


@dataclass(frozen=True, slots=True)
class Item:
    """A file to ask for, and from which byte on."""

    name: str
    sha256: str
    size: int
    offset: int


class Part:
    """A file that is arriving."""

    def __init__(self, room: Path, item: Item) -> None:
        self._path = room / f"{item.sha256}.part"
        self._item = item
        self._digest = hashlib.sha256()
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        self._file = self._path.open("a+b")
        self._file.truncate(self._item.offset)
        self._file.seek(0)
        while piece := self._file.read(1 << 20):
            self._digest.update(piece)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, data: bytes) -> None:
        assert self._file is not None
        try:
            self._file.write(data)
        except OSError as error:
            raise disk_full(error, self._path) from error
        self._digest.update(data)

    def finish(self) -> bool:
        """Whether it is what it should be; if not it is removed."""
        assert self._file is not None
        self._file.close()
        if self._digest.hexdigest() != self._item.sha256:
            self._path.unlink()
            return False
        self._path.replace(self._path.with_suffix(""))
        return True


@dataclass(slots=True)
class Fetch:
    """What is to come, and where it goes."""

    target: Path
    room: Path
    manifest: Manifest
    sha256: str
    current: bool
    """The target holds it already."""
    here: dict[str, Path]
    """Files of this machine by hash, to be taken instead of asking."""
    asked: list[Item] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        return sum(size for _, size, _ in self.manifest.values())

    @property
    def left_bytes(self) -> int:
        return sum(item.size - item.offset for item in self.asked)

    def part(self, item: Item) -> Part:
        return Part(self.room, item)

    def place(self) -> None:
        """Make the target out of what came and what was here: built aside, then renamed."""
        if self.current:
            return
        fresh = self.target.with_name(f".{self.target.name}.{os.getpid()}.new")
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            self._build(fresh)
        except OSError as error:
            shutil.rmtree(fresh, ignore_errors=True)
            raise disk_full(error, fresh) from error
        old = self.target.with_name(f".{self.target.name}.{os.getpid()}.old")
        shutil.rmtree(old, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            self.target.rename(old)
        fresh.rename(self.target)
        sync_folder(self.target.parent)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.room, ignore_errors=True)

    def _build(self, fresh: Path) -> None:
        fresh.mkdir(parents=True)
        last = {sha256: name for name, (sha256, _, _) in self.manifest.items()}
        for name, (sha256, _, executable) in self.manifest.items():
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            before = self.here.get(sha256)
            if before == self.target / name:
                # The old folder goes, so nobody else writes to it under the old name.
                os.link(before, path)
            elif before is None and last[sha256] == name:
                (self.room / sha256).rename(path)
            else:
                shutil.copyfile(before or self.room / sha256, path)
            path.chmod(0o755 if executable else 0o644)
        if len(self.manifest) > SYNCED_SINGLY:
            os.sync()
            return
        for name in self.manifest:
            sync_folder(fresh / name)


def plan(
    node: Node,
    answer: Mapping[str, Any],
    target: Path,
    hashes: HashCache,
    wanted: Callable[[str], bool] | None,
    limit_bytes: int,
) -> Fetch:
    """What to ask for after the node's manifest. RemoteError if it is not there, too large, or no manifest."""
    if answer.get("exists") is not True:
        raise RemoteError(f"{node.connection.name} does not have the folder", host=node.connection.host)
    try:
        whole = manifest_of(answer.get("files"))
    except NodeError as error:
        raise nonsense(node, error.detail) from error
    manifest = {name: entry for name, entry in whole.items() if wanted is None or wanted(name)}
    total = sum(size for _, size, _ in manifest.values())
    if total > limit_bytes:
        detail = f"{node.connection.name} offers {bytes_text(total)} where {bytes_text(limit_bytes)} is the limit"
        raise RemoteError(detail, host=node.connection.host, fix="look at what is in that folder there")
    mine = hashes.contents(target) if target.is_dir() else Contents({}, "")
    room = target.with_name(f".{target.name}.fetch")
    fetch = Fetch(
        target=target,
        room=room,
        manifest=manifest,
        sha256=manifest_sha(manifest),
        current=target.is_dir() and mine.sha256 == manifest_sha(manifest),
        here=_here(mine, target, manifest),
    )
    if not fetch.current:
        room.mkdir(parents=True, exist_ok=True)
        fetch.asked = _asked(fetch)
        # Copies of what is here already need room as well.
        require_free(room, total - sum(item.offset for item in fetch.asked), f"fetching from {node.connection.name}")
    return fetch


def _here(mine: Contents, target: Path, manifest: Manifest) -> dict[str, Path]:
    """Files of the target by hash; the one that keeps its name before any other."""
    here = {file.sha256: Path(file.path) for file in mine.files.values()}
    for name, (sha256, _, _) in manifest.items():
        file = mine.files.get(name)
        if file is not None and file.sha256 == sha256:
            here[sha256] = target / name
    return here


def _asked(fetch: Fetch) -> list[Item]:
    asked: dict[str, Item] = {}
    for name, (sha256, size, _) in fetch.manifest.items():
        done, part = fetch.room / sha256, fetch.room / f"{sha256}.part"
        if sha256 in fetch.here or sha256 in asked:
            continue
        if done.is_file() and done.stat().st_size == size and sha256_file(done) == sha256:
            continue
        done.unlink(missing_ok=True)
        offset = min(part.stat().st_size, size) if part.is_file() and size > wire.SMALL_BYTES else 0
        asked[sha256] = Item(name, sha256, size, offset)
    return list(asked.values())
