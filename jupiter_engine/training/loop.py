"""The training loop: framework-free, the same for both twins and for any number of ranks.

One step is defined by its global batch alone: loss = sum of the cross-entropy of
all counted targets / number of counted targets of the *global* batch. Ranks and
micro-batches only say who computes which part of that sum, so the gradient is
that of one big batch however it is cut (up to rounding).
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from jupiter_engine.checkpoints.state import TrainerState
from jupiter_engine.checkpoints.store import Checkpoint, CheckpointStore, Identity, World
from jupiter_engine.checkpoints.writer import CheckpointWriter
from jupiter_engine.errors import Diverged, JupiterError, StateError
from jupiter_engine.protocol.facts import Metric
from jupiter_engine.protocol.specs import Recipe
from jupiter_engine.training.data_order import BatchOrder, counted_tokens, micro_batches, rank_rows
from jupiter_engine.training.schedule import learning_rate


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingData:
    """A snapshot's arrays, [N, sequence_tokens + 1], usually memory-mapped.

    `tokens` uint32; `loss_mask` uint8, 1 where the target at that position
    counts (column 0 is never a target); `segments` uint16, document number
    within the row.
    """

    tokens: npt.NDArray[Any]
    loss_mask: npt.NDArray[Any]
    segments: npt.NDArray[Any]
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch: inputs and targets, each [B, T].

    `tokens`, `targets`, `segments` int64 (segments of the inputs); `counted`
    bool: does the loss at that target count?
    """

    tokens: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    segments: npt.NDArray[np.int64]
    counted: npt.NDArray[np.bool_]


class Trainer(Protocol):
    """What a twin does for the loop. Every rank calls the same methods in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def ranks(self) -> int: ...

    def accumulate(self, batch: Batch, scale: float) -> float:
        """Add d(scale * S)/d(weights) to the gradient, S = sum of the batch's counted cross-entropy; return S in nats.

        A target whose next input belongs to another document is the caller's business (its loss mask is 0).
        """
        ...

    def exchange(self, row: Sequence[float]) -> npt.NDArray[np.float64]:
        """Tell all ranks `row`; returns [ranks, len(row)], the same everywhere."""
        ...

    def reduce(self) -> float:
        """Sum the gradient over the ranks; returns its global L2 norm (the same on every rank)."""
        ...

    def apply(self, learning_rate: float, gradient_scale: float) -> None:
        """One AdamW update with the gradient times `gradient_scale`; then the gradient is zero."""
        ...

    def export_state(self) -> TrainerState:
        """The state as arrays that later updates do not change before the next call to `apply`."""
        ...

    def import_state(self, state: TrainerState) -> None: ...

    def share_state(self, updates: int) -> None:
        """Give every rank rank 0's weights and moments, which have seen `updates` updates."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 over this rank's weights, in name order."""
        ...

    def save(self, folder: Path) -> None:
        """Write the master weights as model.safetensors, rounded to the recipe's compute precision."""
        ...

    def close(self) -> None: ...


