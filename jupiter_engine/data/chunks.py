"""Cutting a document into chunks at headings and definitions, never inside a line.

The chunks of a document, joined in order, are the document again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from jupiter_engine.protocol.rows import Kind
from jupiter_engine.protocol.specs import ChunkSpec

_HEADING = re.compile(r"#{1,6} +(?P<title>\S.*)")
_RULE = re.compile(r"([=\-~^*\"'`#+.:_])\1{2,}\s*$")
_DEFINITION = re.compile(
    r"(?P<indent>[ \t]*)(?:async def|def|class|func|fn|function|interface|struct|impl)\s+(?P<name>\w+)"
)
_DECORATOR = re.compile(r"[ \t]*@\w")
_FENCE = re.compile(r"[ \t]*(```|~~~)")

_NONE, _BLANK, _INNER, _OUTER = range(4)


@dataclass(frozen=True)
class Piece:
    """A run of whole lines of a document."""

    start: int
    """Character offset in the document."""
    text: str
    heading: str
    """The heading or definition that the piece begins with or falls under; '' if there is none."""


def cut(text: str, kind: Kind, spec: ChunkSpec) -> list[Piece]:
    """Pieces of at most `max_bytes` UTF-8 bytes (one line alone may be longer), at least `min_bytes` where possible.

    A cut is made at the last heading or top-level definition that fits, else at the
    last inner one, else at a blank line, else at any line.
    """
    lines = text.splitlines(keepends=True)
    sizes = [len(line.encode("utf-8")) for line in lines]
    strengths, names = _marks(lines, kind)
    pieces: list[Piece] = []
    first = offset = 0
    heading = ""
    while first < len(lines):
        last = _end(first, sizes, strengths, spec)
        within = [name for name in names[first:last] if name]
        body = "".join(lines[first:last])
        pieces.append(Piece(offset, body, names[first] or (heading if not within else within[0]) or heading))
        heading = within[-1] if within else heading
        offset += len(body)
        first = last
    return pieces


def _end(first: int, sizes: list[int], strengths: list[int], spec: ChunkSpec) -> int:
    """Index after the last line of the piece that begins at line `first`."""
    total, last = 0, first
    while last < len(sizes) and (last == first or total + sizes[last] <= spec.max_bytes):
        total += sizes[last]
        last += 1
    if last == len(sizes):
        return last
    rest = sum(sizes[last:])
    best, best_strength = last, -1
    size = total
    for line in range(last, first, -1):  # from the longest piece back: the last boundary of the best strength wins
        if size < spec.min_bytes:
            break
        # Leaving a remainder below min_bytes would make a scrap; an earlier cut of any strength avoids it.
        usable = rest + (total - size) >= spec.min_bytes
        if usable and strengths[line] > best_strength:
            best, best_strength = line, strengths[line]
        size -= sizes[line - 1]
    return best


def _marks(lines: list[str], kind: Kind) -> tuple[list[int], list[str]]:
    """For each line how good a cut before it is, and the name of the heading or definition it opens."""
    strengths = [_NONE] * len(lines)
    names = [""] * len(lines)
    fenced = False
    for number, line in enumerate(lines):
        if kind == "docs" and _FENCE.match(line):
            fenced = not fenced
        elif kind == "docs" and not fenced:
            _mark_prose(lines, number, strengths, names)
        elif kind == "code":
            _mark_code(lines, number, strengths, names)
        if number and not lines[number - 1].strip() and line.strip() and not fenced:
            strengths[number] = max(strengths[number], _BLANK)
    return strengths, names


def _mark_prose(lines: list[str], number: int, strengths: list[int], names: list[str]) -> None:
    line = lines[number]
    if match := _HEADING.match(line):
        strengths[number], names[number] = _OUTER, match["title"].strip()
    elif (
        number + 1 < len(lines)
        and 0 < len(line.strip()) <= len(lines[number + 1].rstrip())
        and not line[0].isspace()
        and _RULE.match(lines[number + 1])
        and not _RULE.match(line)
    ):
        strengths[number], names[number] = _OUTER, line.strip()


def _mark_code(lines: list[str], number: int, strengths: list[int], names: list[str]) -> None:
    match = _DEFINITION.match(lines[number])
    if not match:
        return
    opening = number
    while opening and _DECORATOR.match(lines[opening - 1]):
        opening -= 1
    names[number] = match["name"]
    strengths[opening] = max(strengths[opening], _INNER if match["indent"] else _OUTER)
