"""Facts: what a worker reports, one JSON object a line in its run folder's events.jsonl."""

from __future__ import annotations

from typing import Any

import msgspec

from jupiter_engine.files import ProcessIdentity


class Fact(msgspec.Struct, frozen=True, kw_only=True, tag_field="fact"):
    """Base of all worker facts. `seq` counts from 1 within a run and never repeats, over restarts too."""

    seq: int
    at: float
    """Seconds since the epoch on the worker's machine."""


class Started(Fact, frozen=True, kw_only=True, tag="started"):
    attempt: int
    pid: int
    host: str
    versions: dict[str, str]


class Progress(Fact, frozen=True, kw_only=True, tag="progress"):
    done: float
    total: float
    unit: str
    """documents, samples, steps, windows, ..."""
    rate_per_s: float | None
    eta_s: float | None
    note: str = ""


class Records(Fact, frozen=True, kw_only=True, tag="records"):
    """Rows that are safely on disk: `count` lines of results/<table>.jsonl from `offset_bytes`."""

    table: str
    offset_bytes: int
    length_bytes: int
    count: int


class Note(Fact, frozen=True, kw_only=True, tag="note"):
    level: str
    """info | warning | error"""
    text: str


class Finished(Fact, frozen=True, kw_only=True, tag="finished"):
    result: dict[str, Any]


class Failed(Fact, frozen=True, kw_only=True, tag="failed"):
    kind: str
    """Name of the error class (jupiter_engine.errors)."""
    title: str
    detail: str
    fix: str


class Halted(Fact, frozen=True, kw_only=True, tag="halted"):
    """The worker stopped at a safe point because it was asked to; starting it again continues."""


AnyFact = Started | Progress | Records | Note | Finished | Failed | Halted

decoder = msgspec.json.Decoder(AnyFact)


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """state.json of a run folder: who works there."""

    worker: ProcessIdentity
    attempt: int
    """Counts the workers that were started in the folder, from 1."""


class Metric(msgspec.Struct, frozen=True, kw_only=True):
    """One optimizer step, a line of metrics.jsonl in the run folder."""

    step: int
    """Counts from 1."""
    tokens: int
    """Trained tokens so far (targets whose loss counts)."""
    loss: float
    """Mean cross-entropy in nats per counted target token of this step's batch, before the update."""
    learning_rate: float
    grad_norm: float
    """Global L2 norm before clipping."""
    tokens_per_s: float
    """Input tokens of the step over its wall time."""
    seconds: float
    at: float
    rank_seconds: tuple[float, ...] = ()
    """Compute time of each rank in this step: forward and backward passes of its own rows."""
    data_seconds: tuple[float, ...] = ()
    """Of each rank: waiting for its rows to be read."""
    communication_seconds: tuple[float, ...] = ()
    """Of each rank: summing gradients and sharing updates, once all ranks have arrived."""
    idle_seconds: tuple[float, ...] = ()
    """Of each rank: waiting for slower ranks."""
    rank_rows: tuple[int, ...] = ()
    """Sequences of the batch that each rank computed."""
    peak_bytes: tuple[int, ...] = ()
    """Most memory that each rank's process (on a GPU: its device) has held so far."""
    mfu: float | None = None
    """Model FLOP utilisation: 6 N + attention FLOP a token (LoRA: 4 N, frozen weights need no gradient) times
    `tokens_per_s`, over the sum of the devices' peaks; None where one is not known."""
    held_out_loss: float | None = None
    """Mean cross-entropy in nats on held-out rows after this step, where it was measured."""
