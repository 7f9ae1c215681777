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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from jupiter_engine.checkpoints.store import Checkpoint, CheckpointStore, Identity, World
from jupiter_engine.checkpoints.writer import CheckpointWriter
from jupiter_engine.errors import Diverged, JupiterError, StateError
from jupiter_engine.protocol.facts import Metric
from jupiter_engine.protocol.specs import Recipe
from jupiter_engine.training.data_order import BatchOrder, counted_tokens, micro_batches, rank_rows
from jupiter_engine.training.schedule import learning_rate
from jupiter_engine.training.trainer import Batch, PeerFailed, Reporter, Trainer, TrainingData

__all__ = ["Batch", "Outcome", "PeerFailed", "Reporter", "Trainer", "Training", "TrainingData", "recipe_sha256"]


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
