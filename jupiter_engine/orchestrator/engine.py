"""The engine: carries out commands and moves the running cycle from stage to stage over the journal.

Everything it knows is in the journal; killed at any instant, the next engine continues:
a worker that still lives is re-attached to, one that died is started again in its folder.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Literal

import msgspec

from jupiter_engine import __version__
from jupiter_engine.cluster.placement import require_duties
from jupiter_engine.errors import JupiterError, RemoteError, StateError, UsageError
from jupiter_engine.files import ProcessIdentity, disk_full, write_atomic, write_json
from jupiter_engine.orchestrator.database import Database
from jupiter_engine.orchestrator.dispatch import Dispatcher, Stages
from jupiter_engine.orchestrator.handlers import CommandHandlers
from jupiter_engine.orchestrator.plan import OrderWriter, Places, base_name, candidate_of, run_name
from jupiter_engine.orchestrator.process import EngineInfo
from jupiter_engine.orchestrator.report import cycle_report
from jupiter_engine.orchestrator.state import apply
from jupiter_engine.orchestrator.supervision import StageRun
from jupiter_engine.protocol import commands as c
from jupiter_engine.protocol import journal as j
from jupiter_engine.protocol.decision import Decision
from jupiter_engine.protocol.facts import Progress
from jupiter_engine.protocol.orders import ModelRef
from jupiter_engine.protocol.state import CycleState, Failure, StageState, State
from jupiter_engine.remote.local import LocalRemote
from jupiter_engine.remote.port import Remote
from jupiter_engine.settings.cluster import load_cluster
from jupiter_engine.settings.domain import DomainSettings
from jupiter_engine.units import plain_text

TICK_S = 0.1
IDLE_EXIT_S = 60.0
"""An engine with nothing to do ends itself; the next command starts another."""


HALT_PATIENCE_S = 600.0
"""A worker that has not come to a safe point by then hangs: it is ended, and continues from its last one."""
HALT_SILENCE_S = 10.0
"""A machine that is silent for so long is not waited for when its stage is to be halted."""
LINGER_S = 30.0
"""A worker that still runs this long after its result is ended."""


class EngineLock:
    """Held for the engine's whole life: at most one engine a workspace."""

    def __init__(self, root: Path) -> None:
        home = root / ".jupiter"
        home.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = (home / "engine.lock").open("a")
        # A viewer that asks whether the lock is held takes it for an instant; hence a few tries.
        for _ in range(50):
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
        else:
            raise UsageError(f"another engine runs on {root}", title="Already running")
        info = EngineInfo(identity=ProcessIdentity.of(os.getpid()), version=__version__)
        write_json(home / "engine.json", info)

    def release(self) -> None:
        self._file.close()


