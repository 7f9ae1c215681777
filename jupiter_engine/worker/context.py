"""A run folder seen from inside the worker: order in, facts, rows and metrics out.

spec.json          the order (written by the control wing, never changed)
state.json         who works here now (pid, start time, attempt)
lock               held by the worker for its whole life: two can never share a run
events.jsonl       facts
metrics.jsonl      optimizer steps
results/<t>.jsonl  rows of table <t>
inbox/halt         present: stop at the next safe point
worker.log         stdout and stderr
"""

from __future__ import annotations

import fcntl
import os
import platform
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, TypeVar

import msgspec

from jupiter_engine import __version__
from jupiter_engine.errors import StateError
from jupiter_engine.files import ProcessIdentity, disk_full, drop_torn_tail, whole_lines, write_json
from jupiter_engine.protocol import facts
from jupiter_engine.protocol.orders import AnyOrder
from jupiter_engine.protocol.orders import decoder as order_decoder
from jupiter_engine.protocol.rows import TABLES, Row

R = TypeVar("R", bound=Row)


class Halt(Exception):
    """Raised at a safe point after a halt was asked for; everything done so far is on disk."""


class RunContext:
    """Everything a stage may touch besides its inputs. Not thread-safe: one thread reports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.order: AnyOrder = order_decoder.decode((folder / "spec.json").read_bytes())
        (folder / "results").mkdir(exist_ok=True)
        (folder / "inbox").mkdir(exist_ok=True)
        self._lock = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError(f"another worker holds {folder}", fix="wait for it to end") from None
        self.attempt = 1
        if (folder / "state.json").exists():
            self.attempt = msgspec.json.decode((folder / "state.json").read_bytes(), type=facts.RunState).attempt + 1
        write_json(folder / "state.json", facts.RunState(worker=ProcessIdentity.of(os.getpid()), attempt=self.attempt))
        drop_torn_tail(folder / "events.jsonl")
        drop_torn_tail(folder / "metrics.jsonl")
        self._seq = 0
        announced: dict[str, int] = {}
        if (folder / "events.jsonl").exists():
            for line, _ in whole_lines(folder / "events.jsonl"):
                fact = facts.decoder.decode(line)
                self._seq = fact.seq
                if isinstance(fact, facts.Records):
                    announced[fact.table] = fact.offset_bytes + fact.length_bytes
        self._events = (folder / "events.jsonl").open("ab")
        self._files: dict[str, IO[bytes]] = {}
        self._progress_at = 0.0
        self._progress_from: tuple[float, float, str] | None = None
        self._emit(
            facts.Started,
            attempt=self.attempt,
            pid=os.getpid(),
            host=socket.gethostname(),
            versions={"jupiter": __version__, "python": platform.python_version()},
        )
        self._announce_rest(announced)

    def _announce_rest(self, announced: dict[str, int]) -> None:
        """Report rows that an earlier attempt wrote but was killed before it could report."""
        for table in TABLES:
            path, start = self.results(table), announced.get(table, 0)
            drop_torn_tail(path)
            if path.exists() and (length := path.stat().st_size - start) > 0:
                count = sum(1 for _ in whole_lines(path, start))
                self._emit(facts.Records, table=table, offset_bytes=start, length_bytes=length, count=count)

    # -- facts -----------------------------------------------------------------------------------
    def _emit(self, fact: type[facts.Fact], /, **fields: Any) -> None:
        self._seq += 1
        self._append(self._events, msgspec.json.encode(fact(seq=self._seq, at=time.time(), **fields)) + b"\n")

    @staticmethod
    def _append(file: IO[bytes], data: bytes, *, sync: bool = False) -> None:
        try:
            file.write(data)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        except OSError as error:
            raise disk_full(error, Path(file.name)) from error

    def progress(self, done: float, total: float, unit: str, note: str = "") -> None:
        """Report how far the stage is; at most four a second are written (the last one always).

        Rate and ETA are taken from the work done in this attempt only.
        """
        now = time.monotonic()
        if self._progress_from is None or self._progress_from[2] != unit or done < self._progress_from[1]:
            self._progress_from = (now, done, unit)
        if now - self._progress_at < 0.25 and done < total:
            return
        self._progress_at = now
        start, first, _ = self._progress_from
        rate = (done - first) / (now - start) if now > start and done > first else None
        eta = (total - done) / rate if rate else None
        self._emit(facts.Progress, done=done, total=total, unit=unit, rate_per_s=rate, eta_s=eta, note=note)

    def note(self, text: str, level: str = "info") -> None:
        """A sentence for the person (level: info, warning, error)."""
        self._emit(facts.Note, level=level, text=text)

    def finish(self, result: dict[str, Any]) -> None:
        """The stage is complete; `result` holds plain JSON values."""
        self._emit(facts.Finished, result=result)

    def fail(self, kind: str, title: str, detail: str, fix: str) -> None:
        self._emit(facts.Failed, kind=kind, title=title, detail=detail, fix=fix)

    def halted(self) -> None:
        self._emit(facts.Halted)

    # -- rows ------------------------------------------------------------------------------------
    def results(self, table: str) -> Path:
        """Path of results/<table>.jsonl."""
        return self.folder / "results" / f"{table}.jsonl"

    def existing(self, kind: type[R]) -> list[R]:
        """Rows that an earlier attempt of this run already wrote (a torn last line is removed)."""
        path = self.results(_table_of(kind))
        drop_torn_tail(path)
        if not path.exists():
            return []
        decoder = msgspec.json.Decoder(kind)
        return [decoder.decode(line) for line, _ in whole_lines(path)]

    def records(self, rows: Iterable[Row]) -> int:
        """Append rows (all of one table) durably, then report them. Call `existing` first when resuming."""
        batch = list(rows)
        if not batch:
            return 0
        table = _table_of(type(batch[0]))
        file = self._files.get(table)
        if file is None:
            drop_torn_tail(self.results(table))
            file = self._files[table] = self.results(table).open("ab")
        offset = os.fstat(file.fileno()).st_size
        data = b"".join(msgspec.json.encode(row) + b"\n" for row in batch)
        self._append(file, data, sync=True)
        self._emit(facts.Records, table=table, offset_bytes=offset, length_bytes=len(data), count=len(batch))
        return len(batch)

    def metric(self, metric: facts.Metric) -> None:
        file = self._files.get("\0metrics")
        if file is None:
            file = self._files["\0metrics"] = (self.folder / "metrics.jsonl").open("ab")
        self._append(file, msgspec.json.encode(metric) + b"\n")

    def close(self) -> None:
        """Close the files and release the lock, as the end of the process does; the context is of no use afterwards."""
        files: list[IO[Any]] = [*self._files.values(), self._events, self._lock]
        for file in files:
            file.close()

    # -- control ---------------------------------------------------------------------------------
    def halt_asked(self) -> bool:
        return (self.folder / "inbox" / "halt").exists()

    def check_halt(self) -> None:
        """Raise Halt if a stop was asked for; call it only where everything done is on disk."""
        if self.halt_asked():
            raise Halt


def _table_of(kind: type[Row]) -> str:
    for name, row in TABLES.items():
        if row is kind:
            return name
    raise StateError(f"{kind.__name__} is no known table")


def read_rows(path: Path, kind: type[R]) -> list[R]:
    """All rows of a finished results file; a damaged line is a StateError naming file and line."""
    decoder = msgspec.json.Decoder(kind)
    rows: list[R] = []
    for number, (line, _) in enumerate(whole_lines(path), 1):
        try:
            rows.append(decoder.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise StateError(
                f"{path}, line {number}: {error}", fix="remove the run folder to redo that stage"
            ) from error
    return rows
