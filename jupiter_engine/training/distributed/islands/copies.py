"""A second copy of the hub's state on another machine, so that the loss of the hub's machine loses no merged round.

After each merge the ledger (as it was at one instant) and the files of the round it holds go to the machine of an
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
from pathlib import Path
from typing import Final

import msgspec

from jupiter_engine.errors import JupiterError, StateError
from jupiter_engine.files import sha256_file, sync_folder
from jupiter_engine.training.distributed.islands.ledger import Ledger, Round
from jupiter_engine.training.distributed.islands.starting import Machine
from jupiter_engine.units import plain_text

COPIES: Final = "copies"
LEDGER: Final = "rounds.db"
_NAME = re.compile(r"(\d{8})\.(\d{8})")
_LIMIT_S = 3600.0
"""A copy that takes longer is given up: by then there is a newer round."""
_FENCES = 1000
"""A copy may be older than the hub that it was made by, which may have changed hands since, but not so often."""
_LEASES = 100_000
"""... nor lent so often."""

# $1: copies folder there, $2: name of the copy.
_RECEIVE = """
set -e
mkdir -p "$1"
cd "$1"
rm -rf .*.partial
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
            name = f"{fence:08d}.{current.number:08d}"
            self._send(snapshot, current, name)
            return current.number
        finally:
            shutil.rmtree(snapshot, ignore_errors=True)

    def _send(self, snapshot: Path, current: Round, name: str) -> None:
        tar = ["tar", "cf", "-", "-C", str(snapshot), LEDGER, "-C", str(self.folder), state_folder(current)]
        sender = subprocess.Popen(tar, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        argv = self.machine.argv("/bin/sh", "-c", _RECEIVE, "sh", f"{self.there}/{COPIES}", name)
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
        if self._process.returncode != 0 or sent != 0:
            said = plain_text((errors or missing).decode("utf-8", "replace")).strip().splitlines()
            raise StateError(said[0][:300] if said else "the copy was cut short")
        # tar ends its stream well even where files were missing: only now is the copy known to be whole.
        self.machine.shell(_SETTLE, f"{self.there}/{COPIES}", name)


def adopt(folder: Path) -> str:
    """Make the newest whole copy below `folder` (a hub's run folder) the state there, if it is further than that.

    Returns a sentence about what was taken over; empty if nothing was. To be called before the ledger is opened, under
    the run folder's lock. Can be repeated after a kill at any instant. Damaged copies are passed over.
    """
    own = _further(folder / LEDGER)
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
        fresh = folder / f".{LEDGER}.adopted"
        fresh.unlink(missing_ok=True)
        _at_one_instant(copy / LEDGER, fresh)
        with contextlib.closing(sqlite3.connect(fresh, isolation_level=None)) as database:
            # Its lead belongs to a hub that is gone.
            database.execute("UPDATE lead SET fence = fence + ?, expires_at = 0", (_FENCES,))
            last = database.execute("SELECT seq FROM sqlite_sequence WHERE name = 'leases'").fetchone()
            # The former hub may have lent under the numbers that would come next.
            database.execute("DELETE FROM sqlite_sequence WHERE name = 'leases'")
            database.execute(
                "INSERT INTO sqlite_sequence (name, seq) VALUES ('leases', ?)", ((last[0] if last else 0) + _LEASES,)
            )
            database.execute("PRAGMA journal_mode = DELETE")
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


def _further(ledger: Path) -> tuple[int, int]:
    """(fence, round) of a ledger; (-1, -1) if there is none, or none that could be led."""
    if not ledger.exists():
        return -1, -1
    with contextlib.closing(sqlite3.connect(ledger, timeout=30.0)) as database:
        try:
            fence = database.execute("SELECT fence FROM lead").fetchone()
            number = database.execute("SELECT max(round) FROM rounds").fetchone()
        except sqlite3.DatabaseError:
            return -1, -1
    return (int(fence[0]) if fence else 0), int(number[0] or 0)


def _sound(copy: Path) -> Round | None:
    """The round that a copy holds; None if anything of it is missing or damaged."""
    try:
        current, _ = _position(copy / LEDGER) if (copy / LEDGER).exists() else (None, 0)
    except (sqlite3.DatabaseError, msgspec.DecodeError):
        return None
    if current is None:
        return None
    files = {"theta": current.files.theta, "momentum": current.files.momentum, "base": current.files.base}
    for name, record in files.items():
        if record is None:
            continue
        path = copy / state_folder(current) / f"{name}.safetensors"
        if not path.exists() or path.stat().st_size != record.bytes or sha256_file(path) != record.sha256:
            return None
    return current
