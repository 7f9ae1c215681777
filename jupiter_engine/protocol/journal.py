"""The journal's entries: the append-only history from which all state follows."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from jupiter_engine.protocol.commands import Mode
from jupiter_engine.protocol.decision import Decision
from jupiter_engine.protocol.orders import ModelRef

STAGES = (
    "prepare",
    "collect",
    "generate",
    "filter",
    "review",
    "queue",
    "train",
    "evaluate",
    "gate",
    "promote",
    "report",
)
"""A cycle's stages in order; review, promote and report are done by the engine itself."""

ENGINE_STAGES = frozenset({"review", "promote", "report"})


class Entry(msgspec.Struct, frozen=True, kw_only=True, tag_field="entry"):
    """Base of all entries; sequence number and time are the journal's columns."""


class EngineStarted(Entry, frozen=True, kw_only=True, tag="engine_started"):
    pid: int
    version: str


class CycleCreated(Entry, frozen=True, kw_only=True, tag="cycle_created"):
    cycle: str
    """`<domain>-<number:04d>`"""
    domain: str
    number: int
    mode: Mode
    remaining: int
    """Further cycles to run after this one."""
    settings: dict[str, Any]
    """The domain's settings, frozen for this cycle."""
    by: str


class StageStarted(Entry, frozen=True, kw_only=True, tag="stage_started"):
    cycle: str
    stage: str
    run: str
    attempt: int


class StageFinished(Entry, frozen=True, kw_only=True, tag="stage_finished"):
    cycle: str
    stage: str
    run: str
    result: dict[str, Any]


class StageHalted(Entry, frozen=True, kw_only=True, tag="stage_halted"):
    """The stage's worker stopped at a safe point because it was asked to; starting it again continues."""

    cycle: str
    stage: str
    run: str


class StageFailed(Entry, frozen=True, kw_only=True, tag="stage_failed"):
    cycle: str
    stage: str
    run: str
    kind: str
    title: str
    detail: str
    fix: str


class CycleStatus(Entry, frozen=True, kw_only=True, tag="cycle_status"):
    cycle: str
    status: Literal["running", "pausing", "paused", "stopping", "stopped"]
    by: str
    mode: Mode | None = None
    """A new mode for the rest of the cycle; None: as before."""
    remaining: int | None = None
    """A new number of cycles to follow; None: as before."""
    settings: dict[str, Any] | None = None
    """Settings read anew (a failed cycle that has not trained yet takes corrected ones); None: as before."""


class CycleWaits(Entry, frozen=True, kw_only=True, tag="cycle_waits"):
    cycle: str
    what: Literal["review", "decision"]


class CycleFinished(Entry, frozen=True, kw_only=True, tag="cycle_finished"):
    cycle: str
    outcome: Literal["promoted", "kept"]
    report: str
    """Path of the cycle's report."""


class RowsAdded(Entry, frozen=True, kw_only=True, tag="rows_added"):
    """Rows of a table entered the workspace; `counts` breaks them down (samples: by template; verdicts: by reason)."""

    cycle: str
    stage: str
    table: str
    count: int
    counts: dict[str, int]


class SampleReviewed(Entry, frozen=True, kw_only=True, tag="sample_reviewed"):
    cycle: str
    sample: str
    verdict: Literal["accept", "reject", "undecided"]
    reason: str
    by: str


class DecisionMade(Entry, frozen=True, kw_only=True, tag="decision_made"):
    """The gate's verdict with its evidence."""

    cycle: str
    decision: Decision


class DecisionAnswered(Entry, frozen=True, kw_only=True, tag="decision_answered"):
    cycle: str
    answer: Literal["promote", "keep"]
    by: str
    override: bool


class GeneratorRegistered(Entry, frozen=True, kw_only=True, tag="generator_registered"):
    domain: str
    name: str
    model: ModelRef
    parent: str | None
    cycle: str | None
    """Cycle that trained it; None for the base."""


class GeneratorActivated(Entry, frozen=True, kw_only=True, tag="generator_activated"):
    domain: str
    name: str
    reason: Literal["base", "promotion", "rollback"]
    by: str


class Noted(Entry, frozen=True, kw_only=True, tag="noted"):
    cycle: str | None
    stage: str | None
    level: str
    """info | warning | error"""
    text: str
    happened_at: float | None = None
    """Seconds since the epoch, where it happened well before it was learnt here (a worker went on while no engine
    ran); None: at the entry's own time."""


AnyEntry = (
    EngineStarted
    | CycleCreated
    | StageStarted
    | StageFinished
    | StageHalted
    | StageFailed
    | CycleStatus
    | CycleWaits
    | CycleFinished
    | RowsAdded
    | SampleReviewed
    | DecisionMade
    | DecisionAnswered
    | GeneratorRegistered
    | GeneratorActivated
    | Noted
)
decoder = msgspec.json.Decoder(AnyEntry)
