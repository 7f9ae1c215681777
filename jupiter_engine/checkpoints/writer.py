"""Writing checkpoints beside the training: the disk works while the next steps are computed."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil

from jupiter_engine.checkpoints.store import Checkpoint, CheckpointStore
from jupiter_engine.checkpoints.tensors import Array

_SPARE = 2
"""A copy is made only if this many times its size are free: otherwise the training waits for the disk."""


class CheckpointWriter:
    """Writes into a store from one thread, one checkpoint at a time.

    A checkpoint counts from the moment it stands in the store; until then the
    one before does. A failed write is raised by the next call of any method.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self._store = store
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None

    def write(self, checkpoint: Checkpoint) -> None:
        """Start writing a copy of `checkpoint`, or write it at once where memory for a copy is short."""
        self.wait()
        size = sum(array.nbytes for part in _parts(checkpoint) for array in part.values())
        if psutil.virtual_memory().available < _SPARE * size:
            self._store.write(checkpoint)
            return
        state = checkpoint.trainer
        copied = replace(
            state,
            weights=_copy(state.weights),
            moments=_copy(state.moments),
            rng=_copy(state.rng),
        )
        self._pending = self._pool.submit(self._store.write, replace(checkpoint, trainer=copied))

    def check(self) -> None:
        """Raise what a finished write failed with; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Return once nothing is being written; raise what the write failed with."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Let a write in progress end; its failure, if any, is kept for `check`."""
        self._pool.shutdown(wait=True)


def _parts(checkpoint: Checkpoint) -> tuple[dict[str, Array], ...]:
    return checkpoint.trainer.weights, checkpoint.trainer.moments, checkpoint.trainer.rng


def _copy(arrays: dict[str, Array]) -> dict[str, Array]:
    return {name: array.copy() for name, array in arrays.items()}
