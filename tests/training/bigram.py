"""A small exact model in numpy and ranks in threads: everything the loop needs of a twin."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jupiter_engine.checkpoints.state import TrainerState
from jupiter_engine.checkpoints.store import CheckpointStore
from jupiter_engine.protocol.specs import Recipe
from jupiter_engine.training.loop import Batch, Outcome, Training, TrainingData
from tests.training.nano import IDENTITY, INFO, WORLD, Listener, data


class Wire:
    """Connects trainers that run in threads, as a group of ranks."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._barrier = threading.Barrier(ranks, timeout=20)
        self._slots: list[Any] = [None] * ranks

    def gather(self, rank: int, value: Any) -> list[Any]:
        self._slots[rank] = value
        self._barrier.wait()
        everything = list(self._slots)
        self._barrier.wait()
        return everything


class BigramTrainer:
    """A bigram table trained by plain gradient descent in float64; counts what it is asked."""

    def __init__(self, wire: Wire | None = None, rank: int = 0) -> None:
        self._wire, self._rank = wire or Wire(1), rank
        self.table = np.zeros((INFO.vocab_size, INFO.vocab_size))
        self.gradient = np.zeros_like(self.table)
        self.batches: list[int] = []
        self.rates: list[float] = []
        self.poison_at = -1
        self.poison_token = -1
        """A batch with a row of nothing but this token has the loss `poison`."""
        self.poison = math.nan
        self.raise_at = -1
        self.measured: list[int] = []

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def ranks(self) -> int:
        return self._wire.ranks

    def accumulate(self, batch: Batch, scale: float) -> float:
        if len(self.rates) == self.raise_at:
            raise MemoryError("no memory for this batch")
        self.batches.append(len(batch.tokens))
        inputs, targets = batch.tokens[batch.counted], batch.targets[batch.counted]
        logits = self.table[inputs]
        log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        slopes = np.exp(log_probabilities)
        slopes[np.arange(len(targets)), targets] -= 1.0
        np.add.at(self.gradient, inputs, scale * slopes)
        loss = -float(log_probabilities[np.arange(len(targets)), targets].sum())
        poisoned = len(self.rates) == self.poison_at or (batch.tokens == self.poison_token).all(1).any()
        return self.poison if poisoned else loss

    @property
    def joint_update(self) -> bool:
        return False

    @property
    def lockstep(self) -> bool:
        return False

    def held_out(self, batch: Batch) -> float:
        self.measured.append(len(batch.tokens))
        inputs, targets = batch.tokens[batch.counted], batch.targets[batch.counted]
        logits = self.table[inputs]
        log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return -float(log_probabilities[np.arange(len(targets)), targets].sum())

    def discard(self) -> None:
        self.gradient[:] = 0.0

    def weights(self) -> dict[str, npt.NDArray[np.float32]] | None:
        return {"table": self.table.astype(np.float32)} if self._rank == 0 else None

    def adopt(self, weights: Mapping[str, npt.NDArray[Any]] | None) -> None:
        self.table = np.array(self._wire.gather(self._rank, weights)[0]["table"], dtype=np.float64)

    def peak_bytes(self) -> int:
        return 1000 + self._rank

    def peak_flops(self) -> float | None:
        return None

    def exchange(self, row: Sequence[float]) -> npt.NDArray[np.float64]:
        return np.array(self._wire.gather(self._rank, list(row)))

    def reduce(self) -> float:
        self.gradient = np.sum(self._wire.gather(self._rank, self.gradient.copy()), axis=0)
        return float(np.linalg.norm(self.gradient))

    def apply(self, learning_rate: float, gradient_scale: float) -> None:
        self.table -= 5000 * learning_rate * gradient_scale * self.gradient
        self.gradient[:] = 0.0
        self.rates.append(learning_rate)

    def export_state(self) -> TrainerState | None:
        self._wire.gather(self._rank, None)
        if self._rank:
            return None
        return TrainerState(weights={"table": self.table.copy()}, moments={}, updates=len(self.rates))

    def import_state(self, state: TrainerState) -> None:
        self.table = state.weights["table"].copy()
        del self.rates[state.updates :]

    def share_state(self, updates: int) -> None:
        self.table = self._wire.gather(self._rank, self.table)[0].copy()
        del self.rates[updates:]

    def fingerprint(self) -> str:
        return f"{abs(hash(self.table.tobytes())):016x}".rjust(16, "0")

    def save(self, folder: Path | None) -> None:
        assert folder is not None
        np.save(folder / "table.npy", self.table)

    def close(self) -> None:
        pass


def training(
    wanted: Recipe,
    trainer: BigramTrainer,
    folder: Path | None,
    listener: Listener | None = None,
    rows: TrainingData | None = None,
    *,
    held_out: TrainingData | None = None,
    sizes: Sequence[int] | None = None,
) -> Training:
    """A run whose start is a table of zeros, from the newest checkpoint in `folder` if there is one."""
    store = CheckpointStore(folder, keep=wanted.keep_checkpoints) if folder is not None else None
    reporter = listener or Listener()

    def start() -> TrainerState:
        return TrainerState(weights={"table": np.zeros_like(trainer.table)}, moments={}, updates=0)

    made = Training(
        wanted,
        rows or data(),
        trainer,
        reporter,
        store,
        identity=IDENTITY,
        world=WORLD,
        shape=INFO,
        held_out=held_out,
        start=start,
        sizes=sizes,
    )
    made.take_up(store.newest(IDENTITY, reporter.note) if store is not None else None)
    return made


def in_ranks(ranks: int, wanted: Recipe, folder: Path) -> tuple[list[BigramTrainer], list[Outcome | BaseException]]:
    wire = Wire(ranks)
    trainers = [BigramTrainer(wire, rank) for rank in range(ranks)]
    return trainers, run_ranks(trainers, wanted, folder)


def run_ranks(
    trainers: list[BigramTrainer], wanted: Recipe, folder: Path, listener: Listener | None = None, **more: Any
) -> list[Outcome | BaseException]:
    ends: list[Outcome | BaseException] = [RuntimeError("did not end")] * len(trainers)

    def one(rank: int) -> None:
        try:
            ends[rank] = training(
                wanted, trainers[rank], folder if rank == 0 else None, listener if rank == 0 else None, **more
            ).run()
        except BaseException as error:  # noqa: BLE001 - handed to the test
            ends[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(trainers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return ends
