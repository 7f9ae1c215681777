"""The console on a real pseudo-terminal: how soon it shows, what it sends, how it leaves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.pty.terminal import Terminal, console
from tests.tui.recorded import record

FIRST_FRAME_LIMIT_S = 3.0
IDLE_LIMIT_BYTES_PER_S = 4096
SEQUENCE = re.compile(rb"\x1b\[[0-9;?<>=:]*[ -/]*[@-~]|\x1b[()][0-9A-B]|\x1b[=>78cDEHMNOZ]|\x1b\]22;[a-z]*\x07")
"""What drawing needs: cursor, colours, modes, and the shape of the mouse pointer."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("pty") / "w", "train")


def test_the_first_frame_comes_soon(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames, data = [], []
    for _ in range(3):
        with Terminal(console(workspace=workspace)) as terminal:
            frames.append(terminal.wait_for("opening the workspace"))
            data.append(terminal.wait_for("40/60 steps"))
    with capsys.disabled():
        print(f"  first frame {min(frames) * 1000:.0f} ms, with data {min(data) * 1000:.0f} ms (best of 3, 120x36)")
    assert min(frames) < FIRST_FRAME_LIMIT_S


def test_nothing_hostile_reaches_the_terminal(workspace: Path) -> None:
    with Terminal(console(workspace=workspace)) as terminal:
        terminal.wait_for("40/60 steps")
        terminal.press("g")
        terminal.wait_for("hostile")
        for page in "123456":
            terminal.press(page)
            terminal.settle(0.4)
        terminal.press("q")
        assert terminal.end() == 0
        sent = terminal.data
    # The payloads of the recorded log and notice (tests.tui.recorded.ESCAPES).
    assert b"hostile red" in sent
    assert b"]52;" not in sent, "a clipboard write came through"
    assert b"cm0gLXJm" not in sent
    assert "\u202e".encode() not in sent
    assert b"\x9b31m" not in sent
    assert b"\x1bP1$r" not in sent
    rest = SEQUENCE.sub(b"", sent)
    assert b"\x1b" not in rest, f"an escape that no drawing needs: {rest[max(0, rest.find(0x1B) - 30) :][:80]!r}"


def test_an_idle_console_is_quiet(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal(console(workspace=workspace)) as terminal:
        terminal.wait_for("40/60 steps")
        terminal.settle(1.5)
        before = len(terminal.data)
        terminal.settle(3.0)
        rate = (len(terminal.data) - before) / 3.0
    with capsys.disabled():
        print(f"  idle output {rate:.0f} bytes/s at 120x36")
    assert rate < IDLE_LIMIT_BYTES_PER_S


def test_leaving_says_what_goes_on_and_how_to_come_back(workspace: Path) -> None:
    with Terminal(console(workspace=workspace)) as terminal:
        terminal.wait_for("40/60 steps")
        terminal.press("q")
        assert terminal.end() == 0
        tail = terminal.data[-300:]
    assert b"Detached; no engine is running." in tail
    assert f"jupiter-tui --workspace {workspace}".encode() in tail
    assert terminal.data.rfind(b"\x1b[?1049l") > terminal.data.rfind(b"\x1b[?1049h"), "the former screen must come back"


def test_a_workspace_that_cannot_be_opened_is_one_sentence_and_exit_2(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with Terminal(console(workspace=tmp_path / "file")) as terminal:
        assert terminal.end(timeout_s=20) == 2
        assert b"cannot be used as a workspace" in terminal.data.rpartition(b"\x1b[?1049l")[2]
        assert b"Traceback" not in terminal.data


@pytest.mark.parametrize("size", [(80, 24), (200, 60)])
def test_it_fits_other_sizes(workspace: Path, size: tuple[int, int]) -> None:
    with Terminal(console(workspace=workspace), columns=size[0], rows=size[1]) as terminal:
        terminal.wait_for("40/60 steps")
        terminal.press("q")
        assert terminal.end() == 0


def test_no_color_sends_no_colour(workspace: Path) -> None:
    with Terminal(["env", "NO_COLOR=1", *console(workspace=workspace)]) as terminal:
        terminal.wait_for("40/60 steps")
        terminal.settle(0.5)
        colours = set(re.findall(rb"[34]8;2;(\d+;\d+;\d+)", terminal.data))
    assert all(len(set(colour.split(b";"))) == 1 for colour in colours), "only greys may be sent"
