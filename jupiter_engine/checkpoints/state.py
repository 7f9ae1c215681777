"""A full training state in plain arrays: what a trainer hands out and takes back, whichever twin it is."""

from __future__ import annotations

from dataclasses import dataclass, field

from jupiter_engine.checkpoints.tensors import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerState:
    """Everything that the next optimizer step depends on, besides data and recipe.

    `weights` and `moments` are float32. `moments` holds `m.<name>` and
    `v.<name>`, the first and second AdamW moment of each weight; `updates` is
    the number of updates they have seen. `rng` holds the framework's random
    number generators as they are (twin-specific names, e.g. `torch.cpu`).
    """

    weights: dict[str, Array]
    moments: dict[str, Array]
    updates: int
    rng: dict[str, Array] = field(default_factory=dict)
