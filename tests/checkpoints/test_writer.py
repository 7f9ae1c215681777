from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jupiter_engine.checkpoints.state import TrainerState
from jupiter_engine.checkpoints.store import Checkpoint, CheckpointStore, Identity, World
from jupiter_engine.checkpoints.writer import CheckpointWriter
from jupiter_engine.errors import DiskFull

IDENTITY = Identity(recipe_sha256="a", snapshot_sha256="b", start_sha256="c")


def checkpoint(step: int, weights: np.ndarray) -> Checkpoint:
    return Checkpoint(
        step=step,
        tokens=step,
        tokens_total=100,
        cursor_rows=step,
        identity=IDENTITY,
        world=World(twin="torch", ranks=1, versions={}),
        trainer=TrainerState(weights={"w": weights}, moments={}, updates=step),
        metrics=b"",
    )


class SlowStore(CheckpointStore):
    """Writes when told to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, keep=5)
        self.go = threading.Event()
        self.full = False
        self.threads: list[str] = []

    def write(self, checkpoint: Checkpoint) -> Path:
        self.threads.append(threading.current_thread().name)
        assert self.go.wait(10)
        if self.full:
            raise DiskFull("no room")
        return super().write(checkpoint)


def test_what_is_written_is_the_state_at_the_call_whatever_happens_to_it_later(tmp_path: Path) -> None:
    store = SlowStore(tmp_path)
    writer = CheckpointWriter(store)
    weights = np.ones(4, dtype=np.float32)
    writer.write(checkpoint(1, weights))
    weights[:] = 7.0
    writer.check()
    assert store.steps() == []
    store.go.set()
    writer.wait()
    found = store.newest(IDENTITY, pytest.fail)
    assert found is not None
    assert found.trainer.weights["w"].tolist() == [1.0] * 4
    writer.close()
    assert store.threads[0].startswith("checkpoint")


def test_a_second_checkpoint_waits_for_the_first(tmp_path: Path) -> None:
    store = SlowStore(tmp_path)
    writer = CheckpointWriter(store)
    weights = np.ones(4, dtype=np.float32)
    writer.write(checkpoint(1, weights))
    threading.Timer(0.1, store.go.set).start()
    writer.write(checkpoint(2, weights))
    assert store.steps()[0] == 1
    writer.close()
    assert store.steps() == [1, 2]


def test_a_failed_write_is_raised_once(tmp_path: Path) -> None:
    store = SlowStore(tmp_path)
    store.full = True
    writer = CheckpointWriter(store)
    writer.write(checkpoint(1, np.ones(4, dtype=np.float32)))
    store.go.set()
    writer.close()
    with pytest.raises(DiskFull):
        writer.check()
    writer.check()


def test_without_memory_for_a_copy_the_caller_writes_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10))
    store = SlowStore(tmp_path)
    store.go.set()
    writer = CheckpointWriter(store)
    writer.write(checkpoint(1, np.ones(4, dtype=np.float32)))
    assert store.steps() == [1]
    assert store.threads == [threading.main_thread().name]
    writer.close()
