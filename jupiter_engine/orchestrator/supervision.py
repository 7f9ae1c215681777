"""One worker stage from start to result: start or re-attach, take in its facts, restart it if it dies."""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from jupiter_engine.cluster.stage import STOP_GRACE_S
from jupiter_engine.errors import StateError
from jupiter_engine.files import ProcessIdentity
from jupiter_engine.orchestrator.database import Database
from jupiter_engine.protocol import facts, journal
from jupiter_engine.protocol.decision import Decision
from jupiter_engine.protocol.orders import AnyOrder, ModelRef
from jupiter_engine.protocol.rows import Sample, Verdict
from jupiter_engine.remote.port import Remote
from jupiter_engine.units import plain_text

WORKER_ENV = {
    "PYTHONUNBUFFERED": "1",
    # Nothing in a cycle may reach for a hub behind the user's back.
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Spinning OpenMP threads hold cores that others (and their own partners) want; see docs/experiments/log.md.
    "OMP_WAIT_POLICY": "PASSIVE",
}
TABLES_OF_STAGE = {
    "collect": ("documents", "chunks", "items"),
    "generate": ("samples",),
    "filter": ("verdicts",),
    "evaluate": ("scores",),
}
RESULTS_OF_STAGE: dict[str, dict[str, Any]] = {
    "prepare": {"model": ModelRef},
    "collect": {"chunks_path": str, "items_path": str},
    "generate": {"samples_path": str},
    "queue": {"snapshot": str},
    "train": {"model": ModelRef, "steps": int, "first_loss": float, "last_loss": float, "tokens_per_s": float},
    "evaluate": {"scores_path": str},
    "gate": {"decision": Decision},
}
_LARGEST = 2**53
_LATE_S = 30.0
"""A fact older than this when it is taken in keeps its own time in the journal."""


