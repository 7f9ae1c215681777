"""`jupiter runs`: comparing, exporting and replaying trainings."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import msgspec
import pytest

from jupiter_engine.cli.main import main
from jupiter_engine.errors import ExitCode
from jupiter_engine.protocol.commands import StartCycles
from jupiter_engine.protocol.facts import Metric
from tests.cli.test_cli import in_json, run
from tests.orchestrator.conftest import Rig
from tests.orchestrator.test_comparison import falling, metric

STEPS = [
    metric(1, tokens=10, loss=3.0, rank_seconds=(0.5, 0.25), peak_bytes=(100, 90), held_out_loss=2.5),
    metric(2, tokens=20, loss=2.0, rank_seconds=(0.5, 0.25), peak_bytes=(100, 95)),
]


@pytest.fixture
async def trained(tmp_path: Path) -> Path:
    """A workspace of two played cycles, with metrics of our choice."""
    rig = Rig(tmp_path)
    rig.ask(StartCycles(domain="python", mode="auto", cycles=2))
    await rig.steps()
    rig.engine.database.close()
    for cycle, metrics in (("python-0001", STEPS), ("python-0002", falling(30, 10, 30.0))):
        folder = tmp_path / ".jupiter" / "runs" / f"{cycle}-train"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_bytes(b"".join(msgspec.json.encode(m) + b"\n" for m in metrics))
    return tmp_path


def test_compare_puts_two_trainings_side_by_side(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = ("--workspace", str(trained))
    status, out, _ = run(capsys, "runs", "compare", "python-0001", "python-0002", *at)
    assert status == ExitCode.DONE
    assert "the settings are the same" in out
    assert "2.5000 (step 1)" in out
    found = in_json(capsys, "runs", "compare", "python-0001", "python-0002", *at)
    assert found["a"]["steps"] == 2
    assert found["b"]["steps"] == 30
    assert found["curve"][-1]["tokens"] == 20


def test_export_csv_has_every_step_and_a_column_a_rank(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = trained / "out" / "steps.csv"
    status, _, err = run(capsys, "runs", "export", "python-0001", str(target), "--workspace", str(trained))
    assert status == ExitCode.DONE, err
    rows = list(csv.DictReader(io.StringIO(target.read_text())))
    assert [float(row["loss"]) for row in rows] == [3.0, 2.0]
    assert [row["peak_bytes.1"] for row in rows] == ["90", "95"]
    assert [row["held_out_loss"] for row in rows] == ["2.5", ""]


def test_export_jsonl_reads_back_as_the_same_steps(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = trained / "steps.jsonl"
    run(capsys, "runs", "export", "python-0001", str(target), "--workspace", str(trained))
    assert [msgspec.json.decode(line, type=Metric) for line in target.read_bytes().splitlines()] == STEPS


def test_export_tensorboard_is_read_by_the_format_s_own_definition(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboardX.proto.event_pb2 import Event

    target = trained / "board"
    argv = ("runs", "export", "python-0001", str(target), "--format", "tensorboard", "--workspace", str(trained))
    status, _, err = run(capsys, *argv)
    assert status == ExitCode.DONE, err
    (path,) = target.glob("events.out.tfevents.*")
    data, events = path.read_bytes(), []
    while data:
        # TFRecord: length, checksum of it, data, checksum of that.
        length = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    values = {(v.tag, e.step): (v.simple_value, e.wall_time) for e in events for v in e.summary.value}
    assert values["train/loss", 2] == (2.0, STEPS[1].at)
    assert values["train/held_out_loss", 1][0] == 2.5
    assert ("train/held_out_loss", 2) not in values
    assert values["ranks/compute_s/1", 1][0] == 0.25


def test_replay_shows_history_and_steps_by_time(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "runs", "replay", "python-0001", "--speed", "1e9", "--workspace", str(trained))
    assert status == ExitCode.DONE
    lines = out.splitlines()
    assert sum("train: step" in line for line in lines) == 2
    assert any("generate: done" in line for line in lines)
    main(["runs", "replay", "python-0001", "--speed", "1e9", "--json", "--workspace", str(trained)])
    times = [json.loads(line)["at"] for line in capsys.readouterr().out.splitlines()]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("compare", "python-0001"), "takes 2 names, not 1"),
        (("compare", "python-0001", "nothing-0001"), "there is no cycle 'nothing-0001'"),
        (("export", "python-0001", "steps"), "does not say in which form"),
        (("replay", "python-0001", "--speed", "0"), "--speed is 0"),
        (("python-0001", "python-0002"), "takes 0 or 1 names, not 2"),
    ],
)
def test_refusals(trained: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str) -> None:
    status, _, err = run(capsys, "runs", *words, "--workspace", str(trained))
    assert status == ExitCode.USAGE
    assert said in err
