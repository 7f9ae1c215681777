"""The command line of jupiter-tui: refusals, exit codes, the headless path."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jupiter_engine.errors import ExitCode
from jupiter_tui import actions
from jupiter_tui.main import main


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "needs a terminal"),
        (["--json"], "--cycles and --json belong to --auto"),
        (["--cycles", "2"], "--cycles and --json belong to --auto"),
        (["--auto", "--cycles", "0"], "--cycles must be 1 or more"),
        (["--auto", "--read-only"], "--read-only forbids"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_2(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["--workspace", str(tmp_path), *arguments]) == ExitCode.USAGE
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_a_dumb_terminal_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main([]) == ExitCode.USAGE
    assert "TERM=dumb" in capsys.readouterr().err


def test_auto_passes_everything_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[Path, str, int, bool]] = []

    def run_auto(root: Path, domain: str, cycles: int, as_json: bool) -> int:
        seen.append((root, domain, cycles, as_json))
        return ExitCode.NOT_ENOUGH_DATA

    monkeypatch.setattr("jupiter_engine.cli.headless.run_auto", run_auto)
    code = main(["--workspace", str(tmp_path), "--auto", "--domain", "python", "--cycles", "3", "--json"])
    assert code == ExitCode.NOT_ENOUGH_DATA
    assert seen == [(tmp_path, "python", 3, True)]


def test_auto_with_an_unknown_domain_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--workspace", str(tmp_path), "--auto", "--domain", "pyton"])
    captured = capsys.readouterr()
    assert code == ExitCode.USAGE
    assert "pyton" in captured.err + captured.out


# -- the registry and its documentation ----------------------------------------------------------------
def test_no_key_means_two_things_on_a_page() -> None:
    for page in ("fleet", "domain", "review", "train", "promote", "history"):
        keys = [key for action in actions.for_page(page) for key in action.keys.split(",")]
        assert sorted(set(keys)) == sorted(keys), page


def test_no_key_needs_a_chord_that_terminals_take() -> None:
    keys = {key for action in actions.ACTIONS for key in action.keys.split(",")}
    assert not keys & {"ctrl+q", "ctrl+s", "ctrl+b", "ctrl+c", "ctrl+z"}
    assert not [key for key in keys if key.startswith("alt+")]


def test_every_action_has_a_method() -> None:
    from jupiter_tui.app import ConsoleApp, page
    from jupiter_tui.bridge import Bridge
    from jupiter_tui.screens.desk import Desk

    desk = Desk(Bridge(lambda _: None, workspace=None))
    for action in actions.ACTIONS:
        owner = ConsoleApp if action.page == "*" else type(page(action.page, desk))
        assert hasattr(owner, f"action_{action.name.partition('(')[0]}"), action


def test_the_documentation_holds_the_registry() -> None:
    text = (Path(__file__).parents[2] / "docs" / "console.md").read_text()
    assert actions.keyboard_table().strip() in text, "write it anew: python -m tests.tui.write_keys"


def test_the_documentation_names_every_option() -> None:
    from jupiter_tui.main import parser

    text = (Path(__file__).parents[2] / "docs" / "console.md").read_text()
    for option in parser()._option_string_actions:
        if option.startswith("--") and option != "--help":
            assert f"`{option}" in text, option


@pytest.mark.slow
def test_the_screenshot_script_draws_the_real_console(tmp_path: Path) -> None:
    from tests.tui.recorded import record

    script = Path(__file__).parents[2] / "scripts" / "screenshot"
    workspace = record(tmp_path / "w", "train")
    command = [sys.executable, str(script), "--workspace", str(workspace), "--out", str(tmp_path / "out"), "train"]
    subprocess.run(command, check=True, timeout=60, capture_output=True)
    drawn = (tmp_path / "out" / "train.svg").read_text()
    assert drawn.startswith("<svg")
    assert "40/60&#160;steps" in drawn
