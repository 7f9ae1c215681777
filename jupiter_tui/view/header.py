"""The lines that every page shares: where we are, what waits, what is wrong."""

from __future__ import annotations

from pathlib import PurePath
from typing import Final

from jupiter_engine.protocol.state import CycleState
from jupiter_engine.units import duration_text
from jupiter_tui.view.log import stalled
from jupiter_tui.view.picture import Picture
from jupiter_tui.view.text import Line, clock, cut_line, mark, one_line, plain

PAGES: Final = (
    ("fleet", "Fleet"),
    ("domain", "Domain"),
    ("review", "Review"),
    ("train", "Train"),
    ("promote", "Promote"),
    ("history", "History"),
)
SILENCE_S: Final = 120.0
"""A running stage without any progress for this long is worth an alert."""


def stage_share(picture: Picture) -> float | None:
    """How far the running stage is, 0..1."""
    progress = picture.progress
    if progress is None or progress.total <= 0:
        return None
    return max(0.0, min(1.0, progress.done / progress.total))


def cycle_state_words(cycle: CycleState) -> str:
    """`running`, `waits for your review`, `finished: promoted` and so on."""
    if cycle.status in ("running", "pausing") and cycle.waiting_for == "review":
        return "waits for your review"
    if cycle.status in ("running", "pausing") and cycle.waiting_for == "decision":
        return "waits for your decision"
    return f"finished: {cycle.outcome}" if cycle.status == "finished" else cycle.status


def title_line(picture: Picture, width: int, *, read_only: bool = False) -> Line:
    """Workspace, domain, cycle, stage, share, ETA on the left; engine and clock on the right."""
    left: Line = [(" jupiter", "title")]
    if width >= 100 and picture.root:
        left += [(" ▸ ", "dim"), (PurePath(picture.root).name or "/", "")]
    if picture.domain:
        left += [(" ▸ ", "dim"), (picture.domain, "bold")]
    cycle = picture.cycle
    if not picture.loaded:
        left += [("   opening the workspace…", "dim")]
    elif cycle is None:
        left += [("   no cycle yet", "dim")]
    else:
        left += [(" ▸ ", "dim"), (f"cycle {cycle.number}", "bold"), ("  ", ""), (cycle_state_words(cycle), "accent")]
        stage = cycle.current_stage()
        if stage is not None and cycle.status == "running" and not cycle.waiting_for:
            left += [("  ", ""), (stage.stage, "")]
            share = stage_share(picture)
            if share is not None and stage.status == "running":
                left += [(f" {share:.0%}", "bold")]
                if picture.progress is not None and picture.progress.eta_s is not None:
                    left += [(f"  ETA {duration_text(picture.progress.eta_s)}", "")]
    right: Line = [("read-only  ", "warn")] if read_only else []
    if picture.loaded:
        right += [mark("ok"), (" engine ", "")] if picture.engine_lives else [mark("none"), (" no engine ", "dim")]
        if width >= 100:
            right += [(" " + clock(picture.now) + " ", "dim")]
    room = width - len(plain(right))
    left = cut_line(left, room - 1)
    return [*left, (" " * max(1, room - len(plain(left))), ""), *right]


def waiting(picture: Picture) -> dict[str, str]:
    """What waits for a person, by page: text behind the tab's title."""
    cycle = picture.cycle
    result: dict[str, str] = {}
    if cycle is not None and cycle.status not in ("finished", "stopped"):
        if cycle.waiting_for == "review":
            result["review"] = str(picture.waiting_samples)
        if cycle.waiting_for == "decision":
            result["promote"] = "1"
    broken = sum(bool(d.problems) for d in picture.domains)
    if broken:
        result["domain"] = f"{broken}!"
    failing = len(_fleet_alerts(picture))
    if failing:
        result["fleet"] = f"{failing}!"
    return result


def tabs_line(picture: Picture, current: str, width: int) -> Line:
    """` 1 Fleet  2 Domain  3 Review·12  [4 Train]  5 Promote·1  6 History`."""
    waits = waiting(picture)
    line: Line = [(" ", "")]
    for key, (page, title) in enumerate(PAGES, 1):
        text = f"{key} {title}" + (f"·{waits[page]}" if page in waits else "")
        if page == current:
            line += [(f"[{text}]", "tab")]
        else:
            line += [(f" {text} ", "warn" if page in waits else "")]
    hint = "^p palette  ? help "
    used = len(plain(line))
    if width - used > len(hint):
        line += [(" " * (width - used - len(hint)), ""), (hint, "dim")]
    return cut_line(line, width)


