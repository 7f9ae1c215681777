"""Byte-identical windows of vault text: what bits per byte are measured on.

A window is a stretch of a vault document; `context_bytes` before it are shown to the model and not scored. Both are
cut in bytes (at line ends where possible, always between UTF-8 characters), never in tokens, so that two models with
different tokenizers are measured on exactly the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jupiter_engine.protocol.rows import Chunk, Kind
from jupiter_engine.protocol.specs import EvaluationSpec
from jupiter_engine.training.evaluation.selection import alternated, drawn


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    id: str
    """`<document>:<byte offset of the scored part>`"""
    document: str
    cluster: str
    kind: Kind
    context: str
    """Shown, not scored."""
    text: str
    """Scored."""

    @property
    def scored_bytes(self) -> int:
        return len(self.text.encode("utf-8"))


def vault_windows(chunks: Iterable[Chunk], spec: EvaluationSpec, slice_number: int, seed: int) -> list[Window]:
    """At most `spec.windows` windows of the vault slice, the same for every model.

    Kinds (docs, code) take turns, and within a kind clusters take turns, so the windows come from as many independent
    documents as there are. Scored parts never overlap. Deterministic in (chunks, spec, slice, seed).
    """
    found: dict[str, list[Window]] = {}
    for run in _runs(chunk for chunk in chunks if chunk.split == "vault" and chunk.slice == slice_number):
        found.setdefault(run[0].kind, []).extend(_windows_of(run, spec.window_bytes, spec.context_bytes))
    strata = [
        drawn(
            found[kind],
            spec.windows,
            f"windows {slice_number} {seed}",
            name=lambda window: window.id,
            group=lambda window: window.cluster,
        )
        for kind in sorted(found)
    ]
    return alternated(strata, spec.windows)


def _runs(chunks: Iterable[Chunk]) -> list[list[Chunk]]:
    """Chunks of one document with unbroken ordinals: joined in order they are a stretch of the document again."""
    runs: list[list[Chunk]] = []
    for chunk in sorted(chunks, key=lambda chunk: (chunk.document, chunk.ordinal)):
        last = runs[-1][-1] if runs else None
        if last is not None and (last.document, last.ordinal + 1) == (chunk.document, chunk.ordinal):
            runs[-1].append(chunk)
        else:
            runs.append([chunk])
    return runs


def _windows_of(run: list[Chunk], window_bytes: int, context_bytes: int) -> list[Window]:
    """Cut one stretch: context, window, then further windows each of which has the bytes before it as context.

    A short stretch shows a quarter of itself and scores the rest. Scraps below a quarter of a window are not scored:
    so few bytes say more about where they were cut than about the model.
    """
    data = "".join(chunk.text for chunk in run).encode("utf-8")
    first = run[0]
    windows: list[Window] = []
    start = _cut(data, 0, min(context_bytes, len(data) // 4))
    while len(data) - start >= max(1, window_bytes // 4):
        end = _cut(data, start, min(start + window_bytes, len(data)))
        shown = _cut(data, 0, max(0, start - context_bytes), prefer_lines=False)
        windows.append(
            Window(
                id=f"{first.document}:{first.ordinal}+{start}",
                document=first.document,
                cluster=first.cluster,
                kind=first.kind,
                context=data[shown:start].decode("utf-8"),
                text=data[start:end].decode("utf-8"),
            )
        )
        start = end
    return windows


def _cut(data: bytes, start: int, end: int, *, prefer_lines: bool = True) -> int:
    """The last good place to cut at or before `end`: after a line end if that keeps half of start..end, else between
    two characters. Never before `start`, and past it by at least one character when `end` is.
    """
    if end >= len(data):
        return len(data)
    if prefer_lines:
        line = data.rfind(b"\n", start, end) + 1
        if line - start >= (end - start) / 2 and line > start:
            return line
    place = end
    while place > start and data[place] & 0xC0 == 0x80:  # a continuation byte: in the middle of a character
        place -= 1
    if place == start and end > start:
        place = end
        while place < len(data) and data[place] & 0xC0 == 0x80:
            place += 1
    return place
