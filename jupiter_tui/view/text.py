"""Lines as spans of (text, style name): what every page is made of before a widget draws it.

Style names are meanings (`good`, `bad`, `warn`, `dim`, `accent`, `title`, `cursor`), never colours;
a state always also carries one of the MARKS, so nothing is said by colour alone.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterable, Sequence
from typing import Final

from jupiter_engine.units import plain_text

Span = tuple[str, str]
Line = list[Span]

MARKS: Final = {"ok": ("ok", "good"), "run": ("..", "accent"), "bad": ("!!", "bad"), "none": ("--", "dim")}

_ASCII: Final = str.maketrans("▸·…●◆→←↑↓×≥≤Δ–—’“”±✓", '>|~**><^vx><d--\'""+v')
# Text that flips its own direction or hides itself could make a screen lie without any escape sequence.
_HIDDEN: Final = dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0xFEFF))


def clean(text: str) -> str:
    """Text from a file, a model or a process, safe to draw: no control sequences, no direction overrides."""
    return plain_text(text.replace("\r\n", "\n").expandtabs(4)).translate(_HIDDEN)


def one_line(text: str) -> str:
    return " ".join(clean(text).split())


def _ascii_cell(character: str) -> str:
    code = ord(character)
    if 0x2500 <= code <= 0x257F:
        return {"─": "-", "━": "-", "═": "-", "│": "|", "┃": "|", "║": "|"}.get(character, "+")
    if 0x2580 <= code <= 0x259F:
        return "." if character == "░" else "#"
    if 0x2800 <= code <= 0x28FF:
        # Few dots are the edge of a curve, or the faint one behind it.
        dots = (code & 0xFF).bit_count()
        return " " if dots == 0 else "." if dots < 3 else "*"
    return character


def to_ascii(text: str) -> str:
    """Glyphs of the console transliterated one for one, so every width stays; other letters are data and stay."""
    if text.isascii():
        return text
    return "".join(map(_ascii_cell, text.translate(_ASCII)))


def span(text: object, style: str = "") -> Span:
    return (str(text), style)


def plain(line: Iterable[Span]) -> str:
    return "".join(text for text, _ in line)


def plain_lines(lines: Iterable[Iterable[Span]]) -> str:
    return "\n".join(plain(line) for line in lines)


def mark(name: str) -> Span:
    """One of MARKS as a span."""
    return MARKS[name]


def cut(text: str, width: int) -> str:
    """At most `width` characters; a cut is shown."""
    if len(text) <= width:
        return text
    return text[: max(0, width - 1)] + "…" if width > 0 else ""


def cut_line(line: Sequence[Span], width: int) -> Line:
    """The line cut to `width` characters, styles kept."""
    if sum(len(text) for text, _ in line) <= width:
        return list(line)
    result: Line = []
    room = width
    for text, style in line:
        if len(text) >= room:
            result.append((cut(text + "  ", room), style))
            break
        result.append((text, style))
        room -= len(text)
    return result


def pad(text: object, width: int, *, right: bool = False) -> str:
    """Exactly `width` characters."""
    shown = cut(str(text), width)
    return shown.rjust(width) if right else shown.ljust(width)


def wrap(text: str, width: int, style: str = "", *, indent: str = "") -> list[Line]:
    """Paragraphs wrapped to `width`; empty lines and indentation of code are kept."""
    lines: list[Line] = []
    for paragraph in clean(text).split("\n"):
        lead = paragraph[: len(paragraph) - len(paragraph.lstrip(" "))][: max(0, width // 2)]
        pieces = textwrap.wrap(
            paragraph,
            max(8, width),
            initial_indent=indent,
            subsequent_indent=indent + lead,
            replace_whitespace=False,
            drop_whitespace=True,
        )
        lines += [[(piece, style)] for piece in pieces] or [[("", "")]]
    return lines


def rule(title: str, width: int) -> Line:
    """A heading: `── title ─────`."""
    head = f"── {title} "
    return [(head + "─" * max(0, width - len(head)), "title")]


def bar(share: float, width: int) -> str:
    """`████░░░░` of exactly `width` characters."""
    full = round(max(0.0, min(1.0, share)) * width)
    return "█" * full + "░" * (width - full)


def pairs(items: Iterable[tuple[str, str]], *, label_width: int = 0) -> list[Line]:
    """`label  value` lines, labels dim and aligned."""
    rows = list(items)
    label_width = label_width or max((len(label) for label, _ in rows), default=0)
    return [[(pad(label, label_width), "dim"), ("  ", ""), (value, "")] for label, value in rows]


def clock(at: float | None) -> str:
    """Local HH:MM:SS."""
    return "-" if at is None else time.strftime("%H:%M:%S", time.localtime(at))


def day_and_clock(at: float | None) -> str:
    return "-" if at is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def number(value: float | None, digits: int = 4) -> str:
    """A measured number with `digits` significant digits; `-` for None or not a number."""
    if value is None or value != value:
        return "-"
    if value == int(value) and abs(value) < 10**digits:
        return str(int(value))
    # No exponents where people read counts: 5,063 rather than 5.06e+03.
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.{digits}g}"
