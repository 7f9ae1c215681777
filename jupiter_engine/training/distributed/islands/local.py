"""The train worker of an island on the hub's own machine: a process of its own, which outlives the hub.

It is found again by what it wrote into its run folder (pid and start time), never by name, so the next hub goes on
with the islands that the last one left training.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec

import jupiter_engine
from jupiter_engine.errors import ExitCode
from jupiter_engine.files import read_json, whole_lines, write_atomic
from jupiter_engine.protocol import facts
from jupiter_engine.training.distributed.islands.starting import STOP_GRACE_S, IslandState

_POLL_S = 0.1
_HALTED = 75
"""The worker's exit status after a halt (EX_TEMPFAIL)."""


class LocalIsland:
    """One island's worker; the same calls as starting.RemoteIsland."""

    def __init__(self, name: str, run_folder: Path) -> None:
        self.name, self.run_folder = name, run_folder
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0

    def start(self, order: bytes) -> IslandState:
        """See to it that a worker is at work on exactly this order, which becomes spec.json."""
        (self.run_folder / "inbox").mkdir(parents=True, exist_ok=True)
        spec = self.run_folder / "spec.json"
        same = spec.exists() and spec.read_bytes() == order
        present = self.state()
        (self.run_folder / "inbox" / "halt").unlink(missing_ok=True)
        if same and (present.at_work or present.finished):
            return present
        if present.at_work:
            self.stop()
        write_atomic(spec, order)
        root = str(Path(jupiter_engine.__file__).parents[1])
        paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        with (self.run_folder / "worker.log").open("ab") as log:
            # A session of its own: what ends the hub does not end the island.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jupiter_engine.worker", str(self.run_folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Relative paths of an order start at the run folder.
                cwd=self.run_folder,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
        self._starts += 1
        return self.state()

    def state(self) -> IslandState:
        if self._process is not None:
            status = self._process.poll()
            if status is None:
                return IslandState(state="running", round=self._starts, pid=self._process.pid)
            name = signal.Signals(-status).name.removeprefix("SIG") if status < 0 else None
            code = status if status >= 0 else None
            return IslandState(state="exited", round=self._starts, exit_status=code, signal=name, detail=self._words())
        path = self.run_folder / "state.json"
        if not path.exists():
            return IslandState(state="absent")
        found = read_json(path, facts.RunState)
        assert isinstance(found, facts.RunState)
        if found.worker.alive():
            return IslandState(state="running", round=found.attempt, pid=found.worker.pid)
        last = self._last()
        match last:
            case facts.Finished():
                return IslandState(state="exited", round=found.attempt, exit_status=int(ExitCode.DONE))
            case facts.Halted():
                return IslandState(state="exited", round=found.attempt, exit_status=_HALTED)
            case facts.Failed():
                status = int(ExitCode.STAGE_FAILED)
                return IslandState(state="exited", round=found.attempt, exit_status=status, detail=last.detail)
            case _:
                return IslandState(state="lost", round=found.attempt)

    def ask_halt(self) -> None:
        """Have it come to rest at the next safe point, in its own time."""
        (self.run_folder / "inbox").mkdir(parents=True, exist_ok=True)
        (self.run_folder / "inbox" / "halt").touch()

    def stop(self, *, grace_s: float = STOP_GRACE_S) -> IslandState:
        """End the worker, and wait for that; SIGKILL after `grace_s` (its ranks end themselves when it is gone)."""
        for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, grace_s)):
            present = self.state()
            if not present.at_work or present.pid is None:
                return present
            try:
                os.kill(present.pid, number)
            except ProcessLookupError:
                return self.state()
            deadline = time.monotonic() + patience_s
            while self.state().at_work and time.monotonic() < deadline:
                time.sleep(_POLL_S)
        return self.state()

    def _last(self) -> facts.AnyFact | None:
        path = self.run_folder / "events.jsonl"
        last = None
        for line, _ in whole_lines(path) if path.exists() else ():
            last = line
        try:
            return facts.decoder.decode(last) if last is not None else None
        except msgspec.DecodeError:
            return None

    def _words(self) -> str:
        last = self._last()
        return last.detail if isinstance(last, facts.Failed) else ""
