"""What the ranks of one launch tell their supervisor: one JSON object a line, one file a rank.

ranks/group.json                 the current launch
ranks/<generation>/rank-<r>.jsonl  reports of rank r
ranks/<generation>/output.log      stdout and stderr of launcher and ranks
ranks/lock                       held by the rank 0 that may write checkpoints
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from jupiter_engine.files import ProcessIdentity, whole_lines
from jupiter_engine.protocol.facts import Metric


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """Who supervises which launch; a rank that finds itself in neither ends itself."""

    generation: int
    supervisor: ProcessIdentity
    launcher: ProcessIdentity | None = None
    """None until the launcher's process exists."""


class Report(msgspec.Struct, frozen=True, kw_only=True, tag_field="report"):
    """Base of all reports."""


class Ready(Report, frozen=True, kw_only=True, tag="ready"):
    process: ProcessIdentity


class Begun(Report, frozen=True, kw_only=True, tag="begun"):
    """Rank 0 is about to train on from `step` (0: from the beginning): at the start of a launch, and whenever the ranks
    have gone back to an earlier state after a bad step."""

    step: int


class At(Report, frozen=True, kw_only=True, tag="at"):
    """Where a rank is: at work on a step (counted from 0), or waiting in it for the others."""

    step: int
    waiting: bool


class Alive(Report, frozen=True, kw_only=True, tag="alive"):
    """Rank 0 of an island waits for the hub and is well."""


class Step(Report, frozen=True, kw_only=True, tag="step"):
    metric: Metric


class Said(Report, frozen=True, kw_only=True, tag="said"):
    level: str
    text: str


class Done(Report, frozen=True, kw_only=True, tag="done"):
    result: dict[str, Any]


class HaltedHere(Report, frozen=True, kw_only=True, tag="halted"):
    """A checkpoint was written because a halt was asked for."""


class Failed(Report, frozen=True, kw_only=True, tag="failed"):
    """An expected failure (jupiter_engine.errors): starting again would meet it again."""

    kind: str
    title: str
    detail: str
    fix: str


class Crashed(Report, frozen=True, kw_only=True, tag="crashed"):
    """Anything else, such as a lost connection: going on from the last checkpoint may help."""

    text: str


AnyReport = Ready | Begun | At | Alive | Step | Said | Done | HaltedHere | Failed | Crashed

_decoder = msgspec.json.Decoder(AnyReport)


class ReportWriter:
    """A rank's end. Lines are flushed, not synced: they matter only while the machine runs."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._file = (folder / f"rank-{rank}.jsonl").open("ab")

    def write(self, report: Report) -> None:
        self._file.write(msgspec.json.encode(report) + b"\n")
        self._file.flush()


class ReportReader:
    """The supervisor's end: complete lines that were not read before."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self._paths = [folder / f"rank-{rank}.jsonl" for rank in range(ranks)]
        self._offsets = [0] * ranks

    def read(self) -> list[tuple[int, AnyReport]]:
        found: list[tuple[int, AnyReport]] = []
        for rank, path in enumerate(self._paths):
            if not path.exists():
                continue
            for line, offset in whole_lines(path, self._offsets[rank]):
                self._offsets[rank] = offset
                found.append((rank, _decoder.decode(line)))
        return found
