"""Who do the others wait for? Decided from where each rank is, not from whether its process lives.

A rank that was stopped, a machine that was cut off and a ring that hangs all look alike from
outside: every process is there, none moves. What tells them apart is that all ranks but one have
said that they wait.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

FLOOR_S = 10.0
"""Nothing is called a stall before this: checkpoints and evaluation of a first graph take seconds."""
FACTOR = 5.0
"""... nor before this many median steps."""


@dataclass(slots=True)
class Progress:
    """The ranks of one launch, as their reports tell."""

    ranks: int
    places: dict[int, tuple[int, bool]] = field(default_factory=dict)
    """Rank -> (step, whether it waits)."""
    stopped: set[int] = field(default_factory=set)
    """Ranks whose process is stopped (SIGSTOP)."""
    seconds: list[float] = field(default_factory=list)
    moved_at: float = field(default_factory=time.monotonic)
    """time.monotonic() of the last finished step (or of the launch)."""
    named: bool = False
    """This stall was spoken of already."""

    def step_done(self, seconds: float) -> None:
        self.seconds.append(seconds)
        del self.seconds[:-50]
        self.moved_at = time.monotonic()

    def patience_s(self) -> float | None:
        """How long no step is no stall; None before the first step."""
        if not self.seconds:
            return None
        return max(FLOOR_S, FACTOR * statistics.median(self.seconds))

    def stalled_s(self) -> float | None:
        """Seconds without a step once that is longer than it should be, else None."""
        patience, silence = self.patience_s(), time.monotonic() - self.moved_at
        return silence if patience is not None and silence > patience else None

    def suspects(self, silent: Iterable[int] = ()) -> dict[int, str]:
        """Rank -> what is the matter with it, for the ranks that the others wait for. Empty: nobody stands out.

        `silent`: ranks on machines that do not answer.
        """
        found = dict.fromkeys(sorted(self.stopped), "its process is stopped")
        found.update(dict.fromkeys(sorted(set(silent)), "its machine does not answer"))
        if found:
            return found
        furthest = max(self.places.values(), default=(0, False))
        behind = [rank for rank in range(self.ranks) if self.places.get(rank, (-1, False)) < furthest]
        if behind and len(behind) < self.ranks:
            return {rank: _place(self.places.get(rank)) for rank in behind}
        return {}


def _place(place: tuple[int, bool] | None) -> str:
    if place is None:
        return "it has not begun yet"
    return f"it waits in step {place[0] + 1}" if place[1] else f"it is still at work on step {place[0] + 1}"