class StageRun:
    """The engine's side of one run folder."""

    def __init__(
        self, database: Database, remote: Remote, folder: Path, *, cycle: str, domain: str, number: int, stage: str
    ) -> None:
        self.folder = folder
        self.run = folder.name
        self.cycle = cycle
        self.stage = stage
        self._database = database
        self._remote = remote
        self._domain = domain
        self._number = number
        self._process: ProcessIdentity | None = None
        self.outcome: facts.Finished | facts.Failed | None = None
        self.outcome_at = 0.0
        """time.monotonic() when the outcome was taken in."""
        self.halted = False

    async def begin(self, order: AnyOrder, *, attempt: int) -> None:
        """Write the order and start a worker, or re-attach to the one that is still at work."""
        spec = self.folder / "spec.json"
        written, wanted = await self._remote.read(spec), msgspec.json.encode(order)
        position, _ = self._database.run_position(self.run)
        told = await self._remote.read(self.folder / "events.jsonl", max(0, position - 1))
        with self._database.transaction():
            self._database.add_run(self.run, self._domain, self._number, self.stage)
            if position and not told:
                # A folder that was removed to redo the stage: its facts are counted anew.
                self._database.set_run_position(self.run, 0, 0)
            self._database.append(
                journal.StageStarted(cycle=self.cycle, stage=self.stage, run=self.run, attempt=attempt)
            )
        self._process = await self._living_worker()
        if self._process is None:
            if written != wanted:
                await self._remote.write(spec, wanted)
            await self._remote.remove(self.folder / "inbox" / "halt")
            self.halted = False
            self._process = await self._remote.start(
                (sys.executable, "-m", "jupiter_engine.worker", str(self.folder)),
                folder=self.folder,
                log=self.folder / "worker.log",
                env=WORKER_ENV,
            )

    async def _living_worker(self) -> ProcessIdentity | None:
        data = await self._remote.read(self.folder / "state.json")
        if not data:
            return None
        try:
            identity = msgspec.json.decode(data, type=facts.RunState).worker
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise StateError(
                f"{self.folder}/state.json is none: {error}", fix="remove the run folder and resume the cycle"
            ) from error
        return identity if await self._remote.alive(identity) else None

    async def working(self) -> bool:
        """Whether a worker lives; one that another start left behind counts too."""
        if self._process is not None and await self._remote.alive(self._process):
            return True
        self._process = await self._living_worker()
        return self._process is not None

    async def ask_halt(self) -> None:
        await self._remote.write(self.folder / "inbox" / "halt", b"")

    async def kill(self) -> None:
        if self._process is not None:
            await self._remote.stop(self._process, grace_s=STOP_GRACE_S)

    async def log_tail(self, size_bytes: int = 2000) -> str:
        data = await self._remote.read(self.folder / "worker.log")
        return plain_text(data[-size_bytes:].decode("utf-8", "replace")).strip()

    async def take_in(self) -> bool:
        """Take in the facts that have come; True if there were any.

        Rows, journal entries and the read position enter in one transaction.
        """
        offset, last_seq = self._database.run_position(self.run)
        data = await self._remote.read(self.folder / "events.jsonl", offset)
        data = data[: data.rfind(b"\n") + 1]
        if not data:
            return False
        progress: facts.Progress | None = None
        with self._database.transaction():
            for line in data.splitlines():
                fact = self._fact(line)
                if fact.seq <= last_seq:
                    continue
                last_seq = fact.seq
                if isinstance(fact, facts.Progress):
                    progress = fact
                else:
                    await self._take_in_fact(fact)
            if self.outcome is not None:
                self.outcome_at = time.monotonic()
            if progress is not None:
                self._database.set_progress(self.run, progress)
            self._database.set_run_position(self.run, offset + len(data), last_seq)
        return True

    def _fact(self, line: bytes) -> facts.AnyFact:
        try:
            fact: facts.AnyFact = facts.decoder.decode(line)
            if not (0 < fact.seq < _LARGEST and 0 <= fact.at < _LARGEST):
                raise msgspec.ValidationError(f"number {fact.seq} at {fact.at}")
            return fact
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise StateError(
                f"{self.folder}/events.jsonl holds a line that no worker writes: {error}",
                fix="look at the machine that wrote it; then remove the run folder and resume the cycle",
            ) from error

    async def _take_in_fact(self, fact: facts.AnyFact) -> None:
        match fact:
            case facts.Records():
                await self._take_in_rows(fact)
            case facts.Note():
                noted = journal.Noted(
                    cycle=self.cycle,
                    stage=self.stage,
                    level=fact.level,
                    text=plain_text(fact.text),
                    # Read long after it was written, when the engine was away meanwhile.
                    happened_at=fact.at if time.time() - fact.at > _LATE_S else None,
                )
                self._database.append(noted)
            case facts.Finished():
                self.outcome = fact
                result = self._remote.localise(self._sound(fact.result))
                self._database.append(
                    journal.StageFinished(cycle=self.cycle, stage=self.stage, run=self.run, result=result)
                )
            case facts.Failed():
                self.outcome = fact
                self.append_failure(fact.kind, fact.title, fact.detail, fact.fix)
            case facts.Halted():
                self.halted = True
                self._database.append(journal.StageHalted(cycle=self.cycle, stage=self.stage, run=self.run))

    def _sound(self, result: dict[str, Any]) -> dict[str, Any]:
        """A stage's result with what later stages take from it in the form that they need."""
        try:
            for key, kind in RESULTS_OF_STAGE.get(self.stage, {}).items():
                msgspec.convert(result.get(key), kind)
        except msgspec.ValidationError as error:
            raise StateError(
                f"{self.run} finished with a result that is none: {error}",
                fix="look at the machine that wrote it; then remove the run folder and resume the cycle",
            ) from error
        return result

    def append_failure(self, kind: str, title: str, detail: str, fix: str) -> None:
        self._database.append(
            journal.StageFailed(
                cycle=self.cycle,
                stage=self.stage,
                run=self.run,
                kind=kind,
                title=plain_text(title),
                detail=plain_text(detail),
                fix=plain_text(fix),
            )
        )

    async def _take_in_rows(self, fact: facts.Records) -> None:
        if fact.table not in TABLES_OF_STAGE.get(self.stage, ()):
            # A worker may be on another machine, which does not choose what enters the database.
            raise StateError(
                f"{self.run} reported rows of {fact.table[:40]!r}, which a {self.stage} stage does not make"
            )
        data = await self._remote.read(self.folder / "results" / f"{fact.table}.jsonl", fact.offset_bytes)
        data = data[: fact.length_bytes]
        lines = data.splitlines()
        if len(data) != fact.length_bytes or len(lines) != fact.count:
            raise StateError(
                f"{self.folder}/results/{fact.table}.jsonl lacks rows that its worker reported ({fact.count} expected)",
                fix="remove the run folder and resume the cycle: the stage is then done again",
            )
        try:
            rows = self._database.add_rows(fact.table, self._domain, self._number, self.run, lines)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise StateError(
                f"{self.folder}/results/{fact.table}.jsonl holds what is no row of {fact.table}: {error}",
                fix="look at the machine that wrote it; then remove the run folder and resume the cycle",
            ) from error
        counts: Counter[str] = Counter()
        for row in rows:
            if isinstance(row, Sample):
                counts[row.template] += 1
            elif isinstance(row, Verdict):
                counts["ok" if row.accepted else row.reason] += 1
        self._database.append(
            journal.RowsAdded(
                cycle=self.cycle, stage=self.stage, table=fact.table, count=len(rows), counts=dict(counts)
            )
        )
