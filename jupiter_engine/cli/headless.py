"""The engine in the foreground: cycles to the end, one line or one JSON object an event, a documented exit code."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import msgspec

from jupiter_engine.api import Recorded, Workspace, progress_text, sentence
from jupiter_engine.errors import ExitCode, JupiterError, exit_code_of, rebuild
from jupiter_engine.orchestrator.engine import Engine, EngineLock, fleet_stages
from jupiter_engine.protocol import journal as j
from jupiter_engine.protocol.commands import StartCycles
from jupiter_engine.protocol.facts import Progress
from jupiter_engine.protocol.state import CycleState

PROGRESS_EVERY_S = 5.0


class Narrator:
    """Prints what the journal gains: sentences for people, or objects for programs."""

    def __init__(self, workspace: Workspace, *, json: bool) -> None:
        self._workspace = workspace
        self._json = json
        self._progress_at = 0.0
        self._shown: tuple[str, Progress] | None = None
        self.cycles: list[str] = []

    def show(self) -> None:
        for recorded in self._workspace.refresh():
            self._entry(recorded)
        self._progress()

    def _entry(self, recorded: Recorded) -> None:
        if isinstance(recorded.entry, j.CycleCreated):
            self.cycles.append(recorded.entry.cycle)
        if isinstance(recorded.entry, j.CycleStatus) and recorded.entry.cycle not in self.cycles:
            self.cycles.append(recorded.entry.cycle)
        if self._json:
            self._print(msgspec.json.encode(recorded).decode())
            return
        text = sentence(recorded.entry)
        if text is not None:
            self._print(f"{time.strftime('%H:%M:%S', time.localtime(recorded.at))}  {text}")

    @staticmethod
    def _print(text: str) -> None:
        """One line; a reader that has gone (head, a closed pager) does not end the work."""
        try:
            print(text, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def _progress(self) -> None:
        if time.monotonic() - self._progress_at < PROGRESS_EVERY_S:
            return
        cycle = self._workspace.state.latest_cycle()
        stage = cycle.current_stage() if cycle is not None else None
        if stage is None or not stage.run or stage.status != "running":
            return
        progress = self._workspace.progress(stage.run)
        if progress is None or (stage.run, progress) == self._shown:
            return
        self._progress_at = time.monotonic()
        # All of it: what is told of a transfer to a machine is no fact of the worker's and has no number.
        self._shown = (stage.run, progress)
        if self._json:
            event = {"at": progress.at, "stage": stage.stage, "run": stage.run, "progress": progress}
            self._print(msgspec.json.encode(event).decode())
        else:
            self._print(f"{time.strftime('%H:%M:%S')}    {progress_text(stage.stage, progress)}")


def run_auto(root: Path, domain: str, cycles: int, json: bool) -> int:  # noqa: FBT001 - called by keyword
    """Run `cycles` cycles of `domain` with the filters and the gate deciding; returns the exit status.

    The engine runs in this process; if one already serves the workspace, its work is followed
    instead. SIGINT and SIGTERM bring the running stage to a safe point first (exit 130);
    the same command then continues where it stopped.
    """
    with Workspace(root) as workspace:
        return _run(workspace, domain, cycles, json=json)


def _run(workspace: Workspace, domain: str, cycles: int, *, json: bool) -> int:
    narrator = Narrator(workspace, json=json)
    command = StartCycles(domain=domain, cycles=cycles, mode="auto", by="auto")
    if workspace.engine() is not None:
        return _follow(workspace, narrator, command)
    return asyncio.run(_serve(workspace, narrator, command))


async def _serve(workspace: Workspace, narrator: Narrator, command: StartCycles) -> int:
    lock = EngineLock(workspace.root)
    engine = Engine(workspace.root, stages=lambda: fleet_stages(workspace.root))
    interrupted = False

    def interrupt() -> None:
        nonlocal interrupted
        if not interrupted:
            print("halting at the next safe point; the same command continues later", file=sys.stderr, flush=True)
        interrupted = True
        engine.ask_shut_down()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    try:
        submitted = engine.database.submit(command)
        await engine.step()
        refusal = engine.database.command_answer(submitted)[1]
        if refusal is not None:
            raise rebuild(refusal.kind, refusal.title, refusal.detail, refusal.fix)
        serving = asyncio.create_task(engine.serve(idle_exit_s=0.0))
        while not serving.done():
            narrator.show()
            await asyncio.wait([serving], timeout=0.2)
        await serving
        narrator.show()
    finally:
        await engine.dispatch.close()
        engine.database.close()
        lock.release()
    return ExitCode.INTERRUPTED if interrupted else _exit_code(workspace, narrator)


def _follow(workspace: Workspace, narrator: Narrator, command: StartCycles) -> int:
    workspace.perform(command)
    created = workspace.state.latest_cycle(command.domain)
    assert created is not None
    narrator.cycles.append(created.id)
    try:
        while True:
            narrator.show()
            if not any(c.active() for c in workspace.state.cycles.values()):
                break
            workspace.ensure_engine()
            time.sleep(0.2)
    except KeyboardInterrupt:
        print("detached; the engine goes on (see `jupiter status`)", file=sys.stderr)
        return ExitCode.INTERRUPTED
    return _exit_code(workspace, narrator)


def _exit_code(workspace: Workspace, narrator: Narrator) -> int:
    """The most telling outcome of the cycles that this command saw."""
    cycles: list[CycleState] = [workspace.state.cycles[name] for name in narrator.cycles]
    if not cycles:
        raise JupiterError("no cycle was run", fix="see `jupiter status`")
    for cycle in cycles:
        if cycle.status == "failed":
            failure = next(s.failure for s in cycle.stages.values() if s.failure is not None)
            return exit_code_of(failure.kind)
        if cycle.status != "finished":
            return ExitCode.INTERRUPTED
    last = cycles[-1]
    if last.decision is not None and last.decision.verdict == "not_enough_data":
        return ExitCode.NOT_ENOUGH_DATA
    return ExitCode.DONE
