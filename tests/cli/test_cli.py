"""The `jupiter` command as a person or a script meets it: output, refusals, exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jupiter_engine.cli.main import main
from jupiter_engine.errors import ExitCode
from jupiter_engine.protocol.commands import StartCycles
from tests.orchestrator.conftest import Rig


@pytest.fixture
async def finished(tmp_path: Path) -> Path:
    """A workspace in which one cycle was played to its end."""
    rig = Rig(tmp_path)
    rig.ask(StartCycles(domain="python", mode="auto"))
    await rig.steps()
    rig.engine.database.close()
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        status = main(argv)
    except SystemExit as error:
        status = int(error.code or 0)
    out, err = capsys.readouterr()
    return status, out, err


def in_json(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    status, out, err = run(capsys, *argv, "--json")
    assert status == ExitCode.DONE, err
    return json.loads(out)


def test_a_new_workspace_has_status_plan_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = ("--workspace", str(tmp_path / "new"))
    assert "no cycle yet" in run(capsys, "status", *at)[1]
    plan = in_json(capsys, "plan", "--domain", "python", *at)
    assert plan["expected_seconds"]["train"] is None
    assert plan["settings"]["training"]["steps"] > 0
    findings = in_json(capsys, "check", *at)
    assert {"ok"} == {f["level"] for f in findings if f["what"].startswith("domain")}


def test_state_commands_print_json(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = ("--workspace", str(finished))
    status = in_json(capsys, "status", *at)
    assert status["cycle"]["status"] == "finished"
    assert status["engine"] is None
    generators = in_json(capsys, "generators", *at)["python"]
    assert [(g["name"], g["active"]) for g in generators] == [("smollm2-135m-instruct", False), ("python-0001", True)]
    samples = in_json(capsys, "samples", "--status", "rejected", *at)
    assert [s["reason"] for s in samples] == ["too_short"]
    why = in_json(capsys, "why", samples[0]["sample"]["id"], *at)
    assert "The filters rejected it: too_short." in why["sentences"]
    runs = in_json(capsys, "runs", *at)
    assert runs[0]["outcome"] == "promoted"
    plan = in_json(capsys, "plan", "--domain", "python", *at)
    assert plan["expected_seconds"]["train"] is not None


def test_tables_are_readable(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = ("--workspace", str(finished))
    assert "* python-0001" in run(capsys, "generators", *at)[1]
    assert "rejected  rephrase" in run(capsys, "samples", *at)[1]
    assert "promote" in run(capsys, "runs", *at)[1]
    assert "## What was decided" in run(capsys, "runs", "python-0001", *at)[1]
    assert "What does assert do (3)?" in run(capsys, "samples", "--full", "--search", "(3)", *at)[1]
    listed = run(capsys, "samples", "--limit", "2", *at)[1]
    assert "2 of 6; --offset 2 shows the next" in listed


def test_presets_and_their_memory(capsys: pytest.CaptureFixture[str]) -> None:
    presets = in_json(capsys, "model-info")
    assert [p["preset"] for p in presets] == ["nano", "125m", "350m", "500m", "1b", "3b"]
    one = in_json(capsys, "model-info", "--preset", "1B")[0]
    assert 1.0e9 < one["parameters"] < 1.1e9
    assert one["training_state_bytes"] == 18 * one["parameters"]
    table = run(capsys, "model-info")[1]
    assert "1,040,254,976" in table
    head = table.splitlines()[0]
    assert "rope theta" in head
    assert "tied" in head


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (["model-info", "--preset", "2b"], ExitCode.USAGE, "presets: nano"),
        (["start", "--domain", "pyhton", "--auto"], ExitCode.USAGE, "python"),
        (["start", "--domain", "python", "--auto", "--cycles", "0"], ExitCode.USAGE, "--cycles must be 1 or more"),
        (["start", "--domain", "python", "--auto", "--interactive"], ExitCode.USAGE, "not allowed with"),
        (["why", "nothing"], ExitCode.USAGE, "nothing here has an id"),
        (["runs", "python-0009"], ExitCode.USAGE, "there is no cycle 'python-0009'"),
        (["stop"], ExitCode.USAGE, "no cycle is running"),
        (["resume"], ExitCode.USAGE, "no cycle is paused"),
        (["decide", "promote"], ExitCode.USAGE, "no cycle waits"),
        (["chat"], ExitCode.USAGE, "there is no generator yet"),
        (["chat", "--model", "nobody"], ExitCode.USAGE, "there is no model 'nobody'"),
        (["export", "nobody", "out"], ExitCode.USAGE, "there is no model 'nobody'"),
        (["fly"], ExitCode.USAGE, "invalid choice"),
        (["new-domain", "Not A Name"], ExitCode.USAGE, "Not A Name"),
        (["new-domain", "python"], ExitCode.USAGE, "python"),
    ],
)
def test_wrong_use_is_refused_with_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], status: int, words: str
) -> None:
    got, _, err = run(capsys, *argv, "--workspace", str(tmp_path))
    assert got == status
    assert words in err
    assert "Traceback" not in err


def test_a_broken_domain_file_names_line_and_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = ("--workspace", str(tmp_path))
    run(capsys, "init", str(tmp_path))
    path = tmp_path / "config" / "domains" / "python.yaml"
    path.write_text(path.read_text().replace("  samples:", "  sampels:"))
    status, _, err = run(capsys, "start", "--domain", "python", "--auto", *at)
    assert status == ExitCode.USAGE
    assert "python.yaml" in err
    assert "sampels" in err
    assert "samples" in err
    status, out, _ = run(capsys, "check", *at)
    assert status == ExitCode.USAGE
    assert "!! domain python" in out
    assert not (tmp_path / ".jupiter" / "runs").exists()


def test_a_cluster_without_a_usable_node_is_exit_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "init", str(tmp_path))
    path = tmp_path / "config" / "cluster.yaml"
    path.write_text(path.read_text().replace("role: hybrid", "role: generator"))
    status, _, err = run(capsys, "start", "--domain", "python", "--auto", "--workspace", str(tmp_path))
    assert status == ExitCode.NO_NODE, err
    assert "train" in err


def test_new_domain_loads_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = ("--workspace", str(tmp_path))
    made = in_json(capsys, "new-domain", "sailing", "--description", "Sailing boats", *at)
    assert Path(made["file"]).exists()
    assert in_json(capsys, "plan", "--domain", "sailing", *at)["settings"]["domain"]["description"] == "Sailing boats"
