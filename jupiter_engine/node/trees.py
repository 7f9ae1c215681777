"""Whole folders of a node: described by hash, taken over in one conversation, never half there.

A *manifest* is {path: [sha256, size, executable]} of all regular files of a folder. Its hash says
whether two folders hold the same. What a folder held when it was last looked at is kept in
`<workdir>/store/trees/`, by size, modification time and inode, so that looking again reads nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .errors import NodeError
from .identity import boot_id
from .wire import (
    LIST_BYTES,
    SMALL_BYTES,
    argument,
    count_of,
    hash_file,
    is_full,
    locked,
    no_room,
    read_header,
    relative,
    say,
    sha_of,
    standard_input,
    write_whole,
)

if TYPE_CHECKING:
    from .store import Store

SETTLED_NS = 2_000_000_000
"""A file changed so shortly before it was hashed may change again within the clock's grain: not remembered."""


class Entry(NamedTuple):
    """One file of a folder as it was found."""

    sha256: str
    size: int
    executable: bool
    mtime_ns: int
    inode: int


Manifest = dict[str, tuple[str, int, bool]]


def manifest_sha(manifest: Manifest) -> str:
    """What the manifest comes to: one line a file, in order of the paths."""
    lines: list[str] = []
    for path in sorted(manifest):
        sha256, size, executable = manifest[path]
        lines.append(f"{sha256} {size} {'x' if executable else '-'} {path}\n")
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def manifest_of(value: object) -> Manifest:
    """A manifest from outside, with every path, hash and size checked."""
    if not isinstance(value, dict):
        raise NodeError("protocol", "a manifest is expected")
    manifest: Manifest = {}
    for path, entry in value.items():
        if not isinstance(entry, list) or len(entry) != 3:
            raise NodeError("protocol", f"the manifest's entry of {path[:200]!r} is not [sha256, size, executable]")
        manifest[relative(path)] = (sha_of(entry[0]), count_of(entry[1]), entry[2] is True)
    folders = {path.rsplit("/", depth)[0] for path in manifest for depth in range(1, path.count("/") + 1)}
    for path in folders & manifest.keys():
        raise NodeError("path", f"the manifest has {path!r} both as a file and as a folder")
    return manifest


