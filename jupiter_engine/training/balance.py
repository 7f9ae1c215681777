"""Who computes how many rows of a global batch: ranks of different speed and memory finish together.

The gradient of a step does not depend on it (see `step`): only its rounding and its duration do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jupiter_engine.training.data_order import Rows, micro_batches

_CHOOSE_AFTER = (3, 10)
"""Steps after which the shares are first chosen anew; then every `_CHOOSE_EVERY`."""
_CHOOSE_EVERY = 50
_LEVEL = 1.05
"""Shares stay while the slowest rank takes no more than this times the quickest one's time."""
_WORTH = 0.98
"""New shares are taken only if the slowest rank's expected time falls to this share of what it was."""
_GRAINS = 16
"""Rows move between ranks in whole micro-batches where a rank has about so many, else in parts of one."""


class Balance:
    """Shares of the ranks, the same on every rank: all that goes in was exchanged.

    With equal speeds shares are equal. After steps 3 and 10 of this process and
    every 50 steps later they follow the measured compute time a row. For ranks in
    lockstep (FSDP) the measured times contain the waiting for each other, so they
    come out level and the shares stay.
    """

    def __init__(self, sizes: Sequence[int], *, lockstep: bool = False) -> None:
        """`sizes`: rows that each rank computes at once, its micro-batch."""
        if not sizes or min(sizes) < 1:
            raise ValueError(f"every rank needs a micro-batch of at least one row, got {tuple(sizes)}")
        self._sizes, self._lockstep = tuple(sizes), lockstep
        self._cost = [1.0] * len(sizes)
        self._steps = 0
        self._next = _CHOOSE_AFTER[0]
        self._seconds = np.zeros(len(sizes))
        self._rows = np.zeros(len(sizes), dtype=np.int64)

    @property
    def ranks(self) -> int:
        return len(self._sizes)

    def counts(self, rows: int) -> tuple[int, ...]:
        """How many of `rows` rows each rank computes."""
        return shares(rows, self._cost, self._sizes)

    def parts(self, batch: Rows, rank: int) -> list[Rows]:
        """The micro-batches of `rank`, in order; ranks own consecutive stretches of the batch.

        In lockstep every rank gets equally many; those without rows are empty.
        """
        counts = self.counts(len(batch))
        first = sum(counts[:rank])
        mine = batch[first : first + counts[rank]]
        if not self._lockstep:
            return list(micro_batches(mine, self._sizes[rank]))
        most = max(-(-count // size) for count, size in zip(counts, self._sizes, strict=True))
        return list(np.array_split(mine, most))

    def observe(self, seconds: Sequence[float], rows: Sequence[int]) -> bool:
        """Take note of a step: each rank's compute seconds for its `rows`; True if the shares changed with that."""
        self._steps += 1
        if self._steps > 1:
            # The first step of a process warms caches up and compiles.
            self._seconds += np.asarray(seconds)
            self._rows += np.asarray(rows)
        if self.ranks == 1 or self._steps < self._next:
            return False
        later = [step for step in _CHOOSE_AFTER if step > self._steps]
        self._next = later[0] if later else self._steps + _CHOOSE_EVERY
        return self._choose(sum(rows))

    def _choose(self, total: int) -> bool:
        measured = self._rows > 0
        rate = np.where(measured, self._seconds / np.maximum(self._rows, 1), 0.0)
        self._seconds[:], self._rows[:] = 0.0, 0
        if not measured.any() or rate[measured].min() <= 0.0:
            return False
        # A rank that had no rows is taken to be as slow as the slowest one, until it has had some.
        cost = [float(value) for value in np.where(measured, rate, rate[measured].max())]
        now = self.counts(total)
        times = [count * each for count, each in zip(now, cost, strict=True)]
        if max(times) <= _LEVEL * min(times):
            return False
        new = shares(total, cost, self._sizes)
        if max(count * each for count, each in zip(new, cost, strict=True)) > _WORTH * max(times):
            return False
        self._cost = cost
        return True


def shares(rows: int, cost: Sequence[float], sizes: Sequence[int]) -> tuple[int, ...]:
    """Rows of each rank such that the largest rows * cost is least, to within one grain.

    Grain after grain goes to the rank that would finish first with it, ties to the
    lower rank: for equal grains no other division ends earlier. A grain is a rank's
    micro-batch, or less where there are few: at most 1/16 of its part of the rows.
    """
    parts = _GRAINS * sum(sizes)
    grains = [max(1, min(size, size * rows // parts)) for size in sizes]
    counts = [0] * len(sizes)
    left = rows
    while left:
        ends = [(counts[r] + min(grains[r], left)) * cost[r] for r in range(len(sizes))]
        rank = ends.index(min(ends))
        taken = min(grains[rank], left)
        counts[rank] += taken
        left -= taken
    return tuple(counts)
