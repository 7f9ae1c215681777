"""Keeps one group of ranks training: starts it, relays what it reports, restarts it from the last checkpoint.

The ranks are on this machine (torchrun, mlx.launch) or on several (the node
runner's `group` command, see hosts). A launcher's exit status says nothing
(mlx.launch ends with 0 whatever its ranks did): the run is complete only when
rank 0 has reported so. Nothing here has to survive: after a kill of supervisor,
launcher or any rank the next supervisor ends what is left and goes on from the
newest checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import statistics
import subprocess
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec
import psutil

from jupiter_engine import errors
from jupiter_engine.errors import JupiterError, RemoteError, StageFailed
from jupiter_engine.files import ProcessIdentity, write_json
from jupiter_engine.protocol.facts import Metric
from jupiter_engine.protocol.specs import HostSpec, LaunchSpec
from jupiter_engine.training.distributed import reports
from jupiter_engine.training.distributed.copies import CheckpointCopies
from jupiter_engine.training.distributed.hosts import UNREACHED, GroupEvents, Roll, write_group_spec
from jupiter_engine.training.distributed.launchers import PROGRAM, launch_command, launch_environment
from jupiter_engine.training.distributed.stall import Progress
from jupiter_engine.units import plain_text

_POLL_S = 0.1
_TERM_S = 10.0
_GROUP_TERM_S = 60.0
"""The launcher of several machines ends the ranks there, one grace after the other, before it ends itself."""
_PAUSES_S = (1.0, 5.0, 15.0, 60.0)
"""Before a launch that follows a futile one (the first: before one that follows a death after progress)."""
_HOUR_S = 3600.0
_COPIES_KEPT = 2
_VERDICT_S = 6.0
"""For the launcher to end its launch after a rank's death, and to say whose it was."""
_MISSED_S = 2.0
"""Between two looks for a machine that does not answer."""
_TAIL_BYTES = 4000


