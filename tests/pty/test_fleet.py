"""The Fleet page on a real pseudo-terminal: what it sends, and how soon it answers keys with many nodes."""

from __future__ import annotations

import re
import statistics
import sys
import time
from pathlib import Path

import pytest

from tests.pty.terminal import Terminal
from tests.pty.test_console import SEQUENCE
from tests.tui.recorded import record

MANY_LIMIT_BYTES_PER_S = 32 * 1024


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("pty") / "w", "empty")


def played(workspace: Path, kind: str) -> list[str]:
    return [sys.executable, "-m", "tests.pty.played_console", str(workspace), kind]


def test_nothing_that_a_node_says_drives_the_terminal(workspace: Path) -> None:
    with Terminal(played(workspace, "hostile")) as terminal:
        terminal.wait_for("No cycle has run")
        terminal.press("1")
        terminal.wait_for("evil[bold red")
        for keys in ("j", "k", "\t", "\t", "\t", "!", "q", "t", "\x1b", "x", "\x1b", "y"):
            terminal.press(keys)
            terminal.settle(0.4)
        terminal.press("q")
        assert terminal.end() == 0
        sent = terminal.data
    # Copying is what the person asked for: the only clipboard write, and encoded.
    writes = re.findall(rb"\x1b\]52;c;([^\x07\x1b]*)\x07", sent)
    assert len(writes) == 1
    assert writes[0] != b"cm0gLXJm"
    rest = SEQUENCE.sub(b"", re.sub(rb"\x1b\]52;c;[^\x07\x1b]*\x07", b"", sent))
    assert b"\x1b" not in rest, f"an escape that no drawing needs: {rest[max(0, rest.find(0x1B) - 30) :][:80]!r}"
    assert "\u202e".encode() not in sent


def test_keys_are_answered_while_sixty_four_nodes_change(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal(played(workspace, "many")) as terminal:
        terminal.wait_for("No cycle has run")
        terminal.press("1")
        terminal.wait_for("64 of 64 answer")
        terminal.settle(1.0)
        before = len(terminal.data)
        terminal.settle(3.0)
        rate = (len(terminal.data) - before) / 3.0
        took = [_answer_s(terminal, number) for number in range(1, 31)]
        terminal.press("q")
        assert terminal.end() == 0
    middle, late = statistics.median(took), sorted(took)[28]
    with capsys.disabled():
        print(
            f"  64 changing nodes: key to frame median {middle * 1000:.0f} ms, p95 {late * 1000:.0f} ms, {rate:.0f} B/s"
        )
    assert middle < 0.5
    assert rate < MANY_LIMIT_BYTES_PER_S


def _answer_s(terminal: Terminal, number: int) -> float:
    """Seconds until the detail pane names the next node."""
    terminal.data, began = b"", time.perf_counter()
    terminal.press("j")
    while f"ok node-{number:02d}".encode() not in SEQUENCE.sub(b"", terminal.data):
        terminal.read(0.02)
        assert time.perf_counter() - began < 10, f"no answer to key {number}"
    return time.perf_counter() - began