def tab_at(picture: Picture, current: str, width: int, x: int) -> str | None:
    """The page whose tab stands at column `x`, None between and beside the tabs."""
    at = 1
    for text, _ in tabs_line(picture, current, width)[1 : len(PAGES) + 1]:
        if at <= x < at + len(text):
            number = text.strip(" [")[:1]
            return PAGES[int(number) - 1][0] if number.isdigit() else None
        at += len(text)
    return None


def alerts(picture: Picture) -> list[tuple[str, str]]:
    """(mark, sentence), most urgent first: `bad` wants repair, `warn` wants an answer or a look."""
    found: list[tuple[str, str]] = []
    cycle = picture.cycle
    if cycle is not None:
        found += _cycle_alerts(cycle, picture)
    for domain in picture.domains:
        if domain.problems:
            found.append(("bad", f"domain {domain.name}: {one_line(domain.problems[0])}"))
    return found + _fleet_alerts(picture)


def _fleet_alerts(picture: Picture) -> list[tuple[str, str]]:
    """What keeps machines from use: the cluster file, lost ones, and what else the doctor says cannot work."""
    found = [("bad", one_line(problem)) for problem in picture.cluster_problems[:1]]
    lost = [node for node in picture.fleet.nodes if node.state in ("lost", "refused")]
    for node in lost:
        fix = f" -> {one_line(node.fix)}" if node.fix else ""
        problem, name = one_line(node.problem) or f"is {node.state}", one_line(node.name)
        who = "" if problem.startswith(name) else f"{name}: "
        found.append(("bad", f"{who}{problem}{fix}  (1)"))
    known = {node.name for node in lost}
    failing = [one for one in picture.fleet.findings if one.severity == "fail"]
    failing = [one for one in failing if not (one.nodes and set(one.nodes) <= known)]
    return found + [("bad", f"{one_line(one.check)}: {one_line(one.text)}  (1)") for one in failing]


def _cycle_alerts(cycle: CycleState, picture: Picture) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    stage = cycle.current_stage()
    if cycle.status == "failed" and stage is not None and stage.failure is not None:
        failure = stage.failure
        fix = f" -> {failure.fix}" if failure.fix else ""
        found.append(("bad", one_line(f"{stage.stage}: {failure.title}: {failure.detail}{fix}") + "  (R tries again)"))
    if cycle.status not in ("running", "pausing", "stopping"):
        return found
    if cycle.waiting_for == "review":
        found.append(("warn", f"cycle {cycle.number} waits for your review: {picture.waiting_samples} samples (3)"))
    elif cycle.waiting_for == "decision":
        verdict = cycle.decision.verdict.replace("_", " ") if cycle.decision else "no verdict"
        found.append(("warn", f"cycle {cycle.number} waits for your decision; the gate says: {verdict} (5)"))
    elif standing := stalled(cycle, picture.state.notices):
        found.append(("bad", standing))
    elif not picture.engine_lives:
        found.append(("bad", f"the engine is not running, so cycle {cycle.id} stands still  (R starts it)"))
    elif stage is not None and stage.status == "running" and stage.started_at is not None:
        last = max(picture.progress.at if picture.progress else 0.0, stage.started_at)
        if picture.now - last > SILENCE_S:
            found.append(("warn", f"{stage.stage} has reported no progress for {duration_text(picture.now - last)}"))
    return found


def alert_line(picture: Picture, width: int) -> Line:
    """The most urgent alert with a count of the others, or the last notice, or nothing."""
    found = alerts(picture)
    if found:
        kind, sentence = found[0]
        more = f"  (+{len(found) - 1} more)" if len(found) > 1 else ""
        sign = mark("bad") if kind == "bad" else ("**", "warn")
        return cut_line([(" ", ""), sign, (" ", ""), (sentence, kind), (more, "dim")], width)
    if picture.state.notices:
        notice = picture.state.notices[-1]
        where = f"{notice.stage}: " if notice.stage else ""
        return cut_line([(f"    {clock(notice.at)}  {where}{one_line(notice.text)}", "dim")], width)
    return []
