"""State: what the journal adds up to. Viewers read it; only orchestrator.state.apply makes it."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from jupiter_engine.protocol.commands import Mode
from jupiter_engine.protocol.decision import Decision
from jupiter_engine.protocol.orders import ModelRef

StageStatus = Literal["pending", "running", "halted", "done", "failed"]
CycleStatusName = Literal["running", "pausing", "paused", "stopping", "stopped", "failed", "finished"]


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    kind: str
    title: str
    detail: str
    fix: str


class StageState(msgspec.Struct, kw_only=True):
    stage: str
    status: StageStatus = "pending"
    run: str = ""
    attempt: int = 0
    started_at: float | None = None
    ended_at: float | None = None
    result: dict[str, Any] = {}
    failure: Failure | None = None


class CycleState(msgspec.Struct, kw_only=True):
    id: str
    domain: str
    number: int
    mode: Mode
    remaining: int
    settings: dict[str, Any]
    created_at: float
    by: str
    status: CycleStatusName = "running"
    waiting_for: Literal["", "review", "decision"] = ""
    stages: dict[str, StageState]
    counts: dict[str, int] = {}
    """Rows by kind: documents, chunks, items, samples, accepted, rejected (by the filters), scores, reviewed."""
    rejected: dict[str, int] = {}
    """Rejected samples by reason (filters)."""
    templates: dict[str, int] = {}
    """Samples by template."""
    decision: Decision | None = None
    answer: Literal["", "promote", "keep"] = ""
    answered_by: str = ""
    outcome: Literal["", "promoted", "kept"] = ""
    report: str = ""
    ended_at: float | None = None

    def current_stage(self) -> StageState | None:
        """The first stage that is not done, None once all are."""
        return next((s for s in self.stages.values() if s.status != "done"), None)

    def active(self) -> bool:
        """Work is going on or will go on without a person."""
        return self.status in ("running", "pausing", "stopping") and not self.waiting_for


class GeneratorState(msgspec.Struct, kw_only=True):
    domain: str
    name: str
    model: ModelRef
    parent: str | None
    cycle: str | None
    registered_at: float
    active: bool = False
    activations: list[tuple[float, str]] = []
    """(when, reason) each time it became the domain's generator."""
    looks: int = 0
    """Candidates measured against it so far: the alpha ledger."""


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    at: float
    cycle: str | None
    stage: str | None
    level: str
    text: str


class State(msgspec.Struct, kw_only=True):
    seq: int = 0
    """Sequence number of the last journal entry applied."""
    cycles: dict[str, CycleState] = {}
    """By id, oldest first."""
    generators: dict[str, list[GeneratorState]] = {}
    """By domain, oldest first; the first is the base."""
    notices: list[Notice] = []
    """The newest 500, oldest first."""
    engine_started_at: float | None = None

    def latest_cycle(self, domain: str | None = None) -> CycleState | None:
        """The newest unfinished cycle, else the newest one."""
        mine = [c for c in self.cycles.values() if domain is None or c.domain == domain]
        unfinished = [c for c in mine if c.status not in ("finished", "stopped")]
        return next(reversed(unfinished or mine), None)

    def active_generator(self, domain: str) -> GeneratorState | None:
        return next((g for g in self.generators.get(domain, []) if g.active), None)
