"""What finished stages tell, checked: a worker may be on another machine, which writes into its result what it likes.

Viewers and the report read results through `told`; what is not of the stage's form is no result to them. The paths
and hashes that later stages need are read where they are needed.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]


class Model(msgspec.Struct, frozen=True, kw_only=True):
    name: Text
    folder: Text


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    model: Model
    parameters: Count


class Collected(msgspec.Struct, frozen=True, kw_only=True):
    documents: Count
    chunks: Count
    items: Count
    bytes: Count
    vault_bytes: Count = 0
    reused: bool = False


class Generated(msgspec.Struct, frozen=True, kw_only=True):
    samples: Count
    new_tokens: Count
    tokens_per_s: float


class Filtered(msgspec.Struct, frozen=True, kw_only=True):
    accepted: Count
    rejected: dict[Text, Count]
    """Reason -> samples."""


class Reviewed(msgspec.Struct, frozen=True, kw_only=True):
    accepted: Count
    rejected: Count
    reviewed: Count


class Queued(msgspec.Struct, frozen=True, kw_only=True):
    sequences: Count
    tokens: Count
    mix: dict[Text, float]
    """Source -> share of the tokens."""


class Trained(msgspec.Struct, frozen=True, kw_only=True):
    steps: Count
    first_loss: float
    last_loss: float
    tokens_per_s: float
    model: Model


class Evaluated(msgspec.Struct, frozen=True, kw_only=True):
    units: dict[Text, Count]
    """Task -> units on each model."""
    cached: Count = 0


Told = Prepared | Collected | Generated | Filtered | Reviewed | Queued | Trained | Evaluated

FORMS: Final[dict[str, type[Told]]] = {
    "prepare": Prepared,
    "collect": Collected,
    "generate": Generated,
    "filter": Filtered,
    "review": Reviewed,
    "queue": Queued,
    "train": Trained,
    "evaluate": Evaluated,
}


def told(stage: str, result: dict[str, Any]) -> Told | None:
    """The result in its form; None where the stage tells nothing, has not finished, or told something else."""
    form = FORMS.get(stage)
    if form is None:
        return None
    try:
        return msgspec.convert(result, form)
    except msgspec.ValidationError:
        return None
