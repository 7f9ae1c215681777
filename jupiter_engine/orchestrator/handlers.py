"""Commands to journal entries: checks first, then what becomes history."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from jupiter_engine.cluster.placement import require_duties
from jupiter_engine.errors import UsageError
from jupiter_engine.orchestrator.database import Database
from jupiter_engine.orchestrator.plan import candidate_of, run_name
from jupiter_engine.orchestrator.planner import require_workable
from jupiter_engine.protocol import commands as c
from jupiter_engine.protocol import journal as j
from jupiter_engine.protocol.state import CycleState, State
from jupiter_engine.settings.cluster import load_cluster
from jupiter_engine.settings.domain import check_paths, load_domain
from jupiter_engine.settings.workspace import domain_file


def _busy(state: State) -> CycleState | None:
    """The cycle that holds the workspace: at work, or waiting for a person. At most one does."""
    return next((x for x in state.cycles.values() if x.status in ("running", "pausing", "stopping")), None)


class CommandHandlers:
    """Each handler returns the entries to append; a refusal is a JupiterError and appends nothing."""

    def __init__(self, root: Path, database: Database) -> None:
        self._root = root
        self._database = database

    def carry_out(self, command: c.AnyCommand, state: State) -> list[j.AnyEntry]:
        match command:
            case c.StartCycles():
                return self._start(command, state)
            case c.Pause():
                return self._pause(command, state)
            case c.Resume():
                return self._resume(command.cycle, command.by, state)
            case c.Stop():
                return self._stop(command, state)
            case c.Review():
                return self._review(command, state)
            case c.FinishReview():
                return self._finish_review(command, state)
            case c.Decide():
                return self._decide(command, state)
            case c.Rollback():
                return self._rollback(command, state)
            case c.ShutDown():
                return []

    # -- cycles ----------------------------------------------------------------------------------
    def _start(self, command: c.StartCycles, state: State) -> list[j.AnyEntry]:
        if command.cycles < 1:
            raise UsageError(f"cycles must be 1 or more, not {command.cycles}")
        busy = _busy(state)
        if busy is not None and busy.status == "running" and busy.domain == command.domain and command.mode == "auto":
            return [self._continued(busy, command)]
        if busy is not None and busy.domain != command.domain:
            raise UsageError(
                f"cycle {busy.id} is running on this workspace",
                fix="`jupiter stop` it first, or wait for it to end",
            )
        if busy is not None:
            raise UsageError(f"cycle {busy.id} is already running", fix="`jupiter status` shows it")
        cluster = load_cluster(self._root / "config" / "cluster.yaml").value
        require_duties(cluster)
        unfinished = [
            x for x in state.cycles.values() if x.domain == command.domain and x.status in ("paused", "failed")
        ]
        if unfinished:
            return [self._continued(unfinished[-1], command)]
        settings = load_domain(domain_file(self._root, command.domain)).value
        require_workable(self._root, state, command.domain, settings, cluster)
        return [self.new_cycle(state, command.domain, mode=command.mode, remaining=command.cycles - 1, by=command.by)]

    def _continued(self, cycle: CycleState, command: c.StartCycles) -> j.CycleStatus:
        """An unfinished cycle counts as the first of those asked for."""
        return j.CycleStatus(
            cycle=cycle.id,
            status="running",
            by=command.by,
            mode=command.mode,
            remaining=command.cycles - 1,
            settings=self._corrected(cycle),
        )

    def _corrected(self, cycle: CycleState) -> dict[str, Any] | None:
        """Today's settings for a failed cycle that has not sealed its training data: the mend of most failures."""
        if cycle.status != "failed" or cycle.stages["queue"].status == "done":
            return None
        return self._settings(cycle.domain)

    def _settings(self, domain: str) -> dict[str, Any]:
        loaded = load_domain(domain_file(self._root, domain))
        check_paths(loaded)
        settings: dict[str, Any] = msgspec.to_builtins(loaded.value)
        return settings

    def new_cycle(self, state: State, domain: str, *, mode: c.Mode, remaining: int, by: str) -> j.CycleCreated:
        """The next cycle of the domain with today's settings, which it keeps to its end."""
        settings = self._settings(domain)
        number = 1 + max((x.number for x in state.cycles.values() if x.domain == domain), default=0)
        return j.CycleCreated(
            cycle=f"{domain}-{number:04d}",
            domain=domain,
            number=number,
            mode=mode,
            remaining=remaining,
            settings=settings,
            by=by,
        )

    @staticmethod
    def _cycle(cycle_id: str, state: State) -> CycleState:
        try:
            return state.cycles[cycle_id]
        except KeyError:
            known = ", ".join(list(state.cycles)[-5:]) or "none yet"
            raise UsageError(f"there is no cycle {cycle_id!r}", fix=f"known cycles: {known}") from None

    def _pause(self, command: c.Pause, state: State) -> list[j.AnyEntry]:
        cycle = self._cycle(command.cycle, state)
        if cycle.status != "running":
            raise UsageError(f"cycle {cycle.id} is {cycle.status}, not running")
        # One that waits for a person has no worker to bring to rest.
        return [j.CycleStatus(cycle=cycle.id, status="paused" if cycle.waiting_for else "pausing", by=command.by)]

    def _resume(self, cycle_id: str, by: str, state: State) -> list[j.AnyEntry]:
        cycle = self._cycle(cycle_id, state)
        if cycle.status not in ("paused", "stopped", "failed"):
            raise UsageError(f"cycle {cycle.id} is {cycle.status}: there is nothing to resume")
        busy = _busy(state)
        if busy is not None:
            waits = f" and waits for a {busy.waiting_for}" if busy.waiting_for else ""
            raise UsageError(f"cycle {busy.id} is {busy.status}{waits} on this workspace", fix="stop or pause it first")
        return [j.CycleStatus(cycle=cycle.id, status="running", by=by, settings=self._corrected(cycle))]

    def _stop(self, command: c.Stop, state: State) -> list[j.AnyEntry]:
        cycle = self._cycle(command.cycle, state)
        if cycle.status in ("finished", "stopped", "stopping"):
            raise UsageError(f"cycle {cycle.id} is already {cycle.status}")
        status = "stopping" if cycle.status in ("running", "pausing") and not cycle.waiting_for else "stopped"
        return [j.CycleStatus(cycle=cycle.id, status=status, by=command.by)]  # type: ignore[arg-type]

    # -- review ----------------------------------------------------------------------------------
    def _review(self, command: c.Review, state: State) -> list[j.AnyEntry]:
        view = self._database.sample(command.sample)
        if view is None:
            raise UsageError(f"no single sample has the id {command.sample!r}", fix="`jupiter samples` lists ids")
        cycle = self._cycle(f"{view.domain}-{view.sample.cycle:04d}", state)
        self._database.set_review(view.sample.id, view.domain, command.verdict, command.reason, command.by)
        return [
            j.SampleReviewed(
                cycle=cycle.id,
                sample=view.sample.id,
                verdict=command.verdict,
                reason=command.reason,
                by=command.by,
            )
        ]

    def review_result(self, cycle: CycleState, *, by: str) -> dict[str, Any]:
        """What the review stage leaves behind: counts by final status, and by person."""
        count = self._database.count_samples
        return {
            "accepted": count(domain=cycle.domain, cycle=cycle.number, status="accepted"),
            "rejected": count(domain=cycle.domain, cycle=cycle.number, status="rejected"),
            "reviewed": count(domain=cycle.domain, cycle=cycle.number, status="reviewed"),
            "by": by,
        }

    def _finish_review(self, command: c.FinishReview, state: State) -> list[j.AnyEntry]:
        cycle = self._cycle(command.cycle, state)
        if cycle.waiting_for != "review":
            raise UsageError(f"cycle {cycle.id} does not wait for a review")
        result = self.review_result(cycle, by=command.by)
        run = run_name(cycle.id, "review")
        return [j.StageFinished(cycle=cycle.id, stage="review", run=run, result=result)]

    # -- decisions -------------------------------------------------------------------------------
    def _decide(self, command: c.Decide, state: State) -> list[j.AnyEntry]:
        cycle = self._cycle(command.cycle, state)
        if cycle.waiting_for != "decision" or cycle.decision is None:
            raise UsageError(f"cycle {cycle.id} does not wait for a decision")
        if command.answer == "promote" and cycle.decision.verdict != "promote" and not command.override:
            raise UsageError(
                f"the gate says {cycle.decision.verdict}, not promote",
                fix="look at the evidence; promoting all the same needs an explicit override",
            )
        if candidate_of(cycle) is None:
            raise UsageError(f"cycle {cycle.id} has no trained model")
        return [j.DecisionAnswered(cycle=cycle.id, answer=command.answer, by=command.by, override=command.override)]

    def _rollback(self, command: c.Rollback, state: State) -> list[j.AnyEntry]:
        generators = state.generators.get(command.domain, [])
        active = state.active_generator(command.domain)
        if active is None:
            raise UsageError(f"domain {command.domain!r} has no generator yet", fix="run a cycle first")
        unfinished = (x for x in state.cycles.values() if x.status not in ("finished", "stopped"))
        busy = next((x for x in unfinished if x.domain == command.domain), None)
        if busy is not None:
            raise UsageError(
                f"cycle {busy.id} is {busy.status} and measured against the generator", fix="stop it first"
            )
        name = command.to or active.parent
        if name is None:
            raise UsageError(f"{active.name} is the base: there is nothing before it")
        if name == active.name:
            raise UsageError(f"{name} is already the generator")
        if all(g.name != name for g in generators):
            known = ", ".join(g.name for g in generators)
            raise UsageError(f"there is no generator {name!r} in domain {command.domain}", fix=f"known: {known}")
        return [j.GeneratorActivated(domain=command.domain, name=name, reason="rollback", by=command.by)]