class Listener(Protocol):
    """Where the group's reports go."""

    def begun(self, step: int) -> None: ...

    def metric(self, metric: Metric) -> None: ...

    def note(self, text: str, level: str = "info") -> None: ...

    def halt_asked(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long silence is taken for work, in seconds."""

    start: float = 600.0
    """From launch to rank 0's first step: loading, joining, broadcasting."""
    step: float = 300.0
    """Between two steps, checkpoint included; 20 median steps where that is longer."""
    restarts: int = 3
    """Launches in a row that may end without getting further than the one before."""


@dataclass(slots=True)
class _Launch:
    process: subprocess.Popen[bytes]
    reader: reports.ReportReader
    output: Path
    progress: Progress
    here: int
    """Ranks on this machine (the first ones); only their processes can be looked at from here."""
    hosts: tuple[HostSpec, ...] = ()
    events: GroupEvents | None = None
    ready: set[int] = field(default_factory=set)
    ranks: dict[int, ProcessIdentity] = field(default_factory=dict)
    """Processes of the ranks here."""
    silent: set[str] = field(default_factory=set)
    """Hosts that do not answer the launcher."""
    end: str = ""
    """Why the launcher of several machines ended, in its words."""
    begun: bool = False
    """Training goes on: everybody has loaded and joined."""
    last_step: int = 0
    heard: float = field(default_factory=time.monotonic)
    result: dict[str, Any] | None = None
    halted: bool = False
    failed: reports.Failed | None = None
    crashed: str = ""
    crashed_at: float = 0.0

    def over(self) -> bool:
        return self.result is not None or self.halted or self.failed is not None or bool(self.crashed)

    def host_of(self, rank: int) -> str:
        for host in self.hosts:
            if rank < host.ranks:
                return host.name
            rank -= host.ranks
        return ""

    def named(self, rank: int) -> str:
        host = self.host_of(rank)
        return f"rank {rank} on {host}" if host else f"rank {rank}"


class Supervisor:
    """Runs the ranks of one run folder; one supervisor at a time (the run folder's lock sees to that)."""

    def __init__(
        self, run_folder: Path, launch: LaunchSpec, listener: Listener, *, patience: Patience | None = None
    ) -> None:
        self._folder, self._spec, self._listener = run_folder, launch, listener
        self._patience = patience or Patience()
        self._ranks_folder = run_folder / "ranks"
        self._ranks_folder.mkdir(exist_ok=True)
        self._roll = Roll(launch)
        self._copies: CheckpointCopies | None = None
        self._copy_problem = ""
        self._launched_at: deque[float] = deque()

    def run(self) -> dict[str, Any] | None:
        """Train until rank 0 is done; returns its result, or None after a halt.

        Raises what a rank reported as an expected failure, RemoteError when
        launches keep dying without progress.
        """
        end_leftovers(self._folder)
        futile, best = 0, -1
        while True:
            hosts = self._gather()
            if hosts is None:
                return None
            launch = self._start(hosts)
            try:
                why = self._follow(launch)
            finally:
                self._end(launch)
                self._stop_copies()
            if launch.result is not None or launch.halted:
                return launch.result
            if launch.failed is not None:
                raise _as_error(launch.failed)
            if self._listener.halt_asked():
                return None
            if launch.last_step > best:
                futile = 0
            elif not self._roll.missed():
                # A launch that failed for want of a machine proves nothing about the training.
                futile += 1
            best = max(best, launch.last_step)
            if futile >= self._patience.restarts or self._spent():
                raise self._gave_up(launch, why)
            pause = _PAUSES_S[min(futile, len(_PAUSES_S) - 1)]
            self._listener.note(f"{why}; starting the ranks again from the last checkpoint in {pause:.0f} s", "warning")
            if _wait(lambda: not self._listener.halt_asked(), pause) is False:
                return None

    def _gather(self) -> tuple[HostSpec, ...] | None:
        """The hosts of the next launch: waits for a silent one until it answers or its time is up. None: halted."""
        while True:
            for text in self._roll.look():
                self._listener.note(text, "warning")
            if not self._roll.missed():
                return self._roll.present()
            if not _wait(lambda: not self._listener.halt_asked(), _MISSED_S):
                return None

    def _spent(self) -> bool:
        """Whether the restarts of this hour are used up (launches that only wait for a machine are not counted)."""
        if not self._spec.hosts:
            return False
        while self._launched_at and time.monotonic() - self._launched_at[0] > _HOUR_S:
            self._launched_at.popleft()
        return len(self._launched_at) > self._spec.restarts_per_hour

    # -- one launch ------------------------------------------------------------------------------
    def _start(self, hosts: tuple[HostSpec, ...]) -> _Launch:
        generation = 1 + max((int(p.name) for p in self._ranks_folder.iterdir() if p.name.isdigit()), default=0)
        folder = self._ranks_folder / str(generation)
        folder.mkdir()
        me = ProcessIdentity.of(os.getpid())
        group = reports.Group(generation=generation, supervisor=me)
        write_json(self._ranks_folder / "group.json", group)
        if hosts:
            spec = write_group_spec(self._spec, hosts, self._folder, generation, PROGRAM)
            argv, env = [*hosts[0].runner, "group", str(spec)], dict(os.environ)
        else:
            argv = launch_command(self._spec, self._folder, generation)
            env = launch_environment(self._spec)
        output = folder / "output.log"
        with output.open("ab") as log:
            process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )
        launched = msgspec.structs.replace(group, launcher=ProcessIdentity.of(process.pid))
        write_json(self._ranks_folder / "group.json", launched)
        ranks = sum(host.ranks for host in hosts) or self._spec.ranks
        return _Launch(
            process,
            reports.ReportReader(folder, ranks),
            output,
            progress=Progress(ranks),
            here=hosts[0].ranks if hosts else ranks,
            hosts=hosts,
            events=GroupEvents(folder) if hosts else None,
        )

    def _follow(self, launch: _Launch) -> str:
        """Relay reports until the launch is over; returns in words why it is."""
        while True:
            ended = launch.process.poll()
            self._relay(launch)
            if launch.result is not None or launch.halted:
                return ""
            if launch.failed is not None:
                return launch.failed.detail
            if launch.crashed and not self._verdict_due(launch, ended=ended is not None):
                # A rank that lost its peer says so before anybody knows which peer died, and of what.
                return f"{launch.end} ({launch.crashed})" if launch.end else launch.crashed
            if ended is not None:
                return launch.end or f"the launcher ended with status {ended} before the training was complete"
            dead = [rank for rank, identity in launch.ranks.items() if not identity.alive()]
            if dead:
                if not launch.over():
                    # Its last words may have come between the reading above and its death.
                    self._relay(launch)
                if not launch.over():
                    launch.crashed = f"{launch.named(dead[0])} (pid {launch.ranks[dead[0]].pid}) died"
                time.sleep(_POLL_S)
                continue
            self._watch_progress(launch)
            self._copy_checkpoints(launch)
            silence = time.monotonic() - launch.heard
            if silence > self._allowed(launch):
                return f"no rank reported anything for {silence:.0f} s after step {launch.last_step}"
            time.sleep(_POLL_S)

    @staticmethod
    def _verdict_due(launch: _Launch, *, ended: bool) -> bool:
        """Whether the launcher of several machines may still say who died first."""
        if launch.events is None or ended:
            return False
        launch.crashed_at = launch.crashed_at or time.monotonic()
        return time.monotonic() - launch.crashed_at < _VERDICT_S

    def _copy_checkpoints(self, launch: _Launch) -> None:
        """Keep a second copy on the first of the other hosts that take part."""
        if len(launch.hosts) < 2:
            return
        host = launch.hosts[1]
        if self._copies is None or self._copies.host.name != host.name:
            self._stop_copies()
            self._copies = CheckpointCopies(
                self._folder / "checkpoints", host, self._spec.ssh_config, keep=_COPIES_KEPT
            )
        self._copies.look()
        problem = self._copies.problem
        if problem and not self._copy_problem:
            self._listener.note(f"a checkpoint could not be copied to {host.name}: {problem}", "warning")
        self._copy_problem = problem

    def _stop_copies(self) -> None:
        if self._copies is not None:
            self._copies.close()
            self._copies = None

    def _allowed(self, launch: _Launch) -> float:
        seconds = launch.progress.seconds
        if not seconds:
            return self._patience.start
        return max(self._patience.step, 20 * statistics.median(seconds))

    def _watch_progress(self, launch: _Launch) -> None:
        """Name a stall once, with who the others wait for."""
        progress = launch.progress
        silence = progress.stalled_s()
        if silence is None or progress.named:
            return
        progress.named = True
        progress.stopped |= {rank for rank, who in launch.ranks.items() if _is_stopped(who)}
        silent = {rank for rank in range(progress.ranks) if launch.host_of(rank) in launch.silent}
        suspects = progress.suspects(silent)
        who = "; ".join(f"{launch.named(rank)}: {what}" for rank, what in suspects.items())
        self._listener.note(
            f"STALLED: no step for {silence:.0f} s (a step takes {statistics.median(progress.seconds):.1f} s); "
            + (f"the others wait for {who}" if who else "no single rank stands out"),
            "warning",
        )

    def _relay(self, launch: _Launch) -> None:
        self._relay_events(launch)
        for rank, report in launch.reader.read():
            if not isinstance(report, reports.At):
                launch.heard = time.monotonic()
            self._relay_report(launch, rank, report)

    def _relay_report(self, launch: _Launch, rank: int, report: reports.AnyReport) -> None:
        match report:
            case reports.Ready():
                launch.ready.add(rank)
                if rank < launch.here:
                    launch.ranks[rank] = report.process
                if len(launch.ready) == launch.progress.ranks and not launch.hosts:
                    self._quiet(launch)
            case reports.At():
                launch.progress.places[rank] = (report.step, report.waiting)
            case reports.Alive():
                # It waits for its hub: nobody stands still.
                launch.progress.moved_at = time.monotonic()
            case reports.Begun():
                # Again within a launch: the ranks have taken steps back by themselves.
                if not launch.begun:
                    launch.begun, launch.last_step = True, report.step
                    for host in launch.hosts:
                        self._roll.took_part(host.name)
                    self._launched_at.append(time.monotonic())
                self._listener.begun(report.step)
            case reports.Step():
                self._step(launch, report.metric)
            case reports.Said():
                self._listener.note(report.text, report.level)
            case reports.Done():
                launch.result = report.result
            case reports.HaltedHere():
                launch.halted = True
            case reports.Failed():
                launch.failed = launch.failed or report
            case reports.Crashed():
                launch.crashed = launch.crashed or f"{launch.named(rank)}: {report.text}"

    def _step(self, launch: _Launch, metric: Metric) -> None:
        # Steps that are done again after a return to an earlier state are no progress.
        launch.last_step = max(launch.last_step, metric.step)
        if launch.progress.named:
            launch.progress.named = False
            launch.progress.stopped.clear()
            silence = time.monotonic() - launch.progress.moved_at
            self._listener.note(f"the ranks go on: step {metric.step} after {silence:.0f} s of standing still")
        launch.progress.step_done(metric.seconds)
        self._listener.metric(metric)

    def _relay_events(self, launch: _Launch) -> None:
        """What the launcher of several machines says about them."""
        for event in launch.events.read() if launch.events is not None else ():
            host, rank = str(event.get("host", "")), event.get("rank")
            match event.get("event"):
                case "host_silent":
                    launch.silent.add(host)
                    self._roll.lost(host)
                    self._listener.note(f"{host} does not answer any more", "warning")
                case "host_back":
                    launch.silent.discard(host)
                    self._roll.answered(host)
                    self._listener.note(f"{host} answers again")
                case "host_lost" | "host_failed" if event.get("kind") in (None, *UNREACHED):
                    self._roll.lost(host)
                case "rank_stopped" if isinstance(rank, int):
                    launch.progress.stopped.add(rank)
                case "rank_resumed" if isinstance(rank, int):
                    launch.progress.stopped.discard(rank)
                case "ended":
                    launch.end = plain_text(str(event.get("reason", "")))

    @staticmethod
    def _quiet(launch: _Launch) -> None:
        """Stop mlx.launch's busy waiting.

        It selects on the ranks' always-writable stdin and so takes a whole
        core, until a write to it fails. All ranks have closed their stdin by
        now: one byte, which it passes on to them, makes that write fail.
        """
        assert launch.process.stdin is not None
        try:
            launch.process.stdin.write(b"\n")
            launch.process.stdin.flush()
        except BrokenPipeError:
            return  # the launcher has ended; the next poll sees it

    def _end(self, launch: _Launch) -> None:
        """Leave no process of the launch behind."""
        if launch.result is not None or launch.halted:
            _wait(lambda: launch.process.poll() is None, _TERM_S)
        if launch.hosts and launch.process.poll() is None:
            # It knows the ranks on the other machines; killed, their own runners end them when its lease runs out.
            launch.process.terminate()
            _wait(lambda: launch.process.poll() is None, _GROUP_TERM_S)
        self._relay(launch)
        identities = list(launch.ranks.values())
        if launch.process.poll() is None or any(identity.alive() for identity in identities):
            end_processes(launch.process.pid, identities)
        if launch.process.stdin is not None:
            # Nobody may read it any more, which is what was wanted.
            with contextlib.suppress(BrokenPipeError):
                launch.process.stdin.close()
        launch.process.wait()

    def _launches(self) -> int:
        return sum(1 for path in self._ranks_folder.iterdir() if path.name.isdigit())

    def _gave_up(self, launch: _Launch, why: str) -> RemoteError:
        tail = launch.output.read_bytes()[-_TAIL_BYTES:].decode(errors="replace")
        return RemoteError(
            f"the {launch.progress.ranks} ranks of the {self._spec.twin} twin were started {self._launches()} times "
            f"and got no further than step {launch.last_step}: {why}",
            host=socket.gethostname(),
            argv=tuple(str(part) for part in launch.process.args) if isinstance(launch.process.args, list) else (),
            exit_status=launch.process.returncode,
            output_tail=plain_text(tail),
            fix=f"see {launch.output}; start again to go on from the last checkpoint",
        )


