"""Which rows of a snapshot make up which batch: a pure function of seed and step.

Nothing has to be stored to resume but the step number, and both twins and any
number of ranks walk the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


class BatchOrder:
    """Epoch after epoch of shuffled rows, cut into global batches.

    Epoch e visits all rows once in the order `PCG64(seed + e)` gives; a batch
    may begin in one epoch and end in the next.
    """

    def __init__(self, rows: int, batch_rows: int, seed: int) -> None:
        if rows < 1 or batch_rows < 1:
            raise ValueError(f"rows and batch_rows must be at least 1, got {rows} and {batch_rows}")
        self._rows, self._batch_rows, self._seed = rows, batch_rows, seed
        self._epoch = -1
        self._order: Rows = np.empty(0, dtype=np.int64)

    def _epoch_order(self, epoch: int) -> Rows:
        if epoch != self._epoch:
            self._order = np.random.Generator(np.random.PCG64(self._seed + epoch)).permutation(self._rows)
            self._epoch = epoch
        return self._order

    def batch(self, step: int) -> Rows:
        """Row numbers, int64 [batch_rows], of the global batch of `step` (counted from 0)."""
        first = step * self._batch_rows
        parts: list[Rows] = []
        wanted = self._batch_rows
        while wanted:
            epoch, offset = divmod(first, self._rows)
            part = self._epoch_order(epoch)[offset : offset + wanted]
            parts.append(part)
            first, wanted = first + len(part), wanted - len(part)
        return np.concatenate(parts)


def batch_number(step: int, skipped: Sequence[int]) -> int:
    """Which batch `step` (both counted from 0) trains on: the step-th one that is not in `skipped` (ascending).

    A batch that is left out moves all later ones up: what comes before stays as it was.
    """
    number = step
    for one in skipped:
        if one <= number:
            number += 1
    return number


def micro_batches(rows: Rows, size: int) -> Iterator[Rows]:
    """Cut a rank's rows into micro-batches of at most `size` rows."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def counted_tokens(loss_mask: npt.NDArray[Any], block_rows: int = 4096) -> npt.NDArray[np.int64]:
    """Counted targets of every row, int64 [N], read in blocks so that a memory-mapped mask stays on disk.

    Column 0 of the mask belongs to a row's first token, which is never a target.
    """
    counts = np.empty(len(loss_mask), dtype=np.int64)
    for start in range(0, len(loss_mask), block_rows):
        counts[start : start + block_rows] = np.count_nonzero(loss_mask[start : start + block_rows, 1:], axis=1)
    return counts
