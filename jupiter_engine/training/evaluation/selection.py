"""Which units a look measures: a deterministic draw, spread as evenly as possible over independent documents."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import TypeVar

T = TypeVar("T")


def drawn(units: Iterable[T], count: int, seed: str, *, name: Callable[[T], str], group: Callable[[T], str]) -> list[T]:
    """At most `count` units, taken round after round: one from each group before a second from any.

    The order of groups, and of units within a group, is that of sha256(seed, name): another seed gives another draw,
    the same seed the same one whatever the order of `units`. `name` must be unique.
    """
    groups: dict[str, list[T]] = {}
    for unit in units:
        groups.setdefault(group(unit), []).append(unit)
    ordered = [
        sorted(groups[key], key=lambda unit: _rank(seed, name(unit)))
        for key in sorted(groups, key=lambda key: _rank(seed, key))
    ]
    return _rounds(ordered)[:count]


def alternated(strata: Sequence[Sequence[T]], count: int) -> list[T]:
    """At most `count` units, one of each stratum in turn (each already in drawn order) until all are used up."""
    return _rounds(strata)[:count]


def _rounds(lists: Iterable[Sequence[T]]) -> list[T]:
    nothing = object()
    return [
        unit  # type: ignore[misc] # zip_longest's fill value is filtered out on this very line
        for turn in zip_longest(*lists, fillvalue=nothing)
        for unit in turn
        if unit is not nothing
    ]


def _rank(seed: str, name: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogatepass")).digest()