def _is_stopped(identity: ProcessIdentity) -> bool:
    process = identity.process()
    try:
        return process is not None and process.status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def end_leftovers(run_folder: Path) -> None:
    """End launcher and ranks that an earlier, killed supervisor of this run folder left behind."""
    path = run_folder / "ranks" / "group.json"
    if not path.exists():
        return
    group = msgspec.json.decode(path.read_bytes(), type=reports.Group)
    folder = run_folder / "ranks" / str(group.generation)
    count = len(list(folder.glob("rank-*.jsonl")))
    said = reports.ReportReader(folder, count).read() if folder.exists() else []
    ranks = [report.process for _, report in said if isinstance(report, reports.Ready)]
    alive = group.launcher is not None and group.launcher.alive()
    if alive or any(identity.alive() for identity in ranks):
        # The launcher of several machines ends the ranks there first.
        patience_s = _GROUP_TERM_S if (folder / "group-spec.json").exists() else _TERM_S
        end_processes(group.launcher.pid if alive and group.launcher else None, ranks, patience_s)


def end_processes(launcher: int | None, ranks: list[ProcessIdentity], patience_s: float = _TERM_S) -> None:
    """SIGTERM, then SIGKILL: the launcher's process group and each rank's (torchrun gives them their own)."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if launcher is not None:
            _signal_group(launcher, number)
        for identity in ranks:
            process = identity.process()
            if process is not None:
                try:
                    process.send_signal(number)
                except psutil.NoSuchProcess:
                    continue
        if not _wait(lambda: any(identity.alive() for identity in ranks) or _group_alive(launcher), patience_s):
            return


def _signal_group(leader: int, number: signal.Signals) -> None:
    try:
        os.killpg(leader, number)
    except ProcessLookupError:
        return  # ended by itself


def _group_alive(leader: int | None) -> bool:
    if leader is None:
        return False
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == leader and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
        except (ProcessLookupError, PermissionError):
            continue
    return False


def _wait(pending: Callable[[], bool], seconds: float) -> bool:
    """Wait while `pending`; True if it still is when the time is up."""
    deadline = time.monotonic() + seconds
    while pending():
        if time.monotonic() > deadline:
            return True
        time.sleep(_POLL_S)
    return False


def _as_error(failed: reports.Failed) -> JupiterError:
    """The rank's error again, as the class it was (StageFailed where that class needs more than its words)."""
    kind = getattr(errors, failed.kind, None)
    if isinstance(kind, type) and issubclass(kind, JupiterError) and kind is not RemoteError:
        return kind(failed.detail, title=failed.title, fix=failed.fix)
    return StageFailed(failed.detail, title=failed.title, fix=failed.fix)
