"""A full training state in plain arrays: what a trainer hands out and takes back, whichever twin it is."""

from __future__ import annotations

from dataclasses import dataclass, field

from jupiter_engine.checkpoints.tensors import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerState:
    """Everything that the next optimizer step depends on, besides data and recipe.

    `weights` are what is trained, float32, by parameter name (with LoRA: the
    adapters, `<projection>.lora_a` and `.lora_b`; the frozen rest is the start
    model). `moments` holds the optimizer's state as `<kind>.<parameter>`:
    `m` and `v` float32 of the parameter's shape (adamw), `m` alone for Muon's
    matrices, `row`, `col` or `v` (adafactor), `m8`/`v8` uint8 with their scales
    `ms`/`vs` (adamw8bit). Whole arrays whatever the sharding, so the number of
    ranks may change between save and resume. `updates` is the number of updates
    they have seen. `rng` holds the framework's random number generators as they
    are (twin-specific names, e.g. `torch.cpu`).
    """

    weights: dict[str, Array]
    moments: dict[str, Array]
    updates: int
    rng: dict[str, Array] = field(default_factory=dict)
