"""rounds.db: which data is whose, which contribution counts, and which hub may say so.

The rows of a run are cut into blocks: block b is the b-th global batch of the recipe's data order, and an island makes
one step of it. A block is free, lent to one island for one round, or merged. It becomes merged only in the transaction
that also makes the base it went into the current one; in the same transaction everything else that was lent for the
round is free again. So no block is counted twice or lost, whenever anything is killed.

One hub leads. It holds a lease of the lead with a fence, a number that grows with every change of hands; every writing
transaction compares it first, so a hub that was replaced while it slept changes nothing any more (Deposed).

A ledger may be lost and begun anew while islands still work by the former one. So fences start at the minutes and
leases at the milliseconds since 1970: what an island has of a former ledger never looks like something of this one.

SQLite in WAL mode on a local disk (never a network file system: its locks are not to be relied upon there).
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal

import msgspec

from jupiter_engine.checkpoints.tensors import FileRecord
from jupiter_engine.errors import StateError

Ranges = tuple[tuple[int, int], ...]
"""Blocks first..end (end is not in), in the order in which they are used."""
Verdict = Literal["held", "merged", "superseded", "stale", "refused"]
"""`held`: sound, waits for the merge; `superseded`: another attempt of the same island was merged; `stale`: for a
round, lease or fence that is over; `refused`: it contradicts itself or was clipped away."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS run (
  id INTEGER PRIMARY KEY CHECK (id = 1), identity TEXT NOT NULL, tokens_total INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS lead (
  id INTEGER PRIMARY KEY CHECK (id = 1), owner TEXT NOT NULL, fence INTEGER NOT NULL, expires_at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS rounds (
  round INTEGER PRIMARY KEY, fence INTEGER NOT NULL, theta TEXT NOT NULL, momentum TEXT, base TEXT NOT NULL,
  opened_at REAL NOT NULL, merged_at REAL, metric BLOB);
CREATE TABLE IF NOT EXISTS leases (
  lease INTEGER PRIMARY KEY AUTOINCREMENT, round INTEGER NOT NULL, island TEXT NOT NULL, fence INTEGER NOT NULL,
  open INTEGER NOT NULL CHECK (open IN (0, 1)), UNIQUE (round, island));
CREATE TABLE IF NOT EXISTS blocks (
  block INTEGER PRIMARY KEY, tokens INTEGER NOT NULL, lease INTEGER REFERENCES leases, round INTEGER,
  CHECK (lease IS NULL OR round IS NULL));
CREATE INDEX IF NOT EXISTS lent ON blocks (lease) WHERE lease IS NOT NULL;
CREATE TABLE IF NOT EXISTS merges (
  block INTEGER PRIMARY KEY REFERENCES blocks, round INTEGER NOT NULL, island TEXT NOT NULL, attempt INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS contributions (
  round INTEGER NOT NULL, island TEXT NOT NULL, attempt INTEGER NOT NULL, lease INTEGER NOT NULL,
  fence INTEGER NOT NULL, sha256 TEXT NOT NULL, bytes INTEGER NOT NULL, used INTEGER NOT NULL,
  tokens INTEGER NOT NULL, verdict TEXT NOT NULL, reason TEXT NOT NULL, at REAL NOT NULL,
  PRIMARY KEY (round, island, attempt));
"""


class Deposed(StateError):
    """Another hub leads."""

    title = "Another hub leads this run"


class LeadTaken(StateError):
    """Another hub leads and its lease has not run out."""

    title = "Another hub leads this run"

    def __init__(self, owner: str, left_s: float) -> None:
        super().__init__(f"{owner} leads; its lease runs out in {left_s:.0f} s", fix="end it, or wait")
        self.left_s = left_s


class RoundFiles(msgspec.Struct, frozen=True, kw_only=True):
    """What a round starts from."""

    theta: FileRecord
    momentum: FileRecord | None
    """None before the first merge."""
    base: FileRecord
    """As the islands get it."""


class Round(msgspec.Struct, frozen=True, kw_only=True):
    number: int
    """Counts from 1."""
    fence: int
    """Of the hub that made the files; part of their names, so that two hubs never write the same one."""
    files: RoundFiles


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    lease: int
    round: int
    island: str
    fence: int
    blocks: Ranges

    @property
    def size(self) -> int:
        return sum(end - first for first, end in self.blocks)


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """A contribution as its island describes it."""

    round: int
    island: str
    attempt: int
    """Counts from 1 within a round; a later one holds all that an earlier one of the same process held."""
    lease: int
    fence: int
    """Of the plan that it worked by."""
    base_sha256: str
    file: FileRecord
    used: int
    """The first so many blocks of the lease went into it."""
    tokens: int
    """Counted targets of these blocks."""


class Totals(msgspec.Struct, frozen=True, kw_only=True):
    blocks: int
    free: int
    lent: int
    merged: int
    tokens_total: int
    tokens_merged: int


def minutes(now: float) -> int:
    """The lowest fence at a time (seconds since 1970)."""
    return int(now // 60)


def ranges(blocks: Sequence[int]) -> Ranges:
    """Ascending block numbers as ranges."""
    found: list[tuple[int, int]] = []
    for _, run in groupby(enumerate(blocks), key=lambda pair: pair[1] - pair[0]):
        numbers = [block for _, block in run]
        found.append((numbers[0], numbers[-1] + 1))
    return tuple(found)


def blocks_of(parts: Ranges) -> list[int]:
    return [block for first, end in parts for block in range(first, end)]


class Ledger:
    """One connection to rounds.db; any number of processes may hold one."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._db = sqlite3.connect(path, isolation_level=None, timeout=30.0)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        # On macOS fsync leaves the bytes in the drive's cache; elsewhere these two change nothing.
        self._db.execute("PRAGMA fullfsync = ON")
        self._db.execute("PRAGMA checkpoint_fullfsync = ON")
        self._db.execute("PRAGMA foreign_keys = ON")
        self._db.executescript(_SCHEMA)

    def close(self) -> None:
        self._db.close()

    @contextlib.contextmanager
    def _writing(self, fence: int | None) -> Iterator[sqlite3.Connection]:
        """One transaction, all or nothing; Deposed unless `fence` is that of the lead (None: not asked)."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            if fence is not None:
                self.must_lead(fence)
            yield self._db
            self._before_commit()
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise

    def must_lead(self, fence: int) -> None:
        """Deposed if `fence` is not that of the lead."""
        row = self._db.execute("SELECT owner, fence FROM lead").fetchone()
        owner, leading = row if row is not None else ("nobody", 0)
        if leading != fence:
            raise Deposed(f"{owner} leads with fence {leading}, this hub has {fence}", fix="let the other one go on")

    def _before_commit(self) -> None:
        """The last instant at which a kill leaves nothing of a transaction; tests die here."""

    # -- the run ---------------------------------------------------------------------------------
    def create(self, identity: str, tokens: Sequence[int]) -> None:
        """Enter the run's blocks, once. `identity`: hash of recipe, data and start; StateError if it is another."""
        with self._writing(None) as db:
            row = db.execute("SELECT identity FROM run").fetchone()
            if row is None:
                db.execute("INSERT INTO run VALUES (1, ?, ?)", (identity, sum(tokens)))
                db.executemany("INSERT INTO blocks (block, tokens) VALUES (?, ?)", enumerate(tokens))
                db.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('leases', ?)", (int(self._clock() * 1000),))
            elif row[0] != identity:
                raise StateError(
                    "rounds.db belongs to another recipe, data snapshot or start model",
                    fix="restore them, or remove the run folder to train anew",
                )

    def totals(self) -> Totals:
        row = self._db.execute(
            "SELECT count(*), sum(lease IS NULL AND round IS NULL), sum(lease IS NOT NULL), sum(round IS NOT NULL), "
            "sum(tokens), sum(CASE WHEN round IS NOT NULL THEN tokens ELSE 0 END) FROM blocks"
        ).fetchone()
        keys = ("blocks", "free", "lent", "merged", "tokens_total", "tokens_merged")
        return Totals(**{key: int(value or 0) for key, value in zip(keys, row, strict=True)})

    # -- the lead --------------------------------------------------------------------------------
    def take_lead(self, owner: str, ttl_s: float, gone: Callable[[str], bool] = lambda _: False) -> int:
        """Lead from now on; returns the fence. LeadTaken while another's lease runs, unless `gone(owner)` says that
        it is dead."""
        with self._writing(None) as db:
            row = db.execute("SELECT owner, fence, expires_at FROM lead").fetchone()
            now = self._clock()
            if row is not None and row[0] != owner and now < row[2] and not gone(row[0]):
                raise LeadTaken(row[0], row[2] - now)
            fence = max((row[1] if row is not None else 0) + 1, minutes(now))
            db.execute("INSERT OR REPLACE INTO lead VALUES (1, ?, ?, ?)", (owner, fence, now + ttl_s))
        return int(fence)

    def renew(self, fence: int, ttl_s: float) -> None:
        """Deposed if another hub has taken the lead."""
        with self._writing(fence) as db:
            db.execute("UPDATE lead SET expires_at = ?", (self._clock() + ttl_s,))

    # -- rounds ----------------------------------------------------------------------------------
    def current(self) -> Round | None:
        """The newest round; None before `begin`."""
        row = self._db.execute(
            "SELECT round, fence, theta, momentum, base FROM rounds ORDER BY round DESC LIMIT 1"
        ).fetchone()
        if row is None:
            return None
        theta, momentum, base = (
            msgspec.json.decode(text, type=FileRecord) if text is not None else None for text in row[2:]
        )
        assert theta is not None
        assert base is not None
        return Round(number=row[0], fence=row[1], files=RoundFiles(theta=theta, momentum=momentum, base=base))

    def begin(self, fence: int, files: RoundFiles) -> None:
        """Open round 1. StateError if there is a round already."""
        with self._writing(fence) as db:
            if db.execute("SELECT count(*) FROM rounds").fetchone()[0]:
                raise StateError("the run has begun before")
            self._open(db, 1, fence, files)

    def _open(self, db: sqlite3.Connection, number: int, fence: int, files: RoundFiles) -> None:
        texts = [
            msgspec.json.encode(record).decode() if record is not None else None
            for record in (files.theta, files.momentum, files.base)
        ]
        db.execute(
            "INSERT INTO rounds (round, fence, theta, momentum, base, opened_at) VALUES (?, ?, ?, ?, ?, ?)",
            (number, fence, *texts, self._clock()),
        )

    def metrics(self) -> list[bytes]:
        """The metric of every merged round, in order."""
        rows = self._db.execute("SELECT metric FROM rounds WHERE metric IS NOT NULL ORDER BY round")
        return [bytes(row[0]) for row in rows]

    # -- leases ----------------------------------------------------------------------------------
    def lend(self, fence: int, number: int, island: str, wanted: int) -> Lease | None:
        """Up to `wanted` free blocks for the island's work in the open round, the first ones; the lease that it has
        there already, if any; None if nothing is free."""
        with self._writing(fence) as db:
            self._must_be_open(number)
            row = db.execute("SELECT lease FROM leases WHERE round = ? AND island = ?", (number, island)).fetchone()
            if row is not None:
                return self._lease(row[0])
            free = [
                int(found[0])
                for found in db.execute(
                    "SELECT block FROM blocks WHERE lease IS NULL AND round IS NULL ORDER BY block LIMIT ?",
                    (max(wanted, 0),),
                )
            ]
            if not free:
                return None
            made = db.execute(
                "INSERT INTO leases (round, island, fence, open) VALUES (?, ?, ?, 1)", (number, island, fence)
            ).lastrowid
            db.executemany("UPDATE blocks SET lease = ? WHERE block = ?", ((made, block) for block in free))
        assert made is not None
        return self._lease(made)

    def take_back(self, fence: int, number: int) -> None:
        """Make all that is lent for the open round free again, so that it can be lent anew within the round. What an
        island still contributes by its former lease is not taken."""
        with self._writing(fence) as db:
            self._must_be_open(number)
            db.execute("UPDATE blocks SET lease = NULL WHERE lease IS NOT NULL")
            db.execute(
                "UPDATE contributions SET verdict = 'stale', reason = 'its lease was taken back' "
                "WHERE round = ? AND verdict = 'held'",
                (number,),
            )
            # Their numbers are never given again.
            db.execute("DELETE FROM leases WHERE round = ?", (number,))

    def leases(self, number: int) -> list[Lease]:
        """The open leases of a round."""
        rows = self._db.execute("SELECT lease FROM leases WHERE round = ? AND open = 1 ORDER BY lease", (number,))
        return [self._lease(row[0]) for row in rows.fetchall()]

    def _lease(self, lease: int) -> Lease:
        number, island, fence = self._db.execute(
            "SELECT round, island, fence FROM leases WHERE lease = ?", (lease,)
        ).fetchone()
        blocks = [
            row[0] for row in self._db.execute("SELECT block FROM blocks WHERE lease = ? ORDER BY block", (lease,))
        ]
        return Lease(lease=lease, round=number, island=island, fence=fence, blocks=ranges(blocks))

    def _must_be_open(self, number: int) -> None:
        found = self._db.execute("SELECT max(round) FROM rounds").fetchone()[0]
        if found != number:
            raise StateError(f"round {number} is not the open one ({found})")

    # -- contributions ---------------------------------------------------------------------------
    def record(self, fence: int, offer: Offer, problem: str = "") -> Verdict:
        """Enter a contribution and say what becomes of it. One that was entered before keeps its first verdict,
        whatever it says now. `problem`: why the hub found its file unfit."""
        key = (offer.round, offer.island, offer.attempt)
        with self._writing(fence) as db:
            known = db.execute(
                "SELECT verdict FROM contributions WHERE round = ? AND island = ? AND attempt = ?", key
            ).fetchone()
            if known is not None:
                verdict: Verdict = known[0]
                return verdict
            verdict, reason = ("refused", problem) if problem else self._judge(offer)
            db.execute(
                "INSERT INTO contributions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *key,
                    offer.lease,
                    offer.fence,
                    offer.file.sha256,
                    offer.file.bytes,
                    offer.used,
                    offer.tokens,
                    verdict,
                    reason,
                    self._clock(),
                ),
            )
        return verdict

    def refuse(self, fence: int, offer: Offer, problem: str) -> None:
        """Take back that a contribution is held: its files are gone or damaged since. StateError if it is not held."""
        with self._writing(fence) as db:
            changed = db.execute(
                "UPDATE contributions SET verdict = 'refused', reason = ? "
                "WHERE round = ? AND island = ? AND attempt = ? AND verdict = 'held'",
                (problem, offer.round, offer.island, offer.attempt),
            ).rowcount
            if changed != 1:
                raise StateError(f"attempt {offer.attempt} of {offer.island} in round {offer.round} waits for no merge")

    def _judge(self, offer: Offer) -> tuple[Verdict, str]:
        current = self.current()
        if current is None or offer.round != current.number:
            return "stale", f"round {offer.round} is over"
        row = self._db.execute(
            "SELECT island, fence, open, round FROM leases WHERE lease = ?", (offer.lease,)
        ).fetchone()
        if row is None or row[0] != offer.island or row[3] != offer.round:
            return "refused", f"lease {offer.lease} is not one of {offer.island} in round {offer.round}"
        if row[1] != offer.fence or not row[2]:
            return "stale", f"its lease has fence {row[1]}, it worked by fence {offer.fence}"
        if offer.base_sha256 != current.files.base.sha256:
            return "refused", "it started from another base"
        lease = self._lease(offer.lease)
        if not 0 < offer.used <= lease.size:
            return "refused", f"it used {offer.used} blocks of {lease.size}"
        tokens = self._tokens(blocks_of(lease.blocks)[: offer.used])
        if offer.tokens != tokens:
            return "refused", f"it counts {offer.tokens} tokens in blocks that hold {tokens}"
        return "held", ""

    def _tokens(self, blocks: Sequence[int]) -> int:
        count = "SELECT sum(tokens) FROM blocks WHERE block >= ? AND block < ?"
        return sum(int(self._db.execute(count, part).fetchone()[0]) for part in ranges(blocks))

    def held(self, number: int) -> list[Offer]:
        """Of every island the held contribution that used most (of equals the latest)."""
        base = self.current()
        rows = self._db.execute(
            "SELECT island, attempt, lease, fence, sha256, bytes, used, tokens FROM contributions "
            "WHERE round = ? AND verdict = 'held' ORDER BY island, used, attempt",
            (number,),
        )
        best: dict[str, Offer] = {}
        for island, attempt, lease, fence, sha256, size, used, tokens in rows.fetchall():
            best[island] = Offer(
                round=number,
                island=island,
                attempt=attempt,
                lease=lease,
                fence=fence,
                base_sha256=base.files.base.sha256 if base is not None else "",
                file=FileRecord(sha256=sha256, bytes=size),
                used=used,
                tokens=tokens,
            )
        return list(best.values())

    def verdicts(self) -> dict[tuple[int, str, int], tuple[Verdict, str]]:
        """(round, island, attempt) -> (verdict, reason), of everything that ever arrived."""
        rows = self._db.execute("SELECT round, island, attempt, verdict, reason FROM contributions")
        return {(row[0], row[1], row[2]): (row[3], row[4]) for row in rows}

    def commit(
        self,
        fence: int,
        number: int,
        merged: Sequence[Offer],
        files: RoundFiles,
        metric: bytes,
        refused: dict[str, str] | None = None,
    ) -> None:
        """End a round: the blocks of the merged contributions count, all others are free again, the next round is
        open with its new files. All of it or nothing. `refused`: island -> why its contribution was left out."""
        with self._writing(fence) as db:
            self._must_be_open(number)
            for offer in merged:
                self._count(db, offer)
            for island, reason in (refused or {}).items():
                db.execute(
                    "UPDATE contributions SET verdict = 'refused', reason = ? "
                    "WHERE round = ? AND island = ? AND verdict = 'held'",
                    (reason, number, island),
                )
            db.execute(
                "UPDATE contributions SET verdict = 'superseded', reason = 'another attempt was merged, or none' "
                "WHERE round = ? AND verdict = 'held'",
                (number,),
            )
            # Whatever is still lent was not merged.
            db.execute("UPDATE blocks SET lease = NULL WHERE lease IS NOT NULL")
            db.execute("UPDATE leases SET open = 0 WHERE open = 1")
            db.execute("UPDATE rounds SET merged_at = ?, metric = ? WHERE round = ?", (self._clock(), metric, number))
            self._open(db, number + 1, fence, files)

    def _count(self, db: sqlite3.Connection, offer: Offer) -> None:
        changed = db.execute(
            "UPDATE contributions SET verdict = 'merged' "
            "WHERE round = ? AND island = ? AND attempt = ? AND lease = ? AND verdict = 'held'",
            (offer.round, offer.island, offer.attempt, offer.lease),
        ).rowcount
        if changed != 1:
            raise StateError(f"attempt {offer.attempt} of {offer.island} in round {offer.round} waits for no merge")
        blocks = blocks_of(self._lease(offer.lease).blocks)[: offer.used]
        for block in blocks:
            db.execute("UPDATE blocks SET lease = NULL, round = ? WHERE block = ?", (offer.round, block))
            # The primary key refuses a block that was counted before.
            db.execute("INSERT INTO merges VALUES (?, ?, ?, ?)", (block, offer.round, offer.island, offer.attempt))

    def merges(self) -> list[tuple[int, int, str, int]]:
        """(block, round, island, attempt) of everything that counts, by block: for audits."""
        return list(self._db.execute("SELECT block, round, island, attempt FROM merges ORDER BY block"))

    def last_share(self, number: int) -> dict[str, int]:
        """Island -> blocks that it had merged in round `number`."""
        rows = self._db.execute("SELECT island, count(*) FROM merges WHERE round = ? GROUP BY island", (number,))
        return {row[0]: row[1] for row in rows}
