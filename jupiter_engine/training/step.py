"""One optimizer step of a group of ranks, whoever chooses the rows: the run's loop, or an island between two merges.

    step = GroupStep(recipe, data, trainer, reporter)      # on every rank; keep it for the whole run
    done = step.compute(number, rows, tokens)              # gradients of the global batch `rows`, summed over ranks
    if done.finite: facts = step.apply(learning_rate)      # or step.discard(): as if the batch had never been
    ...
    step.close()

Every rank calls the same methods with the same arguments in the same order. The
loss of a step is the sum of the cross-entropy of all counted targets over
`tokens`, the number of counted targets of the *global* batch: ranks and
micro-batches only say who computes which part of that sum (`balance`), so the
gradient is that of one big batch however it is cut, up to rounding.

A rank that fails tells the others before it raises: they raise PeerFailed and
leave with it. `halt` asked for on any rank reaches all of them (`Computed.halt`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from jupiter_engine.errors import StateError
from jupiter_engine.protocol.specs import Recipe
from jupiter_engine.training.balance import Balance
from jupiter_engine.training.data_order import Rows
from jupiter_engine.training.reading import BatchReader, batch_of
from jupiter_engine.training.trainer import PeerFailed, Reporter, Trainer, TrainingData

Ranks = tuple[float, ...]

_NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """What all ranks know after the gradients are there; the same on every rank."""

    loss_sum: float
    """Cross-entropy of all counted targets of the batch, in nats."""
    loss: float
    """The same a token."""
    norm: float
    """Global L2 norm of the gradient of `loss`; NaN where the loss is not finite (nothing was summed then)."""
    halt: bool

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """A step with its update; tuples have one entry a rank and are the same on every rank."""

    loss_sum: float
    loss: float
    tokens: int
    norm: float
    """Before clipping."""
    seconds: float
    """Wall time of the step on this rank."""
    compute_seconds: Ranks
    data_seconds: Ranks
    communication_seconds: Ranks
    idle_seconds: Ranks
    rows: tuple[int, ...]
    peak_bytes: tuple[int, ...]


class GroupStep:
    """Carries out steps; holds the reader thread and the balance of the ranks."""

    def __init__(
        self,
        recipe: Recipe,
        data: TrainingData,
        trainer: Trainer,
        reporter: Reporter,
        balance: Balance | None = None,
    ) -> None:
        """`balance` None: the recipe's micro-batches on every rank."""
        self._recipe, self._data, self._trainer, self._reporter = recipe, data, trainer, reporter
        sizes = [recipe.micro_batch_sequences] * trainer.ranks
        self._balance = balance or Balance(sizes, lockstep=trainer.lockstep)
        if self._balance.ranks != trainer.ranks:
            raise StateError(f"the rows are divided among {self._balance.ranks} ranks, {trainer.ranks} take part")
        self._reader = BatchReader(data)
        self._began = 0.0
        self._tokens = 0
        self._rows: tuple[int, ...] = ()
        self._done: Computed | None = None
        self._times = np.zeros((trainer.ranks, 2))
        """[ranks, (compute, data)] seconds of the step under way."""
        self._communication = 0.0
        self._idle = 0.0

    def compute(
        self,
        number: int,
        rows: Rows,
        tokens: int,
        *,
        halt: Callable[[], bool] | None = None,
        following: Rows | None = None,
        check: Callable[[], None] | None = None,
    ) -> Computed:
        """Gradients of the global batch `rows` (int64 row numbers), `tokens` counted targets in all.

        `number`: the step, counted from 0, for reports; `following`: rows that will
        probably be asked for next, to be read ahead; `check`: raises what should end
        the group here, before any work; `halt`: asked after the
        work. Raises what failed on this rank, PeerFailed for another's.
        """
        trainer, reader = self._trainer, self._reader
        self._began = time.perf_counter()
        self._tokens, self._rows = tokens, self._balance.counts(len(rows))
        self._reporter.at(number, waiting=False)
        loss_sum, compute, failure = 0.0, 0.0, None
        waited = reader.waited
        try:
            if check is not None:
                check()
            ahead = [] if following is None else self._balance.parts(following, trainer.rank)
            for batch in reader.read(self._balance.parts(rows, trainer.rank), ahead):
                began = time.perf_counter()
                loss_sum += trainer.accumulate(batch, 1.0 / tokens)
                compute += time.perf_counter() - began
        except Exception as error:  # noqa: BLE001 - the other ranks wait for this one: they are told first, then it is raised
            self._others_wait_elsewhere(error, joint=trainer.lockstep)
            failure = error
        self._reporter.at(number, waiting=True)
        wanted = halt is not None and halt()
        arrived = time.perf_counter()
        said = trainer.exchange([float(wanted), float(failure is not None), loss_sum, compute, reader.waited - waited])
        together = time.perf_counter()
        self._raise(failure, said[:, 1], f"failed in step {number + 1}")
        total = float(said[:, 2].sum())
        norm = trainer.reduce() if math.isfinite(total) else math.nan
        alone = trainer.ranks == 1
        self._idle = 0.0 if alone else together - arrived
        self._communication = 0.0 if alone else time.perf_counter() - together
        self._times = said[:, 3:5]
        self._done = Computed(loss_sum=total, loss=total / tokens, norm=norm, halt=bool(said[:, 0].any()))
        return self._done

    def apply(self, learning_rate: float) -> StepDone:
        """Update with the gradient, clipped to the recipe's norm. Raises like `compute`."""
        trainer, done = self._trainer, self._taken()
        failure = None
        try:
            trainer.apply(learning_rate, min(1.0, self._recipe.max_grad_norm / (done.norm + _NORM_EPS)))
        except Exception as error:  # noqa: BLE001 - as in `compute`
            self._others_wait_elsewhere(error, joint=trainer.joint_update)
            failure = error
        peak = 0 if failure is not None else trainer.peak_bytes()
        said = trainer.exchange([float(failure is not None), self._communication, self._idle, float(peak)])
        self._raise(failure, said[:, 0], "failed in an update")
        compute = _floats(self._times[:, 0])
        self._balance.observe(compute, self._rows)
        return StepDone(
            loss_sum=done.loss_sum,
            loss=done.loss,
            tokens=self._tokens,
            norm=done.norm,
            seconds=time.perf_counter() - self._began,
            compute_seconds=compute,
            data_seconds=_floats(self._times[:, 1]),
            communication_seconds=_floats(said[:, 1]),
            idle_seconds=_floats(said[:, 2]),
            rows=self._rows,
            peak_bytes=tuple(int(value) for value in said[:, 3]),
        )

    def discard(self) -> None:
        """Forget the gradient: the weights stay as they were before `compute`."""
        self._taken()
        self._trainer.discard()

    def measure(self, data: TrainingData, rows: Rows) -> float:
        """Mean cross-entropy in nats a counted target over `rows` of `data`, the same on every rank; forward only."""
        trainer = self._trainer
        parts = self._balance.parts(rows, trainer.rank)
        loss_sum, counted, failure = 0.0, 0, None
        try:
            for part in parts:
                batch = batch_of(data, part)
                loss_sum += trainer.held_out(batch)
                counted += int(batch.counted.sum())
        except Exception as error:  # noqa: BLE001 - as in `compute`
            self._others_wait_elsewhere(error, joint=trainer.lockstep)
            failure = error
        said = trainer.exchange([float(failure is not None), loss_sum, float(counted)])
        self._raise(failure, said[:, 0], "failed while it measured the held-out loss")
        return float(said[:, 1].sum() / said[:, 2].sum())

    def _others_wait_elsewhere(self, failure: Exception, *, joint: bool) -> None:
        """Raise at once if the other ranks sit in a collective of the work itself: an exchange would never meet them.

        This rank's process then ends with its reason reported, and the collective of the others fails.
        """
        if joint and self._trainer.ranks > 1:
            raise failure

    def close(self) -> None:
        """End the reader thread; the trainer stays open."""
        self._reader.close()

    def _taken(self) -> Computed:
        if self._done is None:
            raise RuntimeError("apply and discard follow compute, once")
        done, self._done = self._done, None
        return done

    @staticmethod
    def _raise(failure: Exception | None, failed: Iterable[float], what: str) -> None:
        """Raise this rank's own failure, or PeerFailed for the first other one that `failed`."""
        if failure is not None:
            raise failure
        flags = list(failed)
        if any(flags):
            raise PeerFailed(f"rank {flags.index(max(flags))} {what}")


def _floats(values: Iterable[float]) -> Ranks:
    return tuple(float(value) for value in values)
