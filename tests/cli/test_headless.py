"""What the headless run prints of a stage's progress."""

from __future__ import annotations

from pathlib import Path

import pytest

from jupiter_engine.api import Workspace
from jupiter_engine.cli import headless
from jupiter_engine.cli.main import main
from jupiter_engine.orchestrator.database import Database
from jupiter_engine.protocol import journal as j
from jupiter_engine.protocol.facts import Progress

RUN = "python-0001-train"


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """A workspace with a cycle that trains."""
    with Workspace(tmp_path):
        pass
    database = Database(tmp_path / ".jupiter" / "jupiter.db")
    with database.transaction():
        database.add_run(RUN, "python", 1, "train")
        database.append(
            j.CycleCreated(
                cycle="python-0001", domain="python", number=1, mode="auto", remaining=0, settings={}, by="me"
            )
        )
        for stage in j.STAGES[: j.STAGES.index("train")]:
            database.append(j.StageFinished(cycle="python-0001", stage=stage, run="", result={}))
        database.append(j.StageStarted(cycle="python-0001", stage="train", run=RUN, attempt=1))
    database.close()
    return tmp_path


def told(root: Path, done: float, note: str = "sent to box") -> None:
    """As while files go to a machine: no fact of a worker's, so without a number."""
    database = Database(root / ".jupiter" / "jupiter.db")
    with database.transaction():
        progress = Progress(seq=0, at=5.0, done=done, total=4.0, unit="MiB", rate_per_s=None, eta_s=None, note=note)
        database.set_progress(RUN, progress)
    database.close()


def test_every_news_of_a_transfer_is_shown_once(
    training: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(headless, "PROGRESS_EVERY_S", 0.0)
    with Workspace(training) as workspace:
        narrator = headless.Narrator(workspace, json=False)
        capsys.readouterr()
        for done in (1.0, 1.0, 2.0, 2.0, 3.0):
            told(training, done)
            narrator.show()
    lines = [line for line in capsys.readouterr().out.splitlines() if "MiB" in line]
    assert [line.split("train: ")[1][:5] for line in lines] == ["1/4 M", "2/4 M", "3/4 M"]


def test_a_workers_words_do_not_drive_the_terminal(
    training: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told(training, 1.0, note="evil \x1b]52;c;ZXZpbA==\x07\x1b[2J\x9bthing")
    with Workspace(training) as workspace:
        headless.Narrator(workspace, json=False).show()
    shown = capsys.readouterr().out
    assert main(["status", "--workspace", str(training)]) == 0
    for text in (shown, capsys.readouterr().out):
        assert "evil thing" in text
        assert not any(mark in text for mark in "\x1b\x07\x9b")
