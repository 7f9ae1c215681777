"""Reading rows ahead of the computation: a thread prepares the next micro-batches while this one is computed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from jupiter_engine.training.data_order import Rows
from jupiter_engine.training.trainer import Batch, TrainingData

_AHEAD = 2
"""Micro-batches that lie ready: a few megabytes at most."""


def batch_of(data: TrainingData, rows: Rows) -> Batch:
    """The micro-batch of `rows`; of none: one row of which nothing counts (see Trainer.lockstep)."""
    padding = len(rows) == 0
    if padding:
        rows = np.zeros(1, dtype=np.int64)
    tokens = data.tokens[rows].astype(np.int64)
    counted = data.loss_mask[rows][:, 1:] != 0
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        segments=data.segments[rows][:, :-1].astype(np.int64),
        counted=np.zeros_like(counted) if padding else counted,
    )


class BatchReader:
    """Hands out micro-batches in the order asked for and counts how long the caller had to wait for them."""

    def __init__(self, data: TrainingData) -> None:
        self._data = data
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self._ahead: deque[tuple[bytes, Future[Batch]]] = deque()
        self.waited = 0.0
        """Seconds that all callers so far have waited."""

    def read(self, parts: Sequence[Rows], following: Sequence[Rows] = ()) -> Iterator[Batch]:
        """The batches of `parts`; meanwhile the first of `following` are read ahead for the next call.

        What was read ahead for other rows than are asked for now is dropped.
        """
        wanted = [*parts, *following[:_AHEAD]]
        known = [rows.tobytes() for rows in wanted]
        if any(mine != key for (mine, _), key in zip(self._ahead, known, strict=False)):
            self._ahead.clear()
        position = len(self._ahead)
        for _ in parts:
            position = self._fill(wanted, known, position)
            began = time.perf_counter()
            batch = self._ahead.popleft()[1].result()
            self.waited += time.perf_counter() - began
            position = self._fill(wanted, known, position)
            yield batch

    def _fill(self, wanted: Sequence[Rows], known: Sequence[bytes], position: int) -> int:
        while len(self._ahead) < _AHEAD and position < len(wanted):
            self._ahead.append((known[position], self._pool.submit(batch_of, self._data, wanted[position])))
            position += 1
        return position

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
