"""start, status, stop, pause, resume, decide."""

from __future__ import annotations

import argparse
import os
import sys
import time

from jupiter_engine.api import Workspace, progress_text
from jupiter_engine.cli.output import open_workspace, print_json
from jupiter_engine.errors import ExitCode, UsageError
from jupiter_engine.protocol.commands import Decide, Pause, Resume, StartCycles, Stop
from jupiter_engine.protocol.state import CycleState
from jupiter_engine.settings.domain import check_paths
from jupiter_engine.units import duration_text


def start(options: argparse.Namespace) -> int:
    workspace = open_workspace(options)
    check_paths(workspace.domain(options.domain))  # a wrong file is refused here, before anything starts
    if options.cycles < 1:
        raise UsageError(f"--cycles must be 1 or more, not {options.cycles}")
    if options.auto:
        from jupiter_engine.cli.headless import run_auto

        workspace.close()
        return run_auto(workspace.root, options.domain, options.cycles, options.json)
    command = StartCycles(domain=options.domain, cycles=options.cycles, mode="interactive")
    if not options.detach and (options.interactive or sys.stdin.isatty()):
        running = [c for c in workspace.state.cycles.values() if c.active() or c.waiting_for]
        if not any(c.domain == options.domain for c in running):
            workspace.perform(command)
        # The console is another program above this layer; it takes this process over.
        argv = [sys.executable, "-m", "jupiter_tui.main", "--workspace", str(workspace.root)]
        workspace.close()
        os.execv(sys.executable, [*argv, "--domain", options.domain])  # noqa: S606 - our own interpreter
    workspace.perform(command)
    cycle = workspace.state.latest_cycle(options.domain)
    assert cycle is not None
    if options.json:
        print_json({"cycle": cycle.id})
    else:
        print(f"cycle {cycle.id} is running in the background; `jupiter status` or `jupiter-tui` shows it")
    return ExitCode.DONE


def status(options: argparse.Namespace) -> int:
    workspace = open_workspace(options)
    state, engine = workspace.state, workspace.engine()
    cycle = state.latest_cycle()
    stage = cycle.current_stage() if cycle is not None else None
    progress = workspace.progress(stage.run) if stage is not None and stage.run else None
    if options.json:
        print_json(
            {
                "workspace": str(workspace.root),
                "engine": engine,
                "cycle": cycle,
                "progress": progress,
                "generators": state.generators,
                "notices": state.notices[-20:],
            }
        )
        return ExitCode.DONE
    print(f"workspace  {workspace.root}")
    print(f"engine     {'running, pid ' + str(engine.identity.pid) if engine else 'not running'}")
    if cycle is None:
        print("no cycle yet; `jupiter start --domain python --auto` runs one")
        return ExitCode.DONE
    waits = f", waits for your {cycle.waiting_for}" if cycle.waiting_for else ""
    stalled = " (its engine has ended: `jupiter resume` continues it)" if cycle.active() and engine is None else ""
    print(f"cycle      {cycle.id}: {cycle.status}{waits}{stalled}")
    for s in cycle.stages.values():
        mark = {"done": "ok", "running": "..", "failed": "!!", "halted": "--", "pending": "  "}[s.status]
        took = duration_text(s.ended_at - s.started_at) if s.ended_at and s.started_at else ""
        print(f"  {mark} {s.stage:<9} {took}")
        if s.failure is not None:
            print(f"     {s.failure.title}: {s.failure.detail}" + (f" -> {s.failure.fix}" if s.failure.fix else ""))
    if progress is not None and stage is not None and stage.status == "running":
        print(f"now        {progress_text(stage.stage, progress)}")
    for domain, generators in state.generators.items():
        active = next((g.name for g in generators if g.active), "-")
        print(f"generator  {domain}: {active} ({len(generators)} in its lineage)")
    return ExitCode.DONE


def _chosen(workspace: Workspace, options: argparse.Namespace, *, statuses: tuple[str, ...]) -> CycleState:
    """The cycle named by --cycle, else the newest one in one of the statuses."""
    if options.cycle:
        try:
            return workspace.state.cycles[options.cycle]
        except KeyError:
            known = ", ".join(list(workspace.state.cycles)[-5:]) or "none yet"
            raise UsageError(f"there is no cycle {options.cycle!r}", fix=f"known cycles: {known}") from None
    fitting = [c for c in workspace.state.cycles.values() if c.status in statuses]
    if not fitting:
        raise UsageError(f"no cycle is {' or '.join(statuses)}", fix="`jupiter runs` lists all cycles")
    return fitting[-1]


def _wait_for(workspace: Workspace, cycle_id: str, statuses: tuple[str, ...], timeout_s: float = 300.0) -> str:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        workspace.refresh()
        status = workspace.state.cycles[cycle_id].status
        if status in statuses:
            return status
        time.sleep(0.1)
    return workspace.state.cycles[cycle_id].status


def _say(options: argparse.Namespace, cycle: str, status: str) -> int:
    if options.json:
        print_json({"cycle": cycle, "status": status})
    else:
        print(f"cycle {cycle} is {status}")
    return ExitCode.DONE


def stop(options: argparse.Namespace) -> int:
    workspace = open_workspace(options)
    cycle = _chosen(workspace, options, statuses=("running", "pausing", "paused", "failed"))
    workspace.perform(Stop(cycle=cycle.id))
    return _say(options, cycle.id, _wait_for(workspace, cycle.id, ("stopped", "failed", "finished")))


def pause(options: argparse.Namespace) -> int:
    workspace = open_workspace(options)
    cycle = _chosen(workspace, options, statuses=("running",))
    workspace.perform(Pause(cycle=cycle.id))
    return _say(options, cycle.id, _wait_for(workspace, cycle.id, ("paused", "failed", "finished")))


def resume(options: argparse.Namespace) -> int:
    workspace = open_workspace(options)
    running = next((c for c in workspace.state.cycles.values() if c.active()), None)
    if running is not None and options.cycle in (None, running.id) and workspace.engine() is None:
        # The engine was killed: the journal still says running, so a new engine is all that is missing.
        workspace.ensure_engine()
        return _say(options, running.id, "running")
    cycle = _chosen(workspace, options, statuses=("paused", "stopped", "failed"))
    workspace.perform(Resume(cycle=cycle.id))
    return _say(options, cycle.id, "running")


def decide(options: argparse.Namespace) -> int:
    workspace = open_workspace(options)
    waiting = [c for c in workspace.state.cycles.values() if c.waiting_for == "decision"]
    if not options.cycle and not waiting:
        raise UsageError("no cycle waits for a decision", fix="`jupiter status` shows where cycles stand")
    cycle = options.cycle or waiting[-1].id
    workspace.perform(Decide(cycle=cycle, answer=options.answer, override=options.override))
    if options.json:
        print_json({"cycle": cycle, "answer": options.answer})
    else:
        print(f"cycle {cycle}: {options.answer}")
    return ExitCode.DONE
