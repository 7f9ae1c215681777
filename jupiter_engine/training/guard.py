"""Decisions about a run from its losses alone: a step to be taken back, a run to be ended.

Whatever goes in is the same on every rank, so every rank decides alike.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

from jupiter_engine.protocol.specs import EarlyStopSpec, SpikeGuardSpec

LEAST_SPIKE = 0.5
"""Nats above the median that are no spike whatever the factor: where losses are near zero, batches of different kinds
lie far apart by ratio (rows that are known by heart beside new ones)."""


class SpikeGuard:
    """Tells a step whose update would do harm: its loss or gradient is not finite, or its loss leaps."""

    def __init__(self, spec: SpikeGuardSpec) -> None:
        self._spec = spec
        self._losses: deque[float] = deque(maxlen=spec.window)
        self.rollbacks = 0
        """How often this run has gone back so far, over restarts too."""

    @property
    def losses(self) -> tuple[float, ...]:
        """Of the last steps, oldest first; what a restarted run is told by `restart`."""
        return tuple(self._losses)

    @property
    def exhausted(self) -> bool:
        return self.rollbacks >= self._spec.rollbacks

    def restart(self, losses: Iterable[float]) -> None:
        """Forget all steps but those with `losses`, oldest first."""
        self._losses.clear()
        self._losses.extend(losses)

    def accept(self, loss: float) -> None:
        """The step with this loss was carried out."""
        self._losses.append(loss)

    def judge(self, loss: float, norm: float) -> str | None:
        """What is wrong with a step, in words, or None."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the loss is {loss:.4f}, its gradient norm {norm}"
        if not self._spec.spike_factor or len(self._losses) < self._spec.window:
            return None
        median = statistics.median(self._losses)
        if loss <= max(median * self._spec.spike_factor, median + LEAST_SPIKE):
            return None
        return f"the loss is {loss:.4f}, the median of the last {len(self._losses)} steps {median:.4f}"


class EarlyStop:
    """Follows the held-out loss: which measured state is the best one, and when nothing better comes any more."""

    def __init__(self, spec: EarlyStopSpec) -> None:
        self._spec = spec
        self.best_step: int | None = None
        self.best_loss = math.inf
        self._without = 0
        """Measurements since the best one."""

    def due(self, step: int, *, last: bool) -> bool:
        """Whether the loss is measured after `step` steps."""
        every = self._spec.every_steps
        return every > 0 and (last or step % every == 0)

    def note(self, step: int, loss: float) -> bool:
        """Take note of a measurement; True if the state is the best so far. A loss that is not finite never is."""
        if math.isfinite(loss) and loss < self.best_loss - self._margin():
            self.best_step, self.best_loss, self._without = step, loss, 0
            return True
        self._without += 1
        return False

    @property
    def over(self) -> bool:
        """Whether the run should end here."""
        return 0 < self._spec.patience <= self._without

    def restart(self, measured: Iterable[tuple[int, float]]) -> None:
        """Forget all measurements but these, (step, loss) in the order they were made."""
        self.best_step, self.best_loss, self._without = None, math.inf, 0
        for step, loss in measured:
            self.note(step, loss)

    def _margin(self) -> float:
        # Anything finite is better than nothing.
        return self._spec.min_improvement if self.best_step is not None else 0.0