class Tree:
    """A folder, and what is remembered of it."""

    def __init__(self, workdir: str, folder: str) -> None:
        self.workdir = Path(workdir).expanduser().absolute()
        given = Path(folder).expanduser()
        self.folder = given if given.is_absolute() else self.workdir / given
        if ".." in self.folder.parts or self.folder == self.workdir:
            raise NodeError("path", f"{folder!r} is no folder that can be taken over")
        notes = self.workdir / "store" / "trees"
        notes.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._placed = False
        self.notes = notes / (hashlib.sha256(os.fsencode(self.folder)).hexdigest() + ".json")

    @cached_property
    def store(self) -> Store:
        # Not loaded for a folder that is as it should be: most looks end there.
        from .store import Store

        return Store(str(self.workdir))

    def look(self, names: Iterable[str] | None = None) -> dict[str, Entry]:
        """Every regular file of the folder, or only those named; only what changed since the last look is read."""
        noted, known = self._noted()
        found: dict[str, Entry] = {}
        now_ns = time.time_ns()
        for path, at in _files(self.folder) if names is None else _named(self.folder, names):
            entry = known.get(path)
            executable = bool(at.st_mode & stat.S_IXUSR)
            if entry is None or (entry.size, entry.mtime_ns, entry.inode) != (at.st_size, at.st_mtime_ns, at.st_ino):
                # Hashed after it was looked at: one that grows meanwhile is hashed again the next time.
                sha256 = hash_file(self.folder / path)
                entry = Entry(sha256, at.st_size, executable, at.st_mtime_ns, at.st_ino)
            found[path] = entry if entry.executable == executable else entry._replace(executable=executable)
        if any(noted.get(path) != entry for path, entry in found.items()) or (
            names is None and len(noted) > len(found)
        ):
            settled = {path: entry for path, entry in found.items() if entry.mtime_ns < now_ns - SETTLED_NS}
            self.note(settled if names is None else {**known, **settled}, placed=self._placed)
        return found

    def unchanged(self) -> str:
        """Hash of the folder's manifest if all of it is as it was noted, else empty. Reads no file."""
        try:
            record = json.loads(self.notes.read_bytes())
            files = record["files"]
            if record["boot_id"] != boot_id():
                return ""
            count = 0
            for path, at in _files(self.folder):
                _, size, executable, mtime_ns, inode = files[path]
                seen = (at.st_size, at.st_mtime_ns, at.st_ino, bool(at.st_mode & stat.S_IXUSR))
                if seen != (size, mtime_ns, inode, executable):
                    return ""
                count += 1
            return str(record["sha256"]) if count == len(files) else ""
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            # Not noted yet, or a file that was not: then a whole look tells.
            return ""

    def note(self, entries: dict[str, Entry], *, placed: bool) -> None:
        record = {
            "folder": str(self.folder),
            "placed": placed,
            "boot_id": boot_id(),
            "sha256": manifest_sha(_plain(entries)),
            "files": entries,
        }
        write_whole(self.notes, json.dumps(record, separators=(",", ":")).encode("utf-8", "surrogateescape"))
        self._placed = placed

    def _noted(self) -> tuple[dict[str, Entry], dict[str, Entry]]:
        """What was noted, and what of it may be believed."""
        try:
            record = json.loads(self.notes.read_bytes())
            noted = {path: Entry(*entry) for path, entry in record["files"].items()}
        except FileNotFoundError:
            return {}, {}
        except (ValueError, KeyError, TypeError, AttributeError):
            # Only a cache: without it the files are read once more.
            return {}, {}
        self._placed = record.get("placed") is True
        if record.get("boot_id") == boot_id():
            return noted, noted
        # Small files are placed without waiting for the disk: after a power cut their content may be gone.
        return {}, {path: entry for path, entry in noted.items() if entry.size > SMALL_BYTES}

    def known(self) -> bool:
        """Whether the folder may be replaced: it is ours, or below the work folder, or empty. After a look."""
        below = self.workdir in self.folder.parents
        return below or self._placed or not self.folder.exists() or not any(self.folder.iterdir())

    def place(self, manifest: Manifest, old: dict[str, Entry]) -> None:
        """Replace the folder by one that holds exactly the manifest."""
        if not self.known():
            raise NodeError(
                "path", f"{self.folder} is not empty and was not put there by Jupiter", "name another folder"
            )
        self._sweep()
        fresh = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.new")
        try:
            entries = self._build(manifest, fresh, old)
        except OSError as error:
            shutil.rmtree(fresh, ignore_errors=True)
            if is_full(error):
                raise no_room(self.folder.parent, sum(size for _, size, _ in manifest.values())) from error
            raise
        except NodeError:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        gone = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.old")
        with contextlib.suppress(FileNotFoundError):
            self.folder.rename(gone)
        fresh.rename(self.folder)
        self.note(entries, placed=True)
        shutil.rmtree(gone, ignore_errors=True)

    def add(self, manifest: Manifest, old: dict[str, Entry]) -> None:
        """Put the files of the manifest beside what the folder holds, each whole or not at all."""
        entries = dict(old)
        for path, (sha256, size, executable) in manifest.items():
            entry = old.get(path)
            if entry is not None and entry[:3] == (sha256, size, executable):
                continue
            target = self.folder / path
            fresh = target.with_name(f".{os.getpid()}.tmp")
            target.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                fresh.unlink()
            try:
                self.store.place(sha256, size, str(fresh), executable=executable)
            except OSError as error:
                if is_full(error):
                    raise no_room(target.parent, size) from error
                raise
            at = fresh.lstat()
            fresh.replace(target)
            entries[path] = Entry(sha256, size, executable, at.st_mtime_ns, at.st_ino)
        self.note({**self._noted()[1], **entries}, placed=self._placed)

    def _build(self, manifest: Manifest, fresh: Path, old: dict[str, Entry]) -> dict[str, Entry]:
        fresh.mkdir(parents=True)
        same = {(entry.sha256, entry.executable): path for path, entry in old.items()}
        for folder in sorted({os.path.dirname(path) for path in manifest} - {""}):  # noqa: PTH120 - names, not paths
            (fresh / folder).mkdir(parents=True, exist_ok=True)
        entries: dict[str, Entry] = {}
        root = str(fresh)
        for path, (sha256, size, executable) in manifest.items():
            target = f"{root}/{path}"
            before = same.get((sha256, executable))
            if before is None or not _linked(f"{self.folder}/{before}", target):
                self.store.place(sha256, size, target, executable=executable)
            at = os.lstat(target)
            if at.st_size != size:
                raise NodeError("store_damaged", f"{path} has {at.st_size} bytes instead of {size}", "send it again")
            entries[path] = Entry(sha256, size, executable, at.st_mtime_ns, at.st_ino)
        return entries

    def _sweep(self) -> None:
        """Remove what interrupted attempts left, and undo one that ended between its two renames."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{self.folder.name}."
        for path in list(self.folder.parent.iterdir()):
            if not path.name.startswith(prefix) or not path.name[len(prefix) : -4].isdigit():
                continue
            if path.name.endswith(".old") and not self.folder.exists():
                path.rename(self.folder)
            elif path.name.endswith((".new", ".old")):
                shutil.rmtree(path, ignore_errors=True)


def _linked(source: str, target: str) -> bool:
    try:
        os.link(source, target)
    except OSError:
        # Then it comes out of the store.
        return False
    return True


def _files(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Path below the folder and lstat of each regular file; nothing that is reached through a link."""
    pending = [("", str(folder))]
    while pending:
        prefix, where = pending.pop()
        try:
            with os.scandir(where) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append((f"{prefix}{entry.name}/", entry.path))
                    elif entry.is_file(follow_symlinks=False):
                        yield prefix + entry.name, entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            continue


