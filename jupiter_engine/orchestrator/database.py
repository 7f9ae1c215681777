"""The workspace's database: the journal, the rows with their lineage, and the command inbox.

SQLite in WAL mode: one writer (the engine), any number of readers; commands are the only
thing that others insert. Each fact of a worker enters in one transaction with the rows it
announces, the journal entries it causes and the read position in the worker's file, so a
kill at any instant repeats nothing and loses nothing.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec

from jupiter_engine.errors import DiskFull, SchemaTooNew, StateError
from jupiter_engine.protocol import commands, journal
from jupiter_engine.protocol.facts import Progress
from jupiter_engine.protocol.rows import TABLES, Chunk, Document, Row, Sample, Verdict
from jupiter_engine.protocol.state import Failure

SCHEMA_VERSION = 1

_SCHEMA = """
CREATE TABLE journal(
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    at REAL NOT NULL,
    body BLOB NOT NULL);
CREATE TABLE rows(
    tbl TEXT NOT NULL, id TEXT NOT NULL, domain TEXT NOT NULL, cycle INTEGER NOT NULL, run TEXT NOT NULL,
    body BLOB NOT NULL,
    PRIMARY KEY(tbl, domain, id)) WITHOUT ROWID;
CREATE INDEX rows_by_run ON rows(run, tbl);
CREATE TABLE samples(
    id TEXT NOT NULL, domain TEXT NOT NULL, cycle INTEGER NOT NULL, ordinal INTEGER NOT NULL,
    template TEXT NOT NULL, body BLOB NOT NULL,
    filtered INTEGER, reason TEXT NOT NULL DEFAULT '', scores BLOB,
    review TEXT NOT NULL DEFAULT '', review_reason TEXT NOT NULL DEFAULT '', reviewer TEXT NOT NULL DEFAULT '',
    reviewed_at REAL,
    PRIMARY KEY(domain, id));
CREATE INDEX samples_by_cycle ON samples(domain, cycle, ordinal);
CREATE TABLE runs(
    run TEXT PRIMARY KEY, domain TEXT NOT NULL, cycle INTEGER NOT NULL, stage TEXT NOT NULL,
    offset_bytes INTEGER NOT NULL DEFAULT 0, seq INTEGER NOT NULL DEFAULT 0, progress BLOB);
CREATE TABLE commands(
    id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, body BLOB NOT NULL, done_at REAL, error BLOB);
