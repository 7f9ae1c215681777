"""Second copies of checkpoints, sent through an ssh that runs the command on this machine."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from jupiter_engine.checkpoints.state import TrainerState
from jupiter_engine.checkpoints.store import Checkpoint, CheckpointStore
from jupiter_engine.protocol.specs import HostSpec
from jupiter_engine.training.distributed.copies import CheckpointCopies
from tests.training.nano import IDENTITY, WORLD


def checkpoint(step: int, best: int | None = None) -> Checkpoint:
    return Checkpoint(
        step=step,
        tokens=step,
        tokens_total=100,
        cursor_rows=step,
        identity=IDENTITY,
        world=WORLD,
        trainer=TrainerState(weights={"w": np.full(3, step, dtype=np.float32)}, moments={}, updates=step),
        metrics=b"",
        best_step=best,
    )


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HostSpec:
    tools = tmp_path / "tools"
    tools.mkdir()
    ssh = tools / "ssh"
    ssh.write_text('#!/bin/sh\n[ -e "$0.broken" ] && { echo "no route" >&2; exit 255; }\nfor last; do :; done\n')
    with ssh.open("a") as file:
        file.write('exec /bin/sh -c "$last"\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    return HostSpec(
        name="other",
        ssh="other",
        ranks=1,
        runner=("python", "x"),
        python="python",
        run_folder=str(tmp_path / "there"),
        addresses=("::1",),
    )


def copied(copies: CheckpointCopies, there: Path) -> list[int]:
    """What lies there once nothing more is under way."""
    for _ in range(6):
        copies.look()
        while copies._thread is not None and copies._thread.is_alive():
            time.sleep(0.01)
    return CheckpointStore(there, keep=9).steps()


def test_the_newest_and_the_best_are_copied_and_stay(tmp_path: Path, host: HostSpec) -> None:
    store, there = CheckpointStore(tmp_path / "here", keep=1), tmp_path / "there" / "checkpoints"
    copies = CheckpointCopies(tmp_path / "here", host, "", keep=2)
    assert not there.exists()
    for step, best, expected in ((5, 5, [5]), (10, 5, [5, 10]), (15, 5, [5, 10, 15]), (20, 20, [15, 20])):
        store.write(checkpoint(step, best))
        assert copied(copies, there) == expected
    assert copies.problem == ""
    # Another supervisor knows nothing of the copies before, which stay all the same.
    store.write(checkpoint(25, 20))
    assert copied(CheckpointCopies(tmp_path / "here", host, "", keep=2), there) == [20, 25]
    found = CheckpointStore(there, keep=2).newest(IDENTITY, pytest.fail)
    assert found is not None
    assert found.trainer.weights["w"].tolist() == [25.0] * 3


def test_a_best_one_that_was_overtaken_while_a_copy_was_under_way_follows(tmp_path: Path, host: HostSpec) -> None:
    store = CheckpointStore(tmp_path / "here", keep=1)
    store.write(checkpoint(5, 5))
    store.write(checkpoint(10, 5))
    copies = CheckpointCopies(tmp_path / "here", host, "", keep=1)
    assert copied(copies, tmp_path / "there" / "checkpoints") == [5, 10]


def test_a_failed_copy_says_why_and_the_next_checkpoint_is_tried(tmp_path: Path, host: HostSpec) -> None:
    store, there = CheckpointStore(tmp_path / "here", keep=1), tmp_path / "there" / "checkpoints"
    copies = CheckpointCopies(tmp_path / "here", host, "", keep=2)
    broken = tmp_path / "tools" / "ssh.broken"
    broken.touch()
    store.write(checkpoint(5))
    copies.look()
    while copies._thread is not None and copies._thread.is_alive():
        time.sleep(0.01)
    assert (copies.problem, copies.copied) == ("no route", set())
    broken.unlink()
    store.write(checkpoint(10))
    assert copied(copies, there) == [10]
    assert copies.problem == ""
