"""Verb `hold`: the small parent of every kept process, which outlives the runner and writes down how the process ended.

The process is a session of its own, reads nothing, and appends stdout and stderr to its log. It starts only after
NAME.pid.json is on the disk, and a second `hold` for the same round starts nothing: whatever is killed in between,
a process is never started twice. Signals that reach `hold` (a launcher's SIGTERM, the hang-up of a terminal) go on to
the process's whole session.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from . import identity
from .errors import NodeError
from .files import complain, write_json
from .keep_folder import KeepFolder, Order

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
MARK = "JUPITER_KEPT_"
"""Begins the name of a variable that only this process and what it starts carry: by it they are found even when
everything that led to them was killed."""
ALREADY = 75
"""Exit status of a `hold` that finds its process started (EX_TEMPFAIL of sysexits.h)."""
_PR_SET_CHILD_SUBREAPER = 36


def main(arguments: list[str]) -> int:
    """hold FOLDER NAME: run the process NAME of FOLDER/keep.json to its end and return its exit status.

    `{VARIABLE}` in NAME is replaced from the environment: launchers give every rank the same command line.
    """
    if len(arguments) != 2:
        raise NodeError("usage", "hold FOLDER NAME")
    try:
        name = arguments[1].format_map(os.environ)
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise NodeError("usage", f"{arguments[1]!r} needs a variable that is not set: {error}") from error
    folder = KeepFolder(Path(arguments[0]))
    order = folder.order()
    if name not in order.processes:
        raise NodeError("order", f"{folder.path}/keep.json has no process {name}")
    with contextlib.suppress(OSError):
        # Already the leader of a session when started by the runner.
        os.setsid()
    null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null, 0)
    lock = os.open(folder.path / f".{name}.hold.lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return ALREADY
    report = folder.report(name, order)
    if report["state"] != "waiting" and not report.get("stale"):
        return ALREADY
    return Held(folder, order, name).run()


class Held:
    """One process from its fork to its exit file."""

    def __init__(self, folder: KeepFolder, order: Order, name: str) -> None:
        self._folder = folder
        self._name = name
        self._process = order.processes[name]
        self._round = order.round
        self._mark = f"{MARK}{os.urandom(12).hex()}"
        self._child: dict[str, Any] = {}
        self._cancelled = False

    def run(self) -> int:
        """Start it, wait for its end, write that down. Returns its exit status, 128 + number for a signal."""
        adopt_orphans()
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        for number in FORWARDED:
            signal.signal(number, self._forward)
        gate_read, gate_write = os.pipe()
        said_read, said_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(gate_write)
            self._become(gate_read, said_write)
        os.close(gate_read)
        os.close(said_write)
        child = identity.of(pid)
        record = {"name": self._name, "round": self._round, **child, "session": pid, "variable": self._mark}
        record["hold"] = identity.of(os.getpid())
        self._insist(lambda: write_json(self._folder.pid_file(self._name), record))
        self._child = child
        if not self._cancelled:
            with contextlib.suppress(BrokenPipeError):
                os.write(gate_write, b"g")
        os.close(gate_write)
        problem = b""
        while piece := os.read(said_read, 4096):
            problem += piece
        status = self._wait(pid)
        ended = {
            "round": self._round,
            "pid": pid,
            "mark": child["mark"],
            "exit_status": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
            "signal": identity.signal_name(os.WTERMSIG(status)) if os.WIFSIGNALED(status) else None,
            "ended_at": time.time(),
            "remaining": self._remaining(pid),
        }
        if problem:
            ended["error"] = problem.decode("utf-8", "replace")
        self._insist(lambda: write_json(self._folder.exit_file(self._name), ended))
        return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)

    def _become(self, gate: int, said: int) -> NoReturn:
        """In the child: wait until we are written down, then turn into the process."""
        try:
            os.setsid()
            for number in FORWARDED:
                signal.signal(number, signal.SIG_DFL)
            if not os.read(gate, 1):
                # Our parent was killed, or told to stop, before we had begun.
                os._exit(128 + signal.SIGTERM)
            for known in os.listdir("/dev/fd"):  # noqa: PTH208 - numbers, not paths
                if int(known) > 2 and int(known) != said:
                    with contextlib.suppress(OSError):
                        os.close(int(known))
            log = os.open(self._process["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
            os.chdir(self._process["cwd"])
            argv, env = self._process["argv"], {**os.environ, **self._process.get("env", {}), self._mark: "1"}
            os.execvpe(argv[0], argv, env)  # noqa: S606 - there is no shell to quote for
        except BaseException as error:  # noqa: BLE001 - this copy of us must end here, whatever happened
            with contextlib.suppress(OSError):
                os.write(said, f"{self._process['argv'][0]}: {error}"[:4000].encode("utf-8", "replace"))
        finally:
            os._exit(127)

    def _wait(self, pid: int) -> int:
        """Collect every child, adopted ones too, until it is this one."""
        while True:
            ended, status = os.waitpid(-1, 0)
            if ended == pid:
                return status

    def _remaining(self, pid: int) -> list[dict[str, Any]]:
        """Identities of what the process left behind: of its session, or orphans that came to us."""
        table = identity.rows()
        ours = identity.descendants(table, {os.getpid()})
        left = [row for row in table.values() if row.session == pid or row.pid in ours]
        return [row.identity() for row in left if row.state not in identity.DEAD and row.pid != os.getpid()]

    def _forward(self, number: int, frame: object) -> None:
        del frame
        if not self._child:
            self._cancelled = self._cancelled or number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
            return
        for row in identity.rows().values():
            if row.session == self._child["pid"]:
                identity.send(row.identity(), number)

    def _insist(self, write: Callable[[], None]) -> None:
        """Write now, or as soon as there is room: what we know about the process is nowhere else."""
        while True:
            try:
                return write()
            except OSError as error:
                if error.errno == errno.ENOENT and not self._folder.path.is_dir():
                    # The folder was removed: nobody wants to know any more.
                    return None
                complain(f"hold {self._name}: {error}")
            time.sleep(1.0)


def adopt_orphans() -> None:
    """Make descendants whose parents end ours instead of init's, where the system can do that (Linux)."""
    if identity.LINUX:
        # A Python without ctypes still works: what it then cannot find by parents is found by session.
        with contextlib.suppress(ImportError, OSError, AttributeError):
            import ctypes

            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
