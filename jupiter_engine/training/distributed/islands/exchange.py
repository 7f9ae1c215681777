"""The folder between hub and islands: what lies where, and how it gets there whole.

rounds/00000001/base.safetensors                  the weights that round 1 starts from
rounds/00000001/plan.json                         written after the base: who works on what, and how long
rounds/00000001/up/<island>.<attempt>.safetensors  base - theta; written as .part, synced, renamed
rounds/00000001/up/<island>.<attempt>.ok.json      written after it: what it is; without it there is no contribution
here/<island>.json                                a sign of life, replaced every few seconds
end.json                                          the hub has ended: islands come to rest
fence                                             the highest fence of a hub that was here (carrier.py)

On islands of other machines the same tree lies there, with what concerns them; a carrier copies between the two.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TypeVar

import msgspec

from jupiter_engine.checkpoints.tensors import FileRecord
from jupiter_engine.files import sync_folder, write_json
from jupiter_engine.training.distributed.islands.ledger import Offer, Ranges

BASE, PLAN, END, FENCE = "base.safetensors", "plan.json", "end.json", "fence"
_ROUND = re.compile(r"\d{8}")
_OK = re.compile(r"([a-z0-9][a-z0-9_-]{0,62})\.(\d{1,6})\.ok\.json")
_T = TypeVar("_T", bound=msgspec.Struct)


class PlannedLease(msgspec.Struct, frozen=True, kw_only=True):
    lease: int
    fence: int
    blocks: Ranges
    share: float
    """Expected share of the round's tokens that this island trains: between two merges the schedule moves on by its
    own tokens / share, as if the others had kept pace."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    round: int
    fence: int
    """Of the hub that wrote it; one with a lower fence than was seen before is not followed."""
    base: FileRecord
    deadline_s: float
    """An island's round ends at the first step boundary so long after it has begun."""
    max_steps: int
    """... or after so many steps; 0: no limit."""
    patience_s: float
    """So long an island waits for the next base before it goes on by itself."""
    tokens_done: int
    """Counted targets merged before this round."""
    tokens_total: int
    leases: dict[str, PlannedLease]
    """By island; one that is not named waits."""
    refused: dict[str, int] = {}
    """Island -> highest attempt of this round that could not be taken; it may be offered again."""


class Up(msgspec.Struct, frozen=True, kw_only=True):
    """*.ok.json: an offer and what is told about it."""

    offer: Offer
    steps: int
    loss_sum: float
    """Cross-entropy in nats over the offer's tokens."""
    grad_norm: float
    """Mean over the steps."""
    learning_rate: float
    """Of the last step."""
    seconds: float
    """From the round's beginning on the island to the end of its last step."""
    versions: dict[str, str]


class Here(msgspec.Struct, frozen=True, kw_only=True):
    island: str
    beat: int
    """Changes with every sign; nobody compares clocks."""
    round: int
    used: int
    """Blocks of the lease that were trained so far."""
    waiting: bool
    """It has nothing to do until the hub says so."""


class End(msgspec.Struct, frozen=True, kw_only=True):
    reason: str
    fence: int
    """Of the hub that has ended; one with a lower fence than a plan's was replaced, and its end is not heard."""


def round_folder(exchange: Path, number: int) -> Path:
    return exchange / "rounds" / f"{number:08d}"


def up_folder(exchange: Path, number: int) -> Path:
    return round_folder(exchange, number) / "up"


def contribution_path(exchange: Path, number: int, island: str, attempt: int) -> Path:
    return up_folder(exchange, number) / f"{island}.{attempt}.safetensors"


def ok_path(exchange: Path, number: int, island: str, attempt: int) -> Path:
    return up_folder(exchange, number) / f"{island}.{attempt}.ok.json"


def here_path(exchange: Path, island: str) -> Path:
    return exchange / "here" / f"{island}.json"


def make_folders(exchange: Path) -> None:
    for name in ("rounds", "here"):
        (exchange / name).mkdir(parents=True, exist_ok=True)


def rounds(exchange: Path) -> list[int]:
    """Rounds that have a folder, oldest first."""
    folder = exchange / "rounds"
    return sorted(int(path.name) for path in folder.iterdir() if _ROUND.fullmatch(path.name)) if folder.exists() else []


def read(path: Path, kind: type[_T]) -> _T | None:
    """A message, or None if there is none or it cannot be understood (it was written whole: then by somebody else)."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def newest_plan(exchange: Path) -> Plan | None:
    """The plan of the newest round whose base is there in full, of the hub with the highest fence: one that took over
    an older copy of the state goes on from an older round than islands may have seen."""
    found: Plan | None = None
    for number in reversed(rounds(exchange)):
        folder = round_folder(exchange, number)
        plan = read(folder / PLAN, Plan)
        if plan is None or plan.round != number or (found is not None and plan.fence <= found.fence):
            continue
        try:
            if (folder / BASE).stat().st_size == plan.base.bytes:
                found = plan
        except FileNotFoundError:
            continue
    return found


def attempts(exchange: Path, number: int) -> dict[tuple[str, int], Path]:
    """(island, attempt) -> its ok.json, of everything that was put up for a round."""
    folder = up_folder(exchange, number)
    found: dict[tuple[str, int], Path] = {}
    for path in folder.iterdir() if folder.exists() else ():
        match = _OK.fullmatch(path.name)
        if match:
            found[match[1], int(match[2])] = path
    return found


def put_up(exchange: Path, up: Up, part: Path) -> None:
    """Publish a contribution whose file lies written and synced at `part`."""
    offer = up.offer
    target = contribution_path(exchange, offer.round, offer.island, offer.attempt)
    part.rename(target)
    sync_folder(target.parent)
    write_json(ok_path(exchange, offer.round, offer.island, offer.attempt), up)


def forget_before(exchange: Path, number: int) -> None:
    """Remove the folders of rounds before `number`."""
    for old in rounds(exchange):
        if old < number:
            shutil.rmtree(round_folder(exchange, old), ignore_errors=True)