def _named(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, os.stat_result]]:
    for name in names:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            at = (folder / name).lstat()
            if stat.S_ISREG(at.st_mode):
                yield name, at


def _plain(entries: dict[str, Entry]) -> Manifest:
    return {path: (entry.sha256, entry.size, entry.executable) for path, entry in entries.items()}


# -- verbs ---------------------------------------------------------------------------------------------
def manifest(arguments: list[str]) -> int:
    """WORKDIR FOLDER -> {"exists", "sha256", "files": {path: [sha256, size, executable]}}."""
    tree = Tree(argument(arguments, 0, "WORKDIR"), argument(arguments, 1, "FOLDER"))
    files = _plain(tree.look())
    say({"exists": tree.folder.is_dir(), "sha256": manifest_sha(files), "files": files})
    return 0


def take(arguments: list[str]) -> int:
    """WORKDIR FOLDER [beside]: a conversation that ends with FOLDER holding a manifest of the caller.

    <- {"sha256": of the manifest}; -> {"current"}; if it is not: <- {"sha256", "files": the manifest};
    -> {"missing": [{"sha256", "have"}], "free_bytes"}; <- frames as for store-receive; -> {"placed": true, "stored": n}
    or {"placed": false, "refused": [...]}. With `beside` the manifest comes at once, and other files stay.
    """
    tree = Tree(argument(arguments, 0, "WORKDIR"), argument(arguments, 1, "FOLDER"))
    beside = arguments[2:] == ["beside"]
    source = standard_input()
    found = "" if beside else tree.unchanged() or manifest_sha(_plain(tree.look()))
    first = read_header(source, LIST_BYTES) or {}
    wanted = sha_of(first.get("sha256"))
    files = _announced(first, wanted) if beside else {}
    if beside:
        found = manifest_sha(_plain(tree.look(files)))
    if found == wanted and tree.folder.is_dir():
        say({"current": True})
        return 0
    say({"current": False})
    if not beside:
        files = _announced(read_header(source, LIST_BYTES) or {}, wanted)
    from .store import Receiver

    with locked(tree.notes.with_suffix(".lock")):
        old = tree.look(files if beside else None)
        here = set() if beside else {entry.sha256 for entry in old.values()}
        items = ((sha256, size) for sha256, size, _ in files.values() if sha256 not in here)
        say({"missing": tree.store.missing(items), "free_bytes": tree.store.free_bytes()})
        received = Receiver(tree.store, source).run()
        if received["refused"]:
            say({"placed": False, **received})
            return 0
        if beside:
            tree.add(files, old)
        else:
            tree.place(files, old)
    say({"placed": True, **received})
    return 0


def _announced(line: dict[str, object], sha256: str) -> Manifest:
    files = manifest_of(line.get("files"))
    if manifest_sha(files) != sha256:
        raise NodeError("protocol", "the manifest is not the one that was announced")
    return files


def place(arguments: list[str]) -> int:
    """WORKDIR FOLDER; stdin {"files": manifest}: make FOLDER out of what the store has -> {"placed": true}."""
    tree = Tree(argument(arguments, 0, "WORKDIR"), argument(arguments, 1, "FOLDER"))
    files = manifest_of((read_header(standard_input(), LIST_BYTES) or {}).get("files"))
    with locked(tree.notes.with_suffix(".lock")):
        tree.place(files, tree.look())
    say({"placed": True, "sha256": manifest_sha(files)})
    return 0


def send(arguments: list[str]) -> int:
    """WORKDIR FOLDER; stdin {"files": [{"path", "size", "offset"}]} -> frames of the same form, then {"end": true}."""
    tree = Tree(argument(arguments, 0, "WORKDIR"), argument(arguments, 1, "FOLDER"))
    asked = (read_header(standard_input(), LIST_BYTES) or {}).get("files")
    from .store import send_file

    output = sys.stdout.buffer
    for item in asked if isinstance(asked, list) else []:
        path, size, offset = relative(item.get("path")), count_of(item.get("size")), count_of(item.get("offset"))
        real = (tree.folder / path).resolve()
        if tree.folder.resolve() not in real.parents:
            raise NodeError("path", f"{path!r} leads out of {tree.folder}")
        output.write(json.dumps({"path": path, "size": size, "offset": offset}).encode() + b"\n")
        send_file(real, offset, size, output)
    output.write(b'{"end":true}\n')
    output.flush()
    return 0
