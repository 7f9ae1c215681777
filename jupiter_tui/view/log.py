"""What stands in the log beside the workers' own output."""

from __future__ import annotations

import time

from jupiter_engine.protocol.journal import ENGINE_STAGES
from jupiter_engine.protocol.state import CycleState, Notice
from jupiter_engine.units import plain_text


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