"""

SampleStatus = Literal["new", "accepted", "rejected"]


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """A journal entry with its place and time."""

    seq: int
    at: float
    entry: journal.AnyEntry


class SampleView(msgspec.Struct, frozen=True, kw_only=True):
    """A sample with everything that was decided about it."""

    sample: Sample
    domain: str
    filtered: bool | None
    """True: the filters accepted it; None: not filtered yet."""
    reason: str
    scores: dict[str, float]
    review: Literal["", "accept", "reject"]
    review_reason: str
    reviewer: str
    reviewed_at: float | None

    @property
    def status(self) -> SampleStatus:
        """A person's verdict outweighs the filters'."""
        if self.review:
            return "accepted" if self.review == "accept" else "rejected"
        if self.filtered is None:
            return "new"
        return "accepted" if self.filtered else "rejected"


_SAMPLE_COLUMNS = "body, domain, filtered, reason, scores, review, review_reason, reviewer, reviewed_at"
_STATUS_SQL = {
    "new": "review = '' AND filtered IS NULL",
    "accepted": "(review = 'accept' OR (review = '' AND filtered = 1))",
    "rejected": "(review = 'reject' OR (review = '' AND filtered = 0))",
    "reviewed": "review != ''",
    "unreviewed": "review = ''",
}
_sample_decoder = msgspec.json.Decoder(Sample)
_progress_decoder = msgspec.json.Decoder(Progress)


def _view(row: tuple[Any, ...]) -> SampleView:
    body, domain, filtered, reason, scores, review, review_reason, reviewer, reviewed_at = row
    return SampleView(
        sample=_sample_decoder.decode(body),
        domain=domain,
        filtered=None if filtered is None else bool(filtered),
        reason=reason,
        scores=msgspec.json.decode(scores) if scores else {},
        review=review,
        review_reason=review_reason,
        reviewer=reviewer,
        reviewed_at=reviewed_at,
    )


class Database:
    """One connection to `.jupiter/jupiter.db`; use it from one thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode=WAL")
            # NORMAL keeps every commit atomic; FULL also keeps the last one through a power cut.
            self._connection.execute("PRAGMA synchronous=FULL")
            self._migrate()
        except sqlite3.DatabaseError as error:
            raise StateError(
                f"{path} cannot be opened: {error}", fix="restore it from a backup, or move it away to start anew"
            ) from error

    def close(self) -> None:
        self._connection.close()

    def _migrate(self) -> None:
        version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if version == SCHEMA_VERSION:
            return
        if version > SCHEMA_VERSION:
            raise SchemaTooNew(
                f"{self.path} has schema {version}, this Jupiter knows {SCHEMA_VERSION}", fix="update Jupiter"
            )
        with self.transaction():
            # Another process may have created the schema between the two looks.
            if self._connection.execute("PRAGMA user_version").fetchone()[0] == 0:
                for statement in _SCHEMA.split(";\n"):
                    if statement.strip():
                        self._connection.execute(statement)
                self._connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing; a full disk becomes DiskFull, nothing of the block is kept."""
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                # On a full disk SQLite may have rolled back by itself.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise DiskFull(f"no room left while writing {self.path}", fix="free some space, then resume") from error
            raise

    # -- journal ---------------------------------------------------------------------------------
    def append(self, entry: journal.AnyEntry) -> None:
        self._connection.execute(
            "INSERT INTO journal(at, body) VALUES(?, ?)", (time.time(), msgspec.json.encode(entry))
        )

    def entries(self, after: int = 0) -> list[Recorded]:
        """Journal entries with seq > after, in order."""
        rows = self._connection.execute("SELECT seq, at, body FROM journal WHERE seq > ? ORDER BY seq", (after,))
        return [Recorded(seq=seq, at=at, entry=journal.decoder.decode(body)) for seq, at, body in rows]

    # -- runs ------------------------------------------------------------------------------------
    def add_run(self, run: str, domain: str, cycle: int, stage: str) -> None:
        self._connection.execute(
            "INSERT OR IGNORE INTO runs(run, domain, cycle, stage) VALUES(?, ?, ?, ?)", (run, domain, cycle, stage)
        )

    def run_position(self, run: str) -> tuple[int, int]:
        """(read offset in the run's events.jsonl in bytes, seq of the last fact taken in)."""
        row = self._connection.execute("SELECT offset_bytes, seq FROM runs WHERE run = ?", (run,)).fetchone()
        return (0, 0) if row is None else (row[0], row[1])

    def set_run_position(self, run: str, offset_bytes: int, seq: int) -> None:
        self._connection.execute("UPDATE runs SET offset_bytes = ?, seq = ? WHERE run = ?", (offset_bytes, seq, run))

    def set_progress(self, run: str, progress: Progress) -> None:
        self._connection.execute("UPDATE runs SET progress = ? WHERE run = ?", (msgspec.json.encode(progress), run))

    def progress(self, run: str) -> Progress | None:
        row = self._connection.execute("SELECT progress FROM runs WHERE run = ?", (run,)).fetchone()
        return _progress_decoder.decode(row[0]) if row and row[0] else None

    # -- rows ------------------------------------------------------------------------------------
    def add_rows(self, table: str, domain: str, cycle: int, run: str, lines: Iterable[bytes]) -> list[Row]:
        """Insert rows (JSON lines of `table`); those already known are replaced. Returns the decoded rows."""
        decoder = msgspec.json.Decoder(TABLES[table])
        decoded: list[Row] = []
        for line in lines:
            row = decoder.decode(line)
            decoded.append(row)
            if isinstance(row, Sample):
                self._connection.execute(
                    "INSERT INTO samples(id, domain, cycle, ordinal, template, body) VALUES(?, ?, ?, "
                    "(SELECT COALESCE(MAX(ordinal), 0) + 1 FROM samples WHERE domain = ?2 AND cycle = ?3), ?, ?) "
                    "ON CONFLICT(domain, id) DO NOTHING",
                    (row.id, domain, cycle, row.template, line),
                )
            elif isinstance(row, Verdict):
                self._connection.execute(
                    "UPDATE samples SET filtered = ?, reason = ?, scores = ? WHERE domain = ? AND id = ?",
                    (int(row.accepted), row.reason, msgspec.json.encode(row.scores), domain, row.id),
                )
            else:
                self._connection.execute(
                    "INSERT OR REPLACE INTO rows(tbl, id, domain, cycle, run, body) VALUES(?, ?, ?, ?, ?, ?)",
                    (table, row.id, domain, cycle, run, line),
                )
        return decoded

    def row(self, table: str, domain: str, row_id: str) -> Row | None:
        found = self._connection.execute(
            "SELECT body FROM rows WHERE tbl = ? AND domain = ? AND id = ?", (table, domain, row_id)
        ).fetchone()
        return msgspec.json.decode(found[0], type=TABLES[table]) if found else None

    def find(self, table: str, prefix: str) -> list[tuple[str, Row]]:
        """(domain, row) of rows whose id starts with `prefix`, at most 20."""
        found = self._connection.execute(
            "SELECT domain, body FROM rows WHERE tbl = ? AND substr(id, 1, ?) = ? LIMIT 20",
            (table, len(prefix), prefix),
        )
        return [(domain, msgspec.json.decode(body, type=TABLES[table])) for domain, body in found]

    def documents(self, domain: str, *, limit: int = 200, offset: int = 0) -> list[Document]:
        found = self._connection.execute(
            "SELECT body FROM rows WHERE tbl = 'documents' AND domain = ? ORDER BY id LIMIT ? OFFSET ?",
            (domain, limit, offset),
        )
        return [msgspec.json.decode(body, type=Document) for (body,) in found]

    def chunk(self, domain: str, chunk_id: str) -> Chunk | None:
        row = self.row("chunks", domain, chunk_id)
        return row if isinstance(row, Chunk) else None

    # -- samples ---------------------------------------------------------------------------------
    def samples(
        self,
        *,
        domain: str | None = None,
        cycle: int | None = None,
        status: str | None = None,
        search: str = "",
        limit: int = 100,
        offset: int = 0,
    ) -> list[SampleView]:
        """Samples in the order they were generated.

        `status`: new, accepted, rejected, reviewed, unreviewed or None for all;
        `search`: text that prompt, response, template or rejection reason must contain.
        """
        where, values = self._sample_filter(domain, cycle, status, search)
        rows = self._connection.execute(
            f"SELECT {_SAMPLE_COLUMNS} FROM samples{where} ORDER BY domain, cycle, ordinal LIMIT ? OFFSET ?",  # noqa: S608 - constant parts
            (*values, limit, offset),
        )
        return [_view(row) for row in rows]

    def count_samples(
        self, *, domain: str | None = None, cycle: int | None = None, status: str | None = None, search: str = ""
    ) -> int:
        where, values = self._sample_filter(domain, cycle, status, search)
        return int(self._connection.execute(f"SELECT COUNT(*) FROM samples{where}", values).fetchone()[0])  # noqa: S608 - constant parts

    @staticmethod
    def _sample_filter(
        domain: str | None, cycle: int | None, status: str | None, search: str
    ) -> tuple[str, tuple[Any, ...]]:
        parts: list[str] = []
        values: list[Any] = []
        if domain is not None:
            parts.append("domain = ?")
            values.append(domain)
        if cycle is not None:
            parts.append("cycle = ?")
            values.append(cycle)
        if status is not None:
            parts.append(_STATUS_SQL[status])
        if search:
            parts.append("(instr(lower(CAST(body AS TEXT)), lower(?)) OR instr(reason, ?))")
            values += [search, search]
        return (" WHERE " + " AND ".join(parts) if parts else ""), tuple(values)

    def sample(self, prefix: str) -> SampleView | None:
        """The sample whose id is, or alone starts with, `prefix`."""
        rows = self._connection.execute(
            f"SELECT {_SAMPLE_COLUMNS} FROM samples WHERE substr(id, 1, ?) = ? LIMIT 2",  # noqa: S608 - constant parts
            (len(prefix), prefix),
        ).fetchall()
        return _view(rows[0]) if len(rows) == 1 else None

    def set_review(self, sample_id: str, domain: str, verdict: str, reason: str, by: str) -> None:
        self._connection.execute(
            "UPDATE samples SET review = ?, review_reason = ?, reviewer = ?, reviewed_at = ? "
            "WHERE domain = ? AND id = ?",
            ("" if verdict == "undecided" else verdict, reason, by, time.time(), domain, sample_id),
        )

    # -- commands --------------------------------------------------------------------------------
    def submit(self, command: commands.AnyCommand) -> int:
        with self.transaction():
            cursor = self._connection.execute(
                "INSERT INTO commands(at, body) VALUES(?, ?)", (time.time(), msgspec.json.encode(command))
            )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def open_commands(self) -> list[tuple[int, commands.AnyCommand]]:
        rows = self._connection.execute("SELECT id, body FROM commands WHERE done_at IS NULL ORDER BY id")
        return [(number, commands.decoder.decode(body)) for number, body in rows]

    def answer_command(self, number: int, refusal: Failure | None) -> None:
        """Mark a command as carried out, or as refused for a reason."""
        reason = None if refusal is None else msgspec.json.encode(refusal)
        self._connection.execute(
            "UPDATE commands SET done_at = ?, error = ? WHERE id = ?", (time.time(), reason, number)
        )

    def command_answer(self, number: int) -> tuple[bool, Failure | None]:
        """(answered, why it was refused or None)."""
        row = self._connection.execute("SELECT done_at, error FROM commands WHERE id = ?", (number,)).fetchone()
        refusal = msgspec.json.decode(row[1], type=Failure) if row and row[1] else None
        return (row is not None and row[0] is not None, refusal)