class Engine:
    """The state machine. `step` does one round; `serve` repeats it until there is nothing left to do."""

    def __init__(self, root: Path, remote: Remote | None = None, stages: Callable[[], Stages] | None = None) -> None:
        """`remote` stands for this machine, `stages` makes the adapters for others (None: this machine only)."""
        self.root = root
        self.places = Places(root)
        self.database = Database(self.places.home / "jupiter.db")
        self.remote: Remote = remote or LocalRemote()
        self.dispatch = Dispatcher(root, self.remote, stages)
        self.state = State()
        self._stage: StageRun | None = None
        self._halt_since = 0.0
        self._shut_down = False
        self._progress: Progress | None = None
        self._failed_run = ""
        """A run whose machines are still to be let go of."""
        self._refresh()
        self._handlers = CommandHandlers(self.root, self.database)
        self._append(j.EngineStarted(pid=os.getpid(), version=__version__))

    # -- journal ---------------------------------------------------------------------------------
    def _refresh(self) -> None:
        for recorded in self.database.entries(after=self.state.seq):
            apply(recorded, self.state)

    def _append(self, *entries: j.AnyEntry) -> None:
        with self.database.transaction():
            for entry in entries:
                self.database.append(entry)
        self._refresh()

    # -- the loop --------------------------------------------------------------------------------
    def ask_shut_down(self) -> None:
        self._shut_down = True

    async def serve(self, *, idle_exit_s: float = IDLE_EXIT_S) -> None:
        """Work until shut down, or until nothing has been to do for `idle_exit_s`."""
        idle_since = time.monotonic()
        while True:
            busy = await self.step()
            if self._shut_down and self._stage is None:
                return
            if busy or self._active() is not None:
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since > idle_exit_s:
                return
            if not busy:
                await asyncio.sleep(TICK_S)

    def _active(self) -> CycleState | None:
        return next((cycle for cycle in self.state.cycles.values() if cycle.active()), None)

    async def step(self) -> bool:
        """One round: commands first, then the active cycle. True if anything was done."""
        did = self._carry_out_commands()
        if self._failed_run:
            # Resumed, the stage is placed anew by what the cluster file says then.
            await self.dispatch.forget(self._failed_run)
            self._failed_run = ""
        self._take_notes()
        self.dispatch.tidy()
        cycle = self._active()
        if cycle is None:
            if self._stage is not None and self._stage.outcome is not None:
                await self._settle(self._stage)
            return did
        try:
            return await self._advance(cycle) or did
        except JupiterError as error:
            self._fail(cycle, error)
            return True
        except OSError as error:
            full = disk_full(error, self.root)
            title = "The workspace cannot be written"
            self._fail(cycle, full if isinstance(full, JupiterError) else StateError(str(error), title=title))
            return True

    def _fail(self, cycle: CycleState, error: JupiterError) -> None:
        stage = cycle.current_stage()
        name = stage.stage if stage is not None else "report"
        self._stage = None
        self._halt_since = 0.0
        self._failed_run = run_name(cycle.id, name)
        self._append(
            j.StageFailed(
                cycle=cycle.id,
                stage=name,
                run=run_name(cycle.id, name),
                kind=error.kind,
                title=error.title,
                detail=error.detail,
                fix=error.fix,
            )
        )

    def _take_notes(self) -> None:
        """What there is to say about machines enters the journal; how far making them ready is, the progress."""
        notes = self.dispatch.take_notes()
        runs = {
            run_name(cycle.id, stage): (cycle.id, stage) for cycle in self.state.cycles.values() for stage in j.STAGES
        }
        entries = []
        for note in notes:
            cycle_id, stage = runs.get(note.run, (None, None))
            entries.append(j.Noted(cycle=cycle_id, stage=stage, level=note.level, text=plain_text(note.text)))
        if entries:
            self._append(*entries)
        if self._stage is not None:
            progress = self.dispatch.progress(self._stage.run)
            if progress is not None and progress != self._progress:
                self._progress = progress
                with self.database.transaction():
                    self.database.set_progress(self._stage.run, progress)

    def _carry_out_commands(self) -> bool:
        did = False
        for number, command in self.database.open_commands():
            did = True
            refusal: Failure | None = None
            try:
                with self.database.transaction():
                    if isinstance(command, c.ShutDown):
                        self._shut_down = True
                    else:
                        for entry in self._handlers.carry_out(command, self.state):
                            self.database.append(entry)
                    self.database.answer_command(number, None)
            except JupiterError as error:
                refusal = Failure(kind=error.kind, title=error.title, detail=error.detail, fix=error.fix)
            if refusal is not None:
                with self.database.transaction():
                    self.database.answer_command(number, refusal)
            self._refresh()
        return did

    # -- the cycle -------------------------------------------------------------------------------
    async def _advance(self, cycle: CycleState) -> bool:
        if self._stage is not None and self._stage.outcome is not None:
            return await self._settle(self._stage)
        if self._shut_down or cycle.status in ("pausing", "stopping"):
            return await self._halt(cycle)
        stage = cycle.current_stage()
        if stage is None:
            raise StateError(f"cycle {cycle.id} has no stage left but is not finished")
        settings = settings_of(cycle)
        if self._reconcile(cycle, settings):
            return True
        if stage.stage in j.ENGINE_STAGES:
            await self._engine_stage(cycle, stage, settings)
            return True
        return await self._worker_stage(cycle, stage, settings)

    async def _settle(self, run: StageRun) -> bool:
        """Wait for the process of a stage that has given its result: the next one needs its memory."""
        try:
            if await run.working():
                if time.monotonic() - run.outcome_at <= LINGER_S:
                    return False
                if self.dispatch.silent_s(run.run) == 0.0:
                    await run.kill()
                    return False
                await self.dispatch.let_go(run.folder, "the result is here; its machine does not answer any more")
        except RemoteError as error:
            # The result is home; whatever is left over there is ended when the machine answers again.
            await self.dispatch.let_go(run.folder, f"the result is here, but its worker was not ended: {error.detail}")
        self._stage = None
        await self.dispatch.forget(run.run)
        return True

    async def _halt(self, cycle: CycleState) -> bool:
        """Bring the running worker to a safe point, then say so in the journal."""
        if self._stage is None:
            self._stage = await self._attach(cycle)
        if self._stage is not None:
            self._halt_since = self._halt_since or time.monotonic()
            await self._stage.ask_halt()
            took = await self._stage.take_in()
            if await self._stage.working():
                if self.dispatch.silent_s(self._stage.run) > HALT_SILENCE_S:
                    text = "its machine does not answer: what runs there is ended when it does"
                    await self.dispatch.let_go(self._stage.folder, text)
                else:
                    if time.monotonic() - self._halt_since > HALT_PATIENCE_S:
                        await self._stage.kill()
                    self._refresh()
                    return took
            await self._stage.take_in()
            self._stage = None
            self._refresh()
        self._halt_since = 0.0
        current = self.state.cycles[cycle.id]
        if current.status == "pausing":
            self._append(j.CycleStatus(cycle=cycle.id, status="paused", by="engine"))
        elif current.status == "stopping":
            self._append(j.CycleStatus(cycle=cycle.id, status="stopped", by="engine"))
        return True

    async def _attach(self, cycle: CycleState) -> StageRun | None:
        """The living worker of the cycle's current stage, if an earlier engine left one."""
        stage = cycle.current_stage()
        if stage is None or stage.status != "running" or stage.stage in j.ENGINE_STAGES:
            return None
        run = self._stage_run(cycle, stage)
        return run if await run.working() else None

    def _stage_run(self, cycle: CycleState, stage: StageState) -> StageRun:
        return StageRun(
            self.database,
            self.dispatch.remote_of(stage.stage, self.places.run(run_name(cycle.id, stage.stage))),
            self.places.run(run_name(cycle.id, stage.stage)),
            cycle=cycle.id,
            domain=cycle.domain,
            number=cycle.number,
            stage=stage.stage,
        )

    async def _worker_stage(self, cycle: CycleState, stage: StageState, settings: DomainSettings) -> bool:
        if self._stage is None:
            await self._begin(cycle, stage, settings)
            return True
        run = self._stage
        working = await run.working()
        took = await run.take_in()
        self._refresh()
        if run.outcome is not None or working or took:
            if run.outcome is None and await self.dispatch.replace(stage.stage, run.folder):
                self._stage = None
                return True
            return took
        # The worker is gone and has said nothing final.
        self._stage = None
        restarts = load_cluster(self.root / "config" / "cluster.yaml").value.retries.worker_restarts
        if run.halted or stage.attempt <= restarts:
            if not run.halted:
                text = f"the {stage.stage} worker ended without a word (attempt {stage.attempt}); starting it again"
                self._append(j.Noted(cycle=cycle.id, stage=stage.stage, level="warning", text=text))
            return True
        tail = await run.log_tail(400)
        with self.database.transaction():
            run.append_failure(
                "RemoteError",
                f"The {stage.stage} worker died",
                f"it ended {stage.attempt} times without a result" + (f"; its last words: {tail}" if tail else ""),
                f"see {run.folder}/worker.log, then resume the cycle",
            )
        self._refresh()
        return True

    async def _begin(self, cycle: CycleState, stage: StageState, settings: DomainSettings) -> None:
        """Start the stage's worker, or take up what an earlier engine left: a result, or a worker still at work."""
        run = self._stage_run(cycle, stage)
        if stage.status in ("running", "halted"):
            await run.take_in()
            self._refresh()
            if run.outcome is not None:
                return
            if await run.working():
                self._stage = run
                text = f"re-attached to the {stage.stage} worker that was still at work"
                self._append(j.Noted(cycle=cycle.id, stage=stage.stage, level="info", text=text))
                return
        cluster = load_cluster(self.root / "config" / "cluster.yaml").value
        require_duties(cluster)
        run.folder.mkdir(parents=True, exist_ok=True)
        launch = self.dispatch.launch()
        order = OrderWriter(self.state, cycle, settings, launch, self.places).write(stage.stage)
        if stage.stage == "queue":
            self._write_accepted(cycle, run.folder / "accepted.jsonl")
        # A stage that was halted continues; it is not a further attempt.
        attempt = stage.attempt if stage.status == "halted" else stage.attempt + 1
        await run.begin(order, attempt=max(attempt, 1))
        self._stage = run
        self._refresh()

    def _reconcile(self, cycle: CycleState, settings: DomainSettings) -> bool:
        """Entries that follow from finished stages; a kill between the two must not lose them."""
        prepared = cycle.stages["prepare"].result
        if prepared and not self.state.generators.get(cycle.domain):
            model = ModelRef(**prepared["model"])
            name = base_name(settings)
            self._append(
                j.GeneratorRegistered(domain=cycle.domain, name=name, model=model, parent=None, cycle=None),
                j.GeneratorActivated(domain=cycle.domain, name=name, reason="base", by="engine"),
            )
            return True
        measured = cycle.stages["gate"].result
        if measured and cycle.decision is None:
            decision = msgspec.convert(measured["decision"], Decision)
            self._append(j.DecisionMade(cycle=cycle.id, decision=decision))
            return True
        return False

    def _write_accepted(self, cycle: CycleState, path: Path) -> None:
        """The accepted samples of this and all earlier cycles, as the queue stage reads them."""
        lines: list[bytes] = []
        for number in range(1, cycle.number + 1):
            views = self.database.samples(domain=cycle.domain, cycle=number, status="accepted", limit=-1)
            lines += [msgspec.json.encode(view.sample) + b"\n" for view in views]
        write_atomic(path, b"".join(lines))

    # -- the engine's own stages -----------------------------------------------------------------
    async def _engine_stage(self, cycle: CycleState, stage: StageState, settings: DomainSettings) -> None:
        run = run_name(cycle.id, stage.stage)
        if stage.status in ("pending", "halted"):
            self._append(j.StageStarted(cycle=cycle.id, stage=stage.stage, run=run, attempt=1))
        match stage.stage:
            case "review":
                self._review(cycle, settings, run)
            case "promote":
                self._promote(cycle, run)
            case "report":
                self._report(cycle, run)

    def _review(self, cycle: CycleState, settings: DomainSettings, run: str) -> None:
        if cycle.mode == "interactive" and settings.review.mode in ("manual", "sample"):
            self._append(j.CycleWaits(cycle=cycle.id, what="review"))
            return
        result = self._handlers.review_result(cycle, by="filters")
        self._append(j.StageFinished(cycle=cycle.id, stage="review", run=run, result=result))

    def _promote(self, cycle: CycleState, run: str) -> None:
        decision = cycle.decision
        candidate = candidate_of(cycle)
        if decision is None or candidate is None:
            raise StateError(f"cycle {cycle.id} has no decision to act on", fix="start a new cycle")
        if not cycle.answer:
            if cycle.mode == "interactive":
                self._append(j.CycleWaits(cycle=cycle.id, what="decision"))
                return
            answer: Literal["promote", "keep"] = "promote" if decision.verdict == "promote" else "keep"
            self._append(j.DecisionAnswered(cycle=cycle.id, answer=answer, by="gate", override=False))
            cycle = self.state.cycles[cycle.id]
        active = self.state.active_generator(cycle.domain)
        if cycle.answer == "promote" and (active is None or active.name != decision.incumbent):
            raise StateError(
                f"{candidate.name} was measured against {decision.incumbent}, which is not the generator any more",
                fix="stop this cycle and start a new one",
            )
        finished = j.StageFinished(
            cycle=cycle.id, stage="promote", run=run, result={"answer": cycle.answer, "by": cycle.answered_by}
        )
        if cycle.answer == "keep":
            self._append(finished)
            return
        self._append(
            j.GeneratorRegistered(
                domain=cycle.domain,
                name=candidate.name,
                model=candidate,
                parent=decision.incumbent,
                cycle=cycle.id,
            ),
            j.GeneratorActivated(domain=cycle.domain, name=candidate.name, reason="promotion", by=cycle.answered_by),
            finished,
        )

    def _report(self, cycle: CycleState, run: str) -> None:
        path = self.places.run(run) / "report.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, cycle_report(cycle, self.state).encode())
        outcome = "promoted" if cycle.answer == "promote" else "kept"
        entries: list[j.AnyEntry] = [
            j.StageFinished(cycle=cycle.id, stage="report", run=run, result={"report": str(path)}),
            j.CycleFinished(cycle=cycle.id, outcome=outcome, report=str(path)),  # type: ignore[arg-type]
        ]
        if cycle.remaining > 0:
            mode, remaining = cycle.mode, cycle.remaining - 1
            try:
                entries.append(
                    self._handlers.new_cycle(self.state, cycle.domain, mode=mode, remaining=remaining, by=cycle.by)
                )
            except JupiterError as error:
                # This cycle is done whatever the settings of the next one look like by now.
                text = f"the next cycle was not started: {error.sentence()}"
                entries.append(j.Noted(cycle=cycle.id, stage="report", level="error", text=text))
        self._append(*entries)


def settings_of(cycle: CycleState) -> DomainSettings:
    """The settings frozen for the cycle when it was created."""
    try:
        return msgspec.convert(cycle.settings, DomainSettings)
    except msgspec.ValidationError as error:
        raise StateError(
            f"the settings stored for cycle {cycle.id} no longer fit this Jupiter: {error}", fix="start a new cycle"
        ) from error


def fleet_stages(root: Path) -> Stages:
    """The adapters for other machines; ssh is loaded only when one is used."""
    from jupiter_engine.cluster.fleet_stages import FleetStages

    return FleetStages(root)


async def run_engine(root: Path) -> None:
    """Hold the lock and serve until idle or told to end; SIGTERM and SIGINT halt the running stage first."""
    lock = EngineLock(root)
    engine = Engine(root, stages=lambda: fleet_stages(root))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, engine.ask_shut_down)
    try:
        await engine.serve()
    finally:
        await engine.dispatch.close()
        engine.database.close()
        lock.release()
