"""What it costs to train on islands that meet only now and then (DiLoCo) instead of as one group.

Losses: "Scaling Laws for DiLoCo" (Charles et al. 2025), tables 4 and 5: evaluation loss against data-parallel
training at equal tokens, tuned outer rate, 30 steps between merges. Times: bytes over the link, doubled, since real
links kept islands busy 1.1 to 1.9 times less than such sums say (`diloco-measured`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Final, Literal

import msgspec

Payload = Literal["float32", "bfloat16", "int8"]

_SIZES: Final = (35e6, 90e6, 180e6, 335e6, 550e6, 1.3e9, 2.4e9, 4e9, 10e9)
_PENALTY: Final[dict[int, tuple[float, ...]]] = {
    1: (-0.1, -0.1, -0.2, -0.3, -0.3, -0.4, -0.4, -0.22, -0.19),
    2: (0.7, 0.5, 0.3, 0.1, 0.2, 0.2, -0.1, -0.18, -0.19),
    4: (2.0, 1.5, 1.1, 0.9, 0.7, 0.5, 0.3, 0.18, 0.29),
    8: (3.9, 3.1, 2.3, 2.0, 1.7, 1.3, 1.1),
}
"""Percent of the loss by number of islands, one value a model size; 8 islands: measured up to 2.4 G weights."""
BYTES_OF_PAYLOAD: Final[dict[Payload, float]] = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0 + 4 / 256}
CAUTION: Final = 2.0
"""Factor on computed transfer times."""


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One merge of islands."""

    bytes_moved: float
    """Of one island, both ways."""
    seconds: float
    """Over its link, with caution."""
    share: float
    """Of a round's time that is spent on it."""


def loss_penalty(parameters: float, islands: int) -> float:
    """Expected rise of the loss against one group at equal tokens, as a share (0.002 = 0.2 %); negative: better.

    The hub takes an outer step for one island, too, so that has a measured row as well.
    Interpolated in the logarithm of the model's size, and of the number of islands between measured ones;
    outside the measured sizes the nearest measured one counts, above 8 islands the last slope goes on.
    """
    known = sorted(_PENALTY)
    if islands in _PENALTY:
        return _at_size(parameters, islands)
    upper = min(bisect_left(known, islands), len(known) - 1)
    low, high = known[upper - 1], known[upper]
    share = math.log(islands / low) / math.log(high / low)
    below, above = _at_size(parameters, low), _at_size(parameters, high)
    return below + share * (above - below)


def _at_size(parameters: float, islands: int) -> float:
    values = _PENALTY[islands]
    sizes = _SIZES[: len(values)]
    if parameters <= sizes[0]:
        return values[0] / 100
    if parameters >= sizes[-1]:
        return values[-1] / 100
    upper = bisect_left(sizes, parameters)
    low, high = sizes[upper - 1], sizes[upper]
    share = math.log(parameters / low) / math.log(high / low)
    return (values[upper - 1] + share * (values[upper] - values[upper - 1])) / 100


def round_cost(parameters: float, *, payload: Payload, bytes_per_s: float, round_s: float) -> Round:
    """Sending a contribution and fetching the next base over a link of `bytes_per_s`, each round of `round_s`."""
    moved = 2 * parameters * BYTES_OF_PAYLOAD[payload]
    seconds = CAUTION * moved / bytes_per_s
    return Round(bytes_moved=moved, seconds=seconds, share=seconds / (seconds + round_s))
