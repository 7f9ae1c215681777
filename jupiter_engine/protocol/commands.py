"""Commands: what a person (or --auto) asks of the engine. Each is answered once, in order."""

from __future__ import annotations

from typing import Literal

import msgspec

Mode = Literal["auto", "interactive"]


class Command(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="command"):
    by: str = "user"
    """Who asked: user, auto, or a name."""


class StartCycles(Command, frozen=True, kw_only=True, tag="start"):
    """Run `cycles` cycles of a domain; an unfinished cycle of the domain is continued first and counts as one."""

    domain: str
    cycles: int = 1
    mode: Mode = "interactive"
    """auto: filter and gate decide; interactive: the review (if the domain asks for one) and the promotion wait."""


class Pause(Command, frozen=True, kw_only=True, tag="pause"):
    cycle: str


class Resume(Command, frozen=True, kw_only=True, tag="resume"):
    """Continue a paused, stopped or failed cycle at the stage where it stands."""

    cycle: str


class Stop(Command, frozen=True, kw_only=True, tag="stop"):
    """End the cycle at the next safe point; what it made stays, and Resume can take it up again."""

    cycle: str


class Review(Command, frozen=True, kw_only=True, tag="review"):
    sample: str
    verdict: Literal["accept", "reject", "undecided"]
    """undecided takes an earlier verdict back."""
    reason: str = ""


class FinishReview(Command, frozen=True, kw_only=True, tag="finish_review"):
    """The waiting review is done: samples without a verdict keep what the filters said."""

    cycle: str


class Decide(Command, frozen=True, kw_only=True, tag="decide"):
    cycle: str
    answer: Literal["promote", "keep"]
    override: bool = False
    """Must be true to promote against the gate's verdict."""


class Rollback(Command, frozen=True, kw_only=True, tag="rollback"):
    domain: str
    to: str | None = None
    """Generator to go back to; None: the one that was active before."""


class ShutDown(Command, frozen=True, kw_only=True, tag="shut_down"):
    """End the engine process at the next safe point; running stages are halted and continue later."""


AnyCommand = StartCycles | Pause | Resume | Stop | Review | FinishReview | Decide | Rollback | ShutDown
decoder = msgspec.json.Decoder(AnyCommand)