class Reporter(Protocol):
    """Where the loop tells what happens; of all but `at` only rank 0's is heard."""

    def metric(self, metric: Metric) -> None: ...

    def progress(self, done: int, total: int, note: str) -> None: ...

    def at(self, step: int, *, waiting: bool) -> None:
        """This rank works on `step` (counted from 0), or has done its part and waits for the others. Every rank's is
        heard: whoever is behind when all stand still is the one the others wait for."""
        ...

    def note(self, text: str, level: str = "info") -> None: ...

    def halt_asked(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    steps: int
    tokens: int
    first_loss: float
    last_loss: float
    tokens_per_s: float
    """Input tokens of all steps over the sum of their wall times."""
    halted: bool
    """Stopped on request; a checkpoint of step `steps` was written."""


class PeerFailed(JupiterError):
    """Another rank failed and reports why; this one only leaves with it."""

    title = "Another rank failed"


def recipe_sha256(recipe: Recipe) -> str:
    return hashlib.sha256(msgspec.json.encode(recipe, order="deterministic")).hexdigest()


class Training:
    """One run of a recipe over a snapshot, from a checkpoint if there is one."""

    def __init__(
        self,
        recipe: Recipe,
        data: TrainingData,
        trainer: Trainer,
        reporter: Reporter,
        store: CheckpointStore | None,
        *,
        identity: Identity,
        world: World,
    ) -> None:
        """`store` is None on ranks other than 0: only rank 0 writes."""
        self._recipe, self._data, self._trainer, self._reporter, self._store = recipe, data, trainer, reporter, store
        self._identity, self._world = identity, world
        self._writer = CheckpointWriter(store) if store is not None else None
        self._order = BatchOrder(len(data.tokens), recipe.batch_sequences, recipe.seed)
        counts = counted_tokens(data.loss_mask)
        self._step_tokens = [int(counts[self._order.batch(step)].sum()) for step in range(recipe.steps)]
        self._tokens_total = sum(self._step_tokens)
        self._step = 0
        self._tokens = 0
        self._metrics: list[bytes] = []
        empty = [step + 1 for step, tokens in enumerate(self._step_tokens) if tokens == 0]
        if empty:
            raise StateError(
                f"no target counts in the batch of step {empty[0]} (and {len(empty) - 1} more): its loss is undefined",
                fix="use larger batches, or a snapshot with fewer masked rows",
            )

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._step

    @property
    def metrics(self) -> bytes:
        """The encoded metric lines of all steps done."""
        return b"".join(self._metrics)

    def take_up(self, checkpoint: Checkpoint | None) -> None:
        """Go on from a stored state. Rank 0 brings it (None: from the beginning), the others get it from there."""
        mine = checkpoint.step if checkpoint is not None else 0
        step = int(self._trainer.exchange([float(mine)])[0, 0])
        if step == 0:
            return
        tokens = sum(self._step_tokens[:step])
        if checkpoint is not None:
            if (checkpoint.tokens, checkpoint.tokens_total) != (tokens, self._tokens_total):
                raise StateError(
                    f"the checkpoint of step {step} counts {checkpoint.tokens} of {checkpoint.tokens_total} tokens, "
                    f"the snapshot says {tokens} of {self._tokens_total}",
                    fix="restore the snapshot, or remove the run folder to train anew",
                )
            self._trainer.import_state(checkpoint.trainer)
            self._metrics = checkpoint.metrics.splitlines(keepends=True)
        self._trainer.share_state(step)
        self._step, self._tokens = step, tokens

    def save(self, folder: Path) -> None:
        """Write the weights as model.safetensors into `folder`, in the recipe's compute precision."""
        self._trainer.save(folder)

    def close(self) -> None:
        """Leave the group together with the other ranks."""
        self._trainer.close()

    def run(self) -> Outcome:
        """Train to the last step, or to the next step boundary after a halt was asked for."""
        self.agree_on_weights("at the start")
        halted = False
        try:
            while self._step < self._recipe.steps and not halted:
                halted = self._one_step()
                last = self._step == self._recipe.steps
                if (halted or self._step % self._recipe.checkpoint_every_steps == 0) and not last:
                    self._checkpoint(wait=halted)
                halted = halted and not last
            self._on_disk(lambda writer: writer.wait())
        finally:
            if self._writer is not None:
                self._writer.close()
        return self._outcome(halted=halted)

    def agree_on_weights(self, when: str) -> None:
        """StateError unless all ranks hold bitwise the same weights."""
        if self._trainer.ranks == 1:
            return
        # 48 bits of the hash: an integer that float64 carries exactly.
        mine = float(int(self._trainer.fingerprint()[:12], 16))
        prints = self._trainer.exchange([mine])[:, 0]
        if not (prints == prints[0]).all():
            apart = [rank for rank in range(self._trainer.ranks) if prints[rank] != prints[0]]
            raise StateError(
                f"{when} rank {apart[0]} holds other weights than rank 0",
                fix="start the run again; it goes on from the last checkpoint",
            )

    def _one_step(self) -> bool:
        recipe, trainer, step = self._recipe, self._trainer, self._step
        began = time.perf_counter()
        self._reporter.at(step, waiting=False)
        tokens = self._step_tokens[step]
        loss_sum, failure = 0.0, None
        try:
            if self._writer is not None:
                self._writer.check()
            loss_sum = self._compute(step, 1.0 / tokens)
        except Exception as error:  # noqa: BLE001 - the other ranks wait for this one: they are told first, then it is raised
            failure = error
        halt = trainer.rank == 0 and self._reporter.halt_asked()
        self._reporter.at(step, waiting=True)
        said = trainer.exchange([float(halt), float(failure is not None), loss_sum, time.perf_counter() - began])
        if failure is not None:
            raise failure
        if said[:, 1].any():
            raise PeerFailed(f"rank {int(said[:, 1].argmax())} failed in step {step + 1}")
        loss = float(said[:, 2].sum()) / tokens
        norm = trainer.reduce() if math.isfinite(loss) else math.nan
        if not math.isfinite(norm):
            self._diverged(loss, norm)
        rate = learning_rate(recipe.schedule, recipe.optimizer.learning_rate, self._tokens + tokens, self._tokens_total)
        trainer.apply(rate, min(1.0, recipe.max_grad_norm / (norm + 1e-6)))
        self._step, self._tokens = step + 1, self._tokens + tokens
        seconds = time.perf_counter() - began
        metric = Metric(
            step=self._step,
            tokens=self._tokens,
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            tokens_per_s=recipe.batch_sequences * recipe.sequence_tokens / seconds,
            seconds=seconds,
            at=time.time(),
            rank_seconds=tuple(float(value) for value in said[:, 3]),
        )
        self._metrics.append(msgspec.json.encode(metric) + b"\n")
        self._reporter.metric(metric)
        self._reporter.progress(self._step, recipe.steps, f"loss {loss:.3f}")
        return bool(said[:, 0].any())

    def _compute(self, step: int, scale: float) -> float:
        """This rank's part of the step: the sum of its counted cross-entropy; gradients are in the trainer."""
        rows = rank_rows(self._order.batch(step), self._trainer.rank, self._trainer.ranks)
        parts = micro_batches(rows, self._recipe.micro_batch_sequences)
        return sum(self._trainer.accumulate(self._batch(part), scale) for part in parts)

    def _batch(self, rows: npt.NDArray[np.int64]) -> Batch:
        tokens = self._data.tokens[rows].astype(np.int64)
        return Batch(
            tokens=tokens[:, :-1],
            targets=tokens[:, 1:],
            segments=self._data.segments[rows][:, :-1].astype(np.int64),
            counted=self._data.loss_mask[rows][:, 1:] != 0,
        )

    def _diverged(self, loss: float, norm: float) -> None:
        if self._writer is not None:
            self._writer.wait()
        kept = self._store.steps() if self._store is not None else []
        from_here = f"the checkpoint of step {kept[-1]} is kept" if kept else "no checkpoint had been written yet"
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the loss is {loss:.4f}, its gradient norm {norm}"
        raise Diverged(
            f"step {self._step + 1}: {what}; {from_here}",
            fix="lower recipe.optimizer.learning_rate or raise recipe.schedule.warmup_share, then train anew",
        )

    def _checkpoint(self, *, wait: bool) -> None:
        """Write the state (rank 0) and let every rank know whether that worked.

        Without `wait` the disk may still be busy afterwards; a failure then
        shows at the start of the next step.
        """
        self.agree_on_weights(f"after step {self._step}")

        def write(writer: CheckpointWriter) -> None:
            writer.write(self.snapshot())
            if wait:
                writer.wait()

        self._on_disk(write)

    def _on_disk(self, act: Callable[[CheckpointWriter], None]) -> None:
        """Let rank 0 act on its writer; a failure there ends all ranks together."""
        failure: JupiterError | OSError | None = None
        if self._writer is not None:
            try:
                act(self._writer)
            except (JupiterError, OSError) as error:
                failure = error
        said = self._trainer.exchange([float(failure is not None)])
        if failure is not None:
            raise failure
        if said.any():
            raise PeerFailed(f"rank 0 could not write a checkpoint (after step {self._step})")

    def snapshot(self) -> Checkpoint:
        """The run as it stands between two steps."""
        return Checkpoint(
            step=self._step,
            tokens=self._tokens,
            tokens_total=self._tokens_total,
            cursor_rows=self._step * self._recipe.batch_sequences,
            identity=self._identity,
            world=self._world,
            trainer=self._trainer.export_state(),
            metrics=self.metrics,
        )

    def _outcome(self, *, halted: bool) -> Outcome:
        metrics = [msgspec.json.decode(line, type=Metric) for line in self._metrics]
        inputs = len(metrics) * self._recipe.batch_sequences * self._recipe.sequence_tokens
        return Outcome(
            steps=self._step,
            tokens=self._tokens,
            first_loss=metrics[0].loss,
            last_loss=metrics[-1].loss,
            tokens_per_s=inputs / sum(metric.seconds for metric in metrics),
            halted=halted,
        )
