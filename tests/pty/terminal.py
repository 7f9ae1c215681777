"""A real pseudo-terminal around the console: spawn, read bytes, press keys."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import TracebackType


class Terminal:
    """A program on a pty of a given size; collects everything it writes."""

    def __init__(
        self, argv: list[str], *, columns: int = 120, rows: int = 36, env: dict[str, str] | None = None
    ) -> None:
        self.data = b""
        self._main, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", **(env or {})}
        environment.pop("NO_COLOR", None)
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            argv, stdin=child, stdout=child, stderr=child, env=environment, start_new_session=True, close_fds=True
        )
        os.close(child)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=10)
        os.close(self._main)

    def read(self, timeout_s: float) -> bool:
        """Take in what comes within the time; False once the program has closed the terminal."""
        ready, _, _ = select.select([self._main], [], [], timeout_s)
        if not ready:
            return True
        try:
            new = os.read(self._main, 65536)
        except OSError:  # Linux: the other side is closed
            return False
        self.data += new
        return bool(new)

    def wait_for(self, text: str, timeout_s: float = 20.0) -> float:
        """Seconds from the start until `text` was written; AssertionError with what came instead."""
        wanted = text.encode()
        deadline = time.perf_counter() + timeout_s
        while wanted not in self.data:
            alive = self.read(0.05)
            if time.perf_counter() > deadline or (not alive and wanted not in self.data):
                raise AssertionError(f"{text!r} never came; the last bytes: {self.data[-2000:]!r}")
        return time.perf_counter() - self.started

    def press(self, keys: str) -> None:
        os.write(self._main, keys.encode())

    def settle(self, seconds: float) -> None:
        """Read for a while."""
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline and self.read(0.05):
            pass

    def end(self, timeout_s: float = 10.0) -> int:
        """Wait for the program's end; its exit status."""
        deadline = time.perf_counter() + timeout_s
        while self.process.poll() is None and time.perf_counter() < deadline:
            self.read(0.05)
        while self.read(0.0) and select.select([self._main], [], [], 0)[0]:
            pass
        return self.process.wait(timeout=1)


def console(*arguments: str, workspace: Path) -> list[str]:
    return [sys.executable, "-m", "jupiter_tui.main", "--workspace", str(workspace), *arguments]
