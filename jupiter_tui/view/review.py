"""One sample as lines: prompt, answer, source and everything that was decided about it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from jupiter_tui.view.text import Line, cut_line, number, one_line, rule, wrap

if TYPE_CHECKING:
    from jupiter_engine.api import SampleView
    from jupiter_engine.protocol.rows import Chunk

STATUSES: Final = ("unreviewed", "new", "accepted", "rejected", "reviewed")
REASONS: Final = (
    "wrong",
    "not supported by the source",
    "incomplete",
    "unclear",
    "repetitive",
    "off topic",
    "badly formatted",
    "unsafe",
)


def status_words(sample: SampleView) -> Line:
    """Who decided what: `ok accepted by you`, `!! rejected by the filters: copy`."""
    if sample.review:
        style = "good" if sample.review == "accept" else "bad"
        sign = "ok accepted" if sample.review == "accept" else "!! rejected"
        why = f": {one_line(sample.review_reason)}" if sample.review_reason else ""
        return [(f"{sign} by {one_line(sample.reviewer) or 'you'}{why}", style)]
    if sample.filtered is None:
        return [("-- not filtered yet", "dim")]
    if sample.filtered:
        return [("ok accepted by the filters", "good")]
    return [(f"!! rejected by the filters: {one_line(sample.reason)}", "bad")]


def score_line(scores: dict[str, float], width: int) -> Line:
    text = "  ".join(f"{one_line(name)} {number(value, 3)}" for name, value in scores.items())
    return cut_line([("scores  ", "dim"), (text or "none yet", "" if text else "dim")], width)


def sample_lines(sample: SampleView, width: int) -> list[Line]:
    """Status, facts, prompt and response."""
    row = sample.sample
    facts = f"{row.id[:12]}  template {row.template} ({row.type})  by {row.generator}"
    facts += f"  {row.new_tokens} tokens, {row.finish}"
    lines: list[Line] = [
        status_words(sample),
        cut_line([(one_line(facts), "dim")], width),
        score_line(sample.scores, width),
        [],
    ]
    lines += [rule("Prompt", width), *wrap(row.prompt, width, "bold"), []]
    lines += [rule("Response", width), *wrap(row.response, width)]
    return lines


def chunk_lines(chunk: Chunk | None, width: int) -> list[Line]:
    """The source that the generator was shown."""
    if chunk is None:
        return [rule("Source", width), [("the source chunk is not in the workspace", "dim")]]
    title = cut_line([(f"{one_line(chunk.title)}  {chunk.kind}, {chunk.split}, part {chunk.ordinal}", "dim")], width)
    return [rule("Source", width), title, *wrap(chunk.text, width)]


def position_line(
    index: int, total: int, *, counts: dict[str, int], status: str | None, search: str, width: int, waits: bool
) -> Line:
    """`sample 3 of 96   accepted 40  rejected 12 ...   filter: status rejected, text "x"`."""
    parts = [status] if status else []
    parts += [f'text "{one_line(search)}"'] if search else []
    line: Line = [(f" sample {index + 1 if total else 0} of {total}", "bold")]
    if waits:
        line += [("  ** F finishes", "warn")]
    shown = {name: count for name, count in counts.items() if count or name != "new"}
    line += [("  " + "  ".join(f"{name} {count}" for name, count in shown.items()), "")]
    line += [(f"  filter: {', '.join(parts)}" if parts else "  all samples", "accent" if parts else "dim")]
    return cut_line(line, width)
