"""What the loop and a twin's trainer know of each other: data, batches, the protocol of a trainer and of a reporter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from jupiter_engine.checkpoints.state import TrainerState
from jupiter_engine.errors import JupiterError
from jupiter_engine.protocol.facts import Metric


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
    """What a twin does for the loop. Every rank calls the same methods in the same order.

    *Collective* methods return only when all ranks have called them.
    """

    @property
    def rank(self) -> int: ...

    @property
    def ranks(self) -> int: ...

    @property
    def joint_update(self) -> bool:
        """Whether the ranks speak with each other within `apply`, because each holds a part of the state only."""
        ...

    @property
    def lockstep(self) -> bool:
        """Weights are divided among the ranks (FSDP): all must call `accumulate` and `held_out` equally often. The
        loop pads with batches of which nothing counts; they still run forward and backward."""
        ...

    def accumulate(self, batch: Batch, scale: float) -> float:
        """Add d(scale * S)/d(weights) to the gradient, S = sum of the batch's counted cross-entropy; return S in nats.

        A target whose next input belongs to another document is the caller's business (its loss mask is 0).
        """
        ...

    def held_out(self, batch: Batch) -> float:
        """Sum of the batch's counted cross-entropy in nats; forward pass only, the gradient stays as it is."""
        ...

    def exchange(self, row: Sequence[float]) -> npt.NDArray[np.float64]:
        """Tell all ranks `row`; returns [ranks, len(row)], the same everywhere. NaN and infinity pass. Collective."""
        ...

    def reduce(self) -> float:
        """Sum the gradient over the ranks; returns its global L2 norm (the same on every rank). Collective."""
        ...

    def apply(self, learning_rate: float, gradient_scale: float) -> None:
        """One optimizer update with the gradient times `gradient_scale`; then the gradient is zero."""
        ...

    def discard(self) -> None:
        """The gradient becomes zero; nothing is updated."""
        ...

    def export_state(self) -> TrainerState | None:
        """The state as whole arrays on rank 0, None on the others. Collective.

        Later updates do not change the arrays before the next call to `apply`.
        """
        ...

    def import_state(self, state: TrainerState) -> None:
        """Take over a state of either twin and of any number of ranks; on rank 0 only, `share_state` follows.

        With `updates` 0 the moments are those of a new optimizer, whatever was there.
        """
        ...

    def share_state(self, updates: int) -> None:
        """Give every rank (its part of) rank 0's weights and moments, which have seen `updates` updates. Collective.

        With `updates` 0 every rank's moments are those of a new optimizer.
        """
        ...

    def weights(self) -> dict[str, npt.NDArray[np.float32]] | None:
        """What is trained, whole and by name, on rank 0; None on the others. Collective."""
        ...

    def adopt(self, weights: Mapping[str, npt.NDArray[Any]] | None) -> None:
        """Take over rank 0's `weights` (None on the others); moments stay as they are. Collective."""
        ...

    def fingerprint(self) -> str:
        """Hexadecimal SHA-256, equal on all ranks if and only if they hold the same model."""
        ...

    def save(self, folder: Path | None) -> None:
        """Write the whole model as model.safetensors, adapters merged in, rounded to the recipe's compute precision.

        `folder` is given on rank 0 only. Collective.
        """
        ...

    def peak_bytes(self) -> int:
        """Most memory held so far: of the process, on a GPU of the device."""
        ...

    def peak_flops(self) -> float | None:
        """The device's dense peak in the compute precision, FLOP/s; None where it is not known."""
        ...

    def close(self) -> None: ...


class Reporter(Protocol):
    """Where the loop tells what happens; of all but `at` only rank 0's is heard."""

    def begun(self, step: int) -> None:
        """Training goes on from `step`, for which a checkpoint stands (0: the start); later steps are done again."""
        ...

    def metric(self, metric: Metric) -> None: ...

    def progress(self, done: int, total: int, note: str) -> None: ...

    def at(self, step: int, *, waiting: bool) -> None:
        """This rank works on `step` (counted from 0), or has done its part and waits for the others. Every rank's is
        heard: whoever is behind when all stand still is the one the others wait for."""
        ...

    def note(self, text: str, level: str = "info") -> None: ...

    def halt_asked(self) -> bool: ...


class PeerFailed(JupiterError):
    """Another rank failed and reports why; this one only leaves with it."""

    title = "Another rank failed"
