"""One rank of a real group with its own micro-batch and speed: `python -m tests.training.uneven_rank FOLDER 1`.

FOLDER/case.json says what to do; rank r writes FOLDER/rank-<r>.npz (final weights) and, for rank 0, metrics and notes.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from jupiter_engine.checkpoints.store import CheckpointStore
from jupiter_engine.protocol.specs import LaunchSpec, Recipe, Sharding, Twin
from jupiter_engine.training.distributed.launchers import PROGRAM, launch_command, launch_environment
from jupiter_engine.training.loop import Batch, Training
from tests.training import nano


class Case(msgspec.Struct, frozen=True, kw_only=True):
    twin: Twin
    recipe: Recipe
    sizes: tuple[int, ...]
    """Micro-batch of each rank."""
    slow: tuple[float, ...]
    """Seconds that each rank sleeps for a row it computes."""
    sharding: Sharding = "none"
    rows: int = 60
    poison: int = -1
    """A token whose row has no finite loss."""


class Slowed:
    """A trainer that takes longer and cannot bear one row; all else is the twin's own."""

    def __init__(self, trainer: Any, seconds: float, poison: int) -> None:
        self._trainer, self._seconds, self._poison = trainer, seconds, poison

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)

    def accumulate(self, batch: Batch, scale: float) -> float:
        time.sleep(self._seconds * len(batch.tokens))
        loss = self._trainer.accumulate(batch, scale)
        return float("nan") if (batch.tokens == self._poison).any() else float(loss)


def data(case: Case) -> Any:
    rows = nano.data(rows=case.rows)
    if case.poison >= 0:
        rows.tokens[case.rows // 2, 3:6] = case.poison
    return rows


def run(case: Case, folder: Path, *, joined: bool) -> None:
    twin: Any = importlib.import_module(f"jupiter_engine.backends.{case.twin}.train")
    group = twin.join_group() if joined else None
    rank, ranks = (group.rank, group.ranks) if group is not None else (0, 1)
    weights = nano.weights() if rank == 0 else None
    trainer = twin.open_trainer(nano.INFO, case.recipe, weights, group=group, threads=1, sharding=case.sharding)
    store = CheckpointStore(folder / "checkpoints", keep=2) if rank == 0 else None
    listener = nano.Listener()
    training = Training(
        case.recipe,
        data(case),
        Slowed(trainer, case.slow[rank], case.poison),
        listener,
        store,
        identity=nano.IDENTITY,
        world=nano.WORLD,
        sizes=case.sizes[:ranks],
        start=lambda: nano.start_state(nano.weights()),
    )
    training.take_up(store.newest(nano.IDENTITY, listener.note) if store is not None else None)
    outcome = training.run()
    whole = trainer.weights()
    if rank == 0:
        np.savez(folder / "weights.npz", **whole)
        (folder / "metrics.jsonl").write_bytes(training.metrics)
        (folder / "said.json").write_text(json.dumps({"notes": listener.notes, "skipped": outcome.skipped_batches}))
    training.close()


def in_group(case: Case, folder: Path) -> None:
    """Carry the case out by real ranks on this machine; the launcher's output stands in FOLDER/output.log."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "case.json").write_bytes(msgspec.json.encode(case))
    launch = LaunchSpec(
        twin=case.twin,
        ranks=len(case.sizes),
        launcher="torchrun" if case.twin == "torch" else "mlx.launch",
        threads_per_rank=1,
    )
    argv = ["tests.training.uneven_rank" if part == PROGRAM else part for part in launch_command(launch, folder, 1)]
    root = Path(__file__).parents[2]
    with (folder / "output.log").open("wb") as log:
        env = launch_environment(launch)
        done = subprocess.run(argv, stdout=log, stderr=log, env=env, cwd=root, timeout=240, check=False)
    assert done.returncode == 0, (folder / "output.log").read_text()
    assert (folder / "weights.npz").exists(), (folder / "output.log").read_text()


if __name__ == "__main__":
    where = Path(sys.argv[1])
    run(msgspec.json.decode((where / "case.json").read_bytes(), type=Case), where, joined=True)
