"""The planner's answer in a few lines, for the sheet that starts cycles."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from jupiter_engine.units import bytes_text, count_text, duration_text
from jupiter_tui.view.text import Line, one_line

if TYPE_CHECKING:
    from jupiter_engine.api import Outlook

SOURCES: Final = {
    "measured": "measured",
    "scaled": "converted from a measurement",
    "table": "by table",
    "unknown": "not known",
    "mixed": "partly measured",
}
_MOST_NODES: Final = 4
_WIDE: Final = 11


def outlook_lines(answer: Outlook, fix: str) -> list[Line]:
    """Fits or not and what would, memory of each machine, speed and its source, time, energy, loss.

    `fix`: what makes it fit, where it does not.
    """
    lines: list[Line] = [_verdict(answer)]
    if answer.fits is False and fix:
        lines.append([(f"           {one_line(fix)}", "warn")])
    for node in answer.nodes[:_MOST_NODES]:
        mark, style = {True: ("ok", "good"), False: ("!!", "bad"), None: ("--", "dim")}[node.fits]
        allowed = bytes_text(node.allowed) if node.allowed is not None else "unknown"
        share = f", adds {node.adds:.0%}" if len(answer.nodes) > 1 else ""
        lines.append(
            [
                ("memory".ljust(_WIDE), "dim"),
                (mark, style),
                (f" {one_line(node.node)[:24]}: {bytes_text(node.needed)} of {allowed}{share}", ""),
            ]
        )
    if len(answer.nodes) > _MOST_NODES:
        lines.append([("".ljust(_WIDE), ""), (f"and {len(answer.nodes) - _MOST_NODES} more machines", "dim")])
    speed = _range(answer.tokens_per_s_low, answer.tokens_per_s_high, count_text)
    lines.append([("speed".ljust(_WIDE), "dim"), (f"{speed} tokens/s, {SOURCES[answer.source]}", "")])
    if answer.seconds_low is not None and answer.seconds_high is not None:
        time = _range(answer.seconds_low, answer.seconds_high, duration_text)
        energy = ""
        if answer.energy_kwh_low is not None and answer.energy_kwh_high is not None:
            energy = f", about {_range(answer.energy_kwh_low, answer.energy_kwh_high, lambda x: f'{x:.2g}')} kWh"
        lines.append([("training".ljust(_WIDE), "dim"), (f"{time}{energy}", "")])
    if answer.islands > 1:
        text = f"{answer.penalty:+.1%} expected, for {answer.islands} islands"
        lines.append([("loss".ljust(_WIDE), "dim"), (text, "")])
    return lines


def _verdict(answer: Outlook) -> Line:
    what = f"{count_text(answer.parameters)} parameters, {count_text(answer.tokens)} tokens"
    if answer.fits is False:
        return [("plan".ljust(_WIDE), "dim"), ("!! does not fit", "bad"), (f"  {what}", "")]
    if answer.fits is None:
        return [("plan".ljust(_WIDE), "dim"), ("-- fits as far as is known", "warn"), (f"  {what}", "")]
    return [("plan".ljust(_WIDE), "dim"), ("ok fits", "good"), (f"  {what}", "")]


def _range(low: float, high: float, text: Callable[[float], str]) -> str:
    if high <= 0:
        return "unknown"
    first, last = text(low), text(high)
    return first if first == last else f"{first} to {last}"
