"""One rank of a training group: `python -m jupiter_engine.worker.rank RUN_FOLDER GENERATION`.

Started by torchrun or mlx.launch, never by hand. It reports to files (see
training.distributed.reports) and ends itself when its supervisor, its launcher
or its generation is gone: a killed supervisor leaves nothing behind.
"""

from __future__ import annotations

import fcntl
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import IO

import msgspec

from jupiter_engine.errors import ExitCode, JupiterError, StateError
from jupiter_engine.files import ProcessIdentity, disk_full
from jupiter_engine.protocol.facts import Metric
from jupiter_engine.protocol.orders import TrainOrder
from jupiter_engine.protocol.orders import decoder as order_decoder
from jupiter_engine.training.distributed import reports
from jupiter_engine.training.loop import PeerFailed
from jupiter_engine.worker.train import check, finished_before, train_here

_WATCH_S = 1.0
_LOCK_S = 60.0
_LAST_WORDS_S = 5.0
"""How long a rank that only follows another's failure waits for that one to report."""


class RankReporter:
    """Rank 0's voice; the other ranks' reporter says nothing but errors."""

    def __init__(self, writer: reports.ReportWriter, run_folder: Path, rank: int) -> None:
        self._writer, self._folder, self._first = writer, run_folder, rank == 0

    def begun(self, step: int) -> None:
        if self._first:
            self._writer.write(reports.Begun(step=step))

    def metric(self, metric: Metric) -> None:
        if self._first:
            self._writer.write(reports.Step(metric=metric))

    def progress(self, done: int, total: int, note: str) -> None:
        """The supervisor derives progress from the metrics."""

    def alive(self) -> None:
        self._writer.write(reports.Alive())

    def at(self, step: int, *, waiting: bool) -> None:
        self._writer.write(reports.At(step=step, waiting=waiting))

    def note(self, text: str, level: str = "info") -> None:
        if self._first:
            self._writer.write(reports.Said(level=level, text=text))

    def halt_asked(self) -> bool:
        return (self._folder / "inbox" / "halt").exists()


def main(argv: list[str]) -> int:
    folder, generation = Path(argv[0]), int(argv[1])
    rank = int(os.environ.get("RANK", os.environ.get("MLX_RANK", "0")))
    _close_stdin()
    if not _wanted(folder, generation):
        return ExitCode.INTERRUPTED
    threading.Thread(target=_watch, args=(folder, generation), daemon=True).start()
    writer = reports.ReportWriter(folder / "ranks" / str(generation), rank)
    writer.write(reports.Ready(process=ProcessIdentity.of(os.getpid())))
    try:
        return _train(folder, rank, writer)
    except PeerFailed:
        time.sleep(_LAST_WORDS_S)
        return ExitCode.STAGE_FAILED
    except JupiterError as error:
        writer.write(reports.Failed(kind=error.kind, title=error.title, detail=error.detail, fix=error.fix))
        return ExitCode.STAGE_FAILED
    except Exception as error:  # noqa: BLE001 - the rank's outermost frame: whatever ended it must reach the supervisor
        traceback.print_exc()
        translated = disk_full(error, folder) if isinstance(error, OSError) else error
        writer.write(_report_of(translated))
        return ExitCode.STAGE_FAILED


def _train(folder: Path, rank: int, writer: reports.ReportWriter) -> int:
    order = order_decoder.decode((folder / "spec.json").read_bytes())
    if not isinstance(order, TrainOrder):
        raise StateError(f"{folder}/spec.json holds no training order")
    done = finished_before(folder, order)
    if done is not None:
        if rank == 0:
            writer.write(reports.Done(result=done))
        return ExitCode.DONE
    lock = _take_lock(folder / "ranks" / "lock") if rank == 0 else None
    reporter = RankReporter(writer, folder, rank)
    training = train_here(check(order, folder), reporter, joined=True)
    if rank == 0:
        result = training.result
        writer.write(reports.HaltedHere() if result is None else reports.Done(result=result))
    # Only now, when the outcome is reported: a rank that ends earlier counts as dead.
    training.leave()
    if lock is not None:
        lock.close()
    return ExitCode.DONE


def _report_of(error: Exception) -> reports.Report:
    """Lost peers and lost resources (RuntimeError, OSError) may pass; anything else would happen again."""
    if isinstance(error, JupiterError):
        return reports.Failed(kind=error.kind, title=error.title, detail=error.detail, fix=error.fix)
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, RuntimeError | OSError):
        return reports.Crashed(text=text)
    return reports.Failed(kind="StageFailed", title="A rank failed", detail=text, fix="see the ranks' output.log")


def _take_lock(path: Path) -> IO[str]:
    """Only one rank 0 may write checkpoints; one that was left behind ends within seconds (see `_watch`)."""
    lock = path.open("w")
    deadline = time.monotonic() + _LOCK_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StateError(
                    f"another training of {path.parents[1]} is still running", fix="end it, then start again"
                ) from None
            time.sleep(0.2)


def _close_stdin() -> None:
    """mlx.launch takes a core of CPU while it can write to its ranks' stdin (see Supervisor._quiet)."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def _wanted(folder: Path, generation: int) -> bool:
    group = msgspec.json.decode((folder / "ranks" / "group.json").read_bytes(), type=reports.Group)
    if group.generation != generation or not group.supervisor.alive():
        return False
    return group.launcher is None or group.launcher.alive()


def _watch(folder: Path, generation: int) -> None:
    # os._exit: the main thread may sit in a collective that no exception reaches.
    while _wanted(folder, generation):
        time.sleep(_WATCH_S)
    os._exit(ExitCode.INTERRUPTED)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: while the interpreter winds up, a thread of gloo that still lets go of a tensor ends the process
    # with SIGABRT (seen after FSDP on a busy machine). All that matters is on disk, and the group has been left.
    os._exit(code)
