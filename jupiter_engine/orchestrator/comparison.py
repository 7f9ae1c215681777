"""Two training runs side by side: what was set otherwise, and what came of it. Pure: metrics in, numbers out."""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from jupiter_engine.protocol.facts import Metric

POINTS = 10
"""Places along the tokens that both runs share at which the losses are put side by side."""
_WINDOW_SHARE = 0.05
"""The loss at a place is the mean over this share of the shared tokens around it: one step's loss is mostly noise."""
_MISSING = "-"


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """One run in numbers; losses in nats a counted token."""

    steps: int
    tokens: int
    seconds: float
    """Sum of the steps' wall times."""
    tokens_per_s: float
    """Median over the steps, input tokens."""
    first_loss: float
    last_loss: float
    """Mean over the last twentieth of the steps (at least one)."""
    held_out_loss: float | None
    """The lowest that was measured."""
    held_out_step: int | None
    peak_bytes: int | None
    """Of the rank that held most."""
    mfu: float | None
    """Median of the steps for which it is known."""
    waiting_share: float | None
    """Share of the ranks' time that was spent on data, communication and slower ranks."""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Both losses after the same number of trained tokens."""

    tokens: int
    a: float
    b: float


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    a: Summary
    b: Summary
    differing: dict[str, tuple[str, str]]
    """Setting -> its value in either run, where they differ."""
    curve: tuple[Place, ...]
    """Empty if the runs share no tokens."""


def summarise(metrics: Sequence[Metric]) -> Summary:
    """Numbers of a run with at least one step."""
    tail = metrics[-max(1, len(metrics) // 20) :]
    measured = [(m.held_out_loss, m.step) for m in metrics if m.held_out_loss is not None]
    best = min(measured) if measured else None
    peaks = [max(m.peak_bytes) for m in metrics if m.peak_bytes]
    used = [m.mfu for m in metrics if m.mfu is not None]
    return Summary(
        steps=metrics[-1].step,
        tokens=metrics[-1].tokens,
        seconds=sum(m.seconds for m in metrics),
        tokens_per_s=statistics.median(m.tokens_per_s for m in metrics),
        first_loss=metrics[0].loss,
        last_loss=statistics.fmean(m.loss for m in tail),
        held_out_loss=best[0] if best else None,
        held_out_step=best[1] if best else None,
        peak_bytes=max(peaks) if peaks else None,
        mfu=statistics.median(used) if used else None,
        waiting_share=_waiting(metrics),
    )


def _waiting(metrics: Sequence[Metric]) -> float | None:
    lost = sum(sum(part) for m in metrics for part in (m.data_seconds, m.communication_seconds, m.idle_seconds))
    total = lost + sum(sum(m.rank_seconds) for m in metrics)
    return lost / total if total and any(m.data_seconds for m in metrics) else None


def compare(
    a: Sequence[Metric], b: Sequence[Metric], settings_a: dict[str, Any], settings_b: dict[str, Any]
) -> Comparison:
    """Put two runs, each with at least one step, side by side; losses are compared at equal trained tokens."""
    shared = min(a[-1].tokens, b[-1].tokens)
    first = max(a[0].tokens, b[0].tokens)
    places = sorted({first + (shared - first) * i // (POINTS - 1) for i in range(POINTS)}) if shared >= first else []
    window = max(1, int(shared * _WINDOW_SHARE))
    return Comparison(
        a=summarise(a),
        b=summarise(b),
        differing=differing(settings_a, settings_b),
        curve=tuple(Place(tokens=at, a=loss_at(a, at, window), b=loss_at(b, at, window)) for at in places),
    )


def loss_at(metrics: Sequence[Metric], tokens: int, window: int) -> float:
    """Mean loss of the steps that ended within `window` / 2 of `tokens`; of the nearest one if there is none."""
    ends = [m.tokens for m in metrics]
    low, high = bisect.bisect_left(ends, tokens - window // 2), bisect.bisect_right(ends, tokens + window // 2)
    if low == high:
        low = min(range(len(ends)), key=lambda i: abs(ends[i] - tokens))
        high = low + 1
    return statistics.fmean(m.loss for m in metrics[low:high])


def differing(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Leaves of two settings trees that are not the same, by their dotted path."""
    left, right = dict(_leaves(a)), dict(_leaves(b))
    return {
        key: (left.get(key, _MISSING), right.get(key, _MISSING))
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    }


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(inner, dict) for inner in value):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}[{index}]")
    else:
        yield path, msgspec.json.encode(value).decode()
