"""A second copy of the hub's state on another machine, so that the loss of the hub's machine loses no merged round.

After a merge the ledger (as it was at one instant) and the files of the round it holds (linked into a folder of their
own, so that a copy may take longer than the rounds in which the hub tidies up) go to the machine of an
island as one tar stream, beside the work and at most one at a time. There they lie in the folder that will be the
hub's, should that machine have to merge one day:

RUN_FOLDER/copies/<fence>.<round>/      rounds.db, state/<round>.<fence of its files>/

A hub that finds a copy which is further than its own state takes it over (`adopt`), with a fence that no earlier hub
can have had: what islands hear of an earlier one counts no more.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sqlite3
import subprocess
import threading
import time
from pathlib import Path
from typing import Final

import msgspec

from jupiter_engine.checkpoints.tensors import FileRecord
from jupiter_engine.errors import JupiterError, StateError
from jupiter_engine.files import require_free, sha256_file, sync_file, sync_folder
from jupiter_engine.training.distributed.islands.ledger import Ledger, Round, minutes
from jupiter_engine.training.distributed.islands.starting import Machine
from jupiter_engine.units import plain_text

COPIES: Final = "copies"
LEDGER: Final = "rounds.db"
_NAME = re.compile(r"(\d{8})\.(\d{8})")
_LIMIT_S = 3600.0
"""A copy that takes longer is given up: by then there is a newer round."""
_FENCES = 10
"""A copy may be older than the hub that it was made by, which may have changed hands since: at most by so many more
than minutes have passed."""
_LEASES = 100_000
"""... nor lent so often."""

# $1: copies folder there, $2: name of the copy, $3: its size in KiB.
_RECEIVE = """
set -e
mkdir -p "$1"
cd "$1"
rm -rf .*.partial
free=$(df -Pk . | awk 'NR == 2 {print $4}')
if [ "$free" -lt "$3" ]; then echo "no room: the copy takes $3 KiB, $free KiB are free in $1" >&2; exit 5; fi
mkdir ".$2.partial"
tar xf - -C ".$2.partial"
"""
# Only the newest stays, whoever sent it.
_SETTLE = """
set -e
cd "$1"
rm -rf "$2"
mv ".$2.partial" "$2"
ls -d [0-9]* | sort | awk '{name[NR]=$0} END {for (i=1; i<NR; i++) print name[i]}' | xargs rm -rf
"""


def state_folder(current: Round) -> str:
    """Where a round's files lie below the hub's run folder."""
    return f"state/{current.number}.{current.fence}"


class HubCopies:
    """Copies the newest round of a hub to one other machine whenever there is a newer one."""

    def __init__(self, folder: Path, machine: Machine, there: str) -> None:
        """`folder`: the hub's run folder here; `there`: what it would be on the other machine."""
        self.folder, self.machine, self.there = folder, machine, there
        self.copied = 0
        """Round that arrived whole."""
        self.problem = ""
        """Why the last copy failed; empty after one that worked."""
        self._tried = 0
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def look(self, number: int) -> None:
        """Begin a copy if round `number` has none yet and none is under way. Returns at once."""
        if self._thread is not None and self._thread.is_alive():
            return
        if number <= max(self.copied, self._tried):
            return
        self._tried = number
        self._thread = threading.Thread(target=self._work, name="hub copy", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Whether the copy that was under way is over by then."""
        if self._thread is not None:
            self._thread.join(timeout=timeout_s)
            return not self._thread.is_alive()
        return True

    def close(self) -> None:
        """End a copy that is under way."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
        self.wait(10.0)

    def _work(self) -> None:
        try:
            self.copied = self._copy()
            self.problem = ""
        except (OSError, JupiterError, sqlite3.Error) as error:
            self.problem = error.detail if isinstance(error, JupiterError) else str(error)

    def _copy(self) -> int:
        """The round that was copied."""
        snapshot = self.folder / ".copy"
        shutil.rmtree(snapshot, ignore_errors=True)
        snapshot.mkdir()
        try:
            _at_one_instant(self.folder / LEDGER, snapshot / LEDGER)
            current, fence = _position(snapshot / LEDGER)
            if current is None:
                raise StateError("there is no round yet")
            # While this round is kept for the copy, the hub writes the next one and begins the one after it.
            kept = sum(record.bytes for record in _files(self.folder, current).values())
            require_free(self.folder, 2 * kept, "the hub, while a round of it is copied to another machine,")
            _link(self.folder, snapshot, current)
            name = f"{fence:08d}.{current.number:08d}"
            self._send(snapshot, current, name)
            return current.number
        finally:
            shutil.rmtree(snapshot, ignore_errors=True)

    def _send(self, snapshot: Path, current: Round, name: str) -> None:
        gnu = _gnu_tar()
        quiet = ["--warning=no-file-changed"] if gnu else []
        tar = ["tar", *quiet, "-c", "-f", "-", "-C", str(snapshot), LEDGER, state_folder(current)]
        size = sum(path.stat().st_size for path in snapshot.rglob("*") if path.is_file())
        sender = subprocess.Popen(tar, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        room = str(size // 1024 + 1024)
        argv = self.machine.argv("/bin/sh", "-c", _RECEIVE, "sh", f"{self.there}/{COPIES}", name, room)
        self._process = subprocess.Popen(argv, stdin=sender.stdout, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert sender.stdout is not None
        assert sender.stderr is not None
        sender.stdout.close()
        try:
            _, errors = self._process.communicate(timeout=_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            _, errors = self._process.communicate()
        missing = sender.stderr.read()
        sent = sender.wait()
        sender.stderr.close()
        # The hub removes its own name of a file that is being read: GNU tar then takes it for changed, although its
        # bytes are not, and ends with 1. Whatever else it ends so for it names.
        unchanged = sent == 0 or (gnu and sent == 1 and not missing)
        if self._process.returncode != 0 or not unchanged:
            said = plain_text((errors or missing).decode("utf-8", "replace")).strip().splitlines()
            raise StateError(said[0][:300] if said else "the copy was cut short")
        # tar ends its stream well even where files were missing: only now is the copy known to be whole.
        self.machine.shell(_SETTLE, f"{self.there}/{COPIES}", name)


def adopt(folder: Path) -> str:
    """Make the newest whole copy below `folder` (a hub's run folder) the state there, if it is further than that.

    Returns a sentence about what was taken over; empty if nothing was. To be called before the ledger is opened, under
    the run folder's lock. Can be repeated after a kill at any instant. Damaged copies are passed over.
    """
    own = _further(folder)
    for copy in sorted((folder / COPIES).glob("[0-9]*"), reverse=True):
        match = _NAME.fullmatch(copy.name)
        if match is None or (int(match[1]), int(match[2])) <= own:
            continue
        current = _sound(copy)
        if current is None:
            continue
        target = folder / state_folder(current)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(copy / state_folder(current), target)
        _sync(target)
        fresh = folder / f".{LEDGER}.adopted"
        fresh.unlink(missing_ok=True)
        _at_one_instant(copy / LEDGER, fresh)
        with contextlib.closing(sqlite3.connect(fresh, isolation_level=None)) as database:
            # Its lead belongs to a hub that is gone.
            database.execute(
                "UPDATE lead SET fence = max(fence, ?) + ?, expires_at = 0", (minutes(time.time()), _FENCES)
            )
            last = database.execute("SELECT seq FROM sqlite_sequence WHERE name = 'leases'").fetchone()
            # The former hub may have lent under the numbers that would come next.
            database.execute("DELETE FROM sqlite_sequence WHERE name = 'leases'")
            database.execute(
                "INSERT INTO sqlite_sequence (name, seq) VALUES ('leases', ?)", ((last[0] if last else 0) + _LEASES,)
            )
            database.execute("PRAGMA journal_mode = DELETE")
        # Once the ledger has its name the copy counts no more: all that it speaks of must be on the disk before.
        with fresh.open("rb") as file:
            sync_file(file.fileno())
        for suffix in ("-wal", "-shm"):
            (folder / f"{LEDGER}{suffix}").unlink(missing_ok=True)
        fresh.replace(folder / LEDGER)
        sync_folder(folder)
        return f"Taken over from another machine's hub: round {current.number}, with all that was merged before it"
    return ""


def _at_one_instant(ledger: Path, copy: Path) -> None:
    """A copy of a ledger that may be written to meanwhile."""
    with (
        contextlib.closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True, timeout=30.0)) as source,
        contextlib.closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)
        # One file holds all of it.
        target.execute("PRAGMA journal_mode = DELETE")


def _position(ledger: Path) -> tuple[Round | None, int]:
    """(its newest round, the fence of its lead)."""
    with contextlib.closing(Ledger(ledger)) as opened:
        current = opened.current()
    with contextlib.closing(sqlite3.connect(ledger)) as database:
        row = database.execute("SELECT fence FROM lead").fetchone()
        # The reader above has made it a write-ahead ledger again.
        database.execute("PRAGMA journal_mode = DELETE")
    return current, int(row[0]) if row is not None else 0


def _further(folder: Path) -> tuple[int, int]:
    """(fence, round) of a run folder's own state; (-1, -1) if there is none, none that could be led, or files of its
    round are missing or cut short."""
    ledger = folder / LEDGER
    if not ledger.exists():
        return -1, -1
    try:
        with contextlib.closing(sqlite3.connect(ledger, timeout=30.0)) as database:
            fence = database.execute("SELECT fence FROM lead").fetchone()
        with contextlib.closing(Ledger(ledger)) as opened:
            current = opened.current()
    except (sqlite3.DatabaseError, msgspec.DecodeError):
        return -1, -1
    if current is not None and not _there(folder, current):
        return -1, -1
    return (int(fence[0]) if fence else 0), current.number if current is not None else 0


def _files(folder: Path, current: Round) -> dict[Path, FileRecord]:
    """The files of a round below a run folder, or a copy of it."""
    records = {"theta": current.files.theta, "momentum": current.files.momentum, "base": current.files.base}
    where = folder / state_folder(current)
    return {where / f"{name}.safetensors": record for name, record in records.items() if record is not None}


def _there(folder: Path, current: Round) -> bool:
    """Whether a round's files are there in their sizes."""
    return all(
        path.exists() and path.stat().st_size == record.bytes for path, record in _files(folder, current).items()
    )


def _link(folder: Path, snapshot: Path, current: Round) -> None:
    """Names of a round's files that stay when the hub removes its own. OSError if one is missing."""
    for path in _files(folder, current):
        target = snapshot / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.hardlink_to(path)
        except FileNotFoundError:
            raise
        except OSError:
            # A file system without hard links.
            shutil.copyfile(path, target)


def _gnu_tar() -> bool:
    said = subprocess.run(["tar", "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=False)
    return b"GNU tar" in said.stdout


def _sync(folder: Path) -> None:
    """Write a folder through to the disk, with all that lies in it and the names that lead to it."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                sync_file(file.fileno())
    for below in (path for path in folder.rglob("*") if path.is_dir()):
        sync_folder(below)
    for above in (folder, folder.parent, folder.parent.parent):
        sync_folder(above)


def _sound(copy: Path) -> Round | None:
    """The round that a copy holds; None if anything of it is missing or damaged."""
    try:
        current, _ = _position(copy / LEDGER) if (copy / LEDGER).exists() else (None, 0)
    except (sqlite3.DatabaseError, msgspec.DecodeError):
        return None
    if current is None or not _there(copy, current):
        return None
    whole = all(sha256_file(path) == record.sha256 for path, record in _files(copy, current).items())
    return current if whole else None
