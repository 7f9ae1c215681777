"""What stands in the log beside the workers' own output."""

from __future__ import annotations

import re
import time
from typing import Final

from jupiter_engine.protocol.journal import ENGINE_STAGES
from jupiter_engine.protocol.state import CycleState, Notice
from jupiter_engine.units import plain_text
from jupiter_tui.view.picture import Picture
from jupiter_tui.view.text import one_line

_MOVES: Final = re.compile(r"the ranks go on|starting the ranks again")
"""What the supervisor of a group says at the end of a stall."""


def notice_text(notice: Notice) -> str:
    """A notice as a log line: time, level letter, stage, text."""
    level = {"warning": "W ", "error": "E "}.get(notice.level, "  ")
    where = f"{notice.stage}: " if notice.stage else ""
    flat = " ".join(plain_text(notice.text).split())
    return f"{time.strftime('%H:%M:%S', time.localtime(notice.at))} jupiter {level}{where}{flat}"


def logging_run(cycle: CycleState) -> tuple[str, float]:
    """(the run whose output matters now, when it began): the running stage's, else the last that a worker did."""
    stages = [s for s in cycle.stages.values() if s.run and s.stage not in ENGINE_STAGES]
    return (stages[-1].run, stages[-1].started_at or 0.0) if stages else ("", 0.0)


def log_title(picture: Picture) -> str:
    """`Log  python-0002`, or `Log  python-0002  [r2 mini-2]` for one rank of a group."""
    cycle = picture.cycle.id if picture.cycle is not None else ""
    if picture.rank is None:
        return f"Log  {cycle}" if cycle else "Log"
    host = dict(picture.ranks).get(picture.rank, "")
    return f"Log  {cycle}  [r{picture.rank} {one_line(host)}]"


def stalled(cycle: CycleState, notices: list[Notice]) -> str:
    """What the newest notice about a stall of the running training says; empty if it goes on."""
    stage = cycle.current_stage()
    if cycle.status not in ("running", "pausing", "stopping") or stage is None or stage.status != "running":
        return ""
    since = stage.started_at or 0.0
    for notice in reversed(notices):
        if notice.at < since or notice.cycle != cycle.id:
            continue
        if notice.text.startswith("STALLED"):
            return one_line(notice.text)
        if notice.stage == stage.stage and _MOVES.search(notice.text):
            return ""
    return ""
