"""apply(entry, state): the only place where history becomes state."""

from __future__ import annotations

from jupiter_engine.orchestrator.database import Recorded
from jupiter_engine.orchestrator.results import Collected, told
from jupiter_engine.protocol import journal as j
from jupiter_engine.protocol.state import CycleState, Failure, GeneratorState, Notice, StageState, State

NOTICES_KEPT = 500


def apply(recorded: Recorded, state: State) -> State:
    """The state after one more entry. `state` is changed in place and returned; no clock, no file is read."""
    entry, at = recorded.entry, recorded.at
    state.seq = recorded.seq
    match entry:
        case j.EngineStarted():
            state.engine_started_at = at
        case j.CycleCreated():
            state.cycles[entry.cycle] = CycleState(
                id=entry.cycle,
                domain=entry.domain,
                number=entry.number,
                mode=entry.mode,
                remaining=entry.remaining,
                settings=entry.settings,
                created_at=at,
                by=entry.by,
                stages={name: StageState(stage=name) for name in j.STAGES},
            )
        case j.GeneratorRegistered():
            known = state.generators.setdefault(entry.domain, [])
            if all(g.name != entry.name for g in known):
                known.append(
                    GeneratorState(
                        domain=entry.domain,
                        name=entry.name,
                        model=entry.model,
                        parent=entry.parent,
                        cycle=entry.cycle,
                        registered_at=at,
                    )
                )
        case j.GeneratorActivated():
            for generator in state.generators.get(entry.domain, []):
                generator.active = generator.name == entry.name
                if generator.active:
                    generator.activations = [*generator.activations, (at, entry.reason)]
        case j.Noted():
            _notice(state, _happened(entry, at), entry.cycle, entry.stage, entry.level, entry.text)
        case _:
            _apply_to_cycle(entry, at, state.cycles[entry.cycle], state)
    return state


def _happened(entry: j.Noted, at: float) -> float:
    """When it happened, as far as that can be: between the beginning of computer time and when it was learnt."""
    happened_at = entry.happened_at
    return happened_at if happened_at is not None and 0 < happened_at <= at else at


def _apply_to_cycle(entry: j.AnyEntry, at: float, cycle: CycleState, state: State) -> None:
    match entry:
        case j.StageStarted():
            stage = cycle.stages[entry.stage]
            stage.status, stage.run, stage.attempt, stage.failure = "running", entry.run, entry.attempt, None
            stage.started_at = stage.started_at or at
            stage.ended_at = None
        case j.StageFinished():
            stage = cycle.stages[entry.stage]
            stage.status, stage.run, stage.result, stage.ended_at = "done", entry.run, entry.result, at
            stage.started_at = stage.started_at or at
            if isinstance(collected := told(entry.stage, entry.result), Collected):
                # A reused collection adds no rows; its counts come from the result.
                cycle.counts.update(documents=collected.documents, chunks=collected.chunks, items=collected.items)
        case j.StageHalted():
            cycle.stages[entry.stage].status = "halted"
        case j.StageFailed():
            stage = cycle.stages[entry.stage]
            stage.status, stage.ended_at = "failed", at
            stage.failure = Failure(kind=entry.kind, title=entry.title, detail=entry.detail, fix=entry.fix)
            cycle.status = "failed"
            _notice(state, at, cycle.id, entry.stage, "error", f"{entry.title}: {entry.detail}")
        case j.CycleStatus():
            cycle.status = entry.status
            cycle.mode = entry.mode or cycle.mode
            cycle.settings = entry.settings or cycle.settings
            if entry.mode == "auto" or entry.status in ("paused", "stopped"):
                # In auto mode nobody is asked any more; a cycle at rest asks again once it is resumed.
                cycle.waiting_for = ""
            if entry.remaining is not None:
                cycle.remaining = entry.remaining
            if entry.status in ("paused", "stopped"):
                cycle.ended_at = at if entry.status == "stopped" else None
                for stage in cycle.stages.values():
                    if stage.status == "running":
                        stage.status = "halted"
            elif entry.status == "running":
                cycle.ended_at = None
                for stage in cycle.stages.values():
                    if stage.status == "failed":
                        stage.status, stage.failure, stage.attempt = "pending", None, 0
        case j.CycleWaits():
            cycle.waiting_for = entry.what
        case j.CycleFinished():
            cycle.status, cycle.outcome, cycle.report, cycle.ended_at = "finished", entry.outcome, entry.report, at
            cycle.waiting_for = ""
        case j.RowsAdded():
            _count(entry, cycle)
        case j.SampleReviewed():
            # The database holds the verdicts; the counter only says that something changed.
            cycle.counts["reviewed"] = cycle.counts.get("reviewed", 0) + 1
        case j.DecisionMade():
            cycle.decision = entry.decision
            for generator in state.generators.get(cycle.domain, []):
                if generator.name == entry.decision.incumbent:
                    generator.looks = max(generator.looks, entry.decision.look)
        case j.DecisionAnswered():
            cycle.answer, cycle.answered_by, cycle.waiting_for = entry.answer, entry.by, ""
    if isinstance(entry, j.StageFinished) and cycle.waiting_for == "review" and entry.stage == "review":
        cycle.waiting_for = ""


def _count(entry: j.RowsAdded, cycle: CycleState) -> None:
    if entry.table == "verdicts":
        accepted = entry.counts.get("ok", 0)
        cycle.counts["accepted"] = cycle.counts.get("accepted", 0) + accepted
        cycle.counts["rejected"] = cycle.counts.get("rejected", 0) + entry.count - accepted
        for reason, count in entry.counts.items():
            if reason != "ok":
                cycle.rejected[reason] = cycle.rejected.get(reason, 0) + count
        return
    cycle.counts[entry.table] = cycle.counts.get(entry.table, 0) + entry.count
    if entry.table == "samples":
        for template, count in entry.counts.items():
            cycle.templates[template] = cycle.templates.get(template, 0) + count


def _notice(state: State, at: float, cycle: str | None, stage: str | None, level: str, text: str) -> None:
    state.notices.append(Notice(at=at, cycle=cycle, stage=stage, level=level, text=text))
    del state.notices[:-NOTICES_KEPT]
