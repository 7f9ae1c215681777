"""A document before it is split, and what a collector hands back."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from jupiter_engine.files import sha256_text
from jupiter_engine.protocol.rows import Kind


@dataclass(frozen=True, kw_only=True)
class RawDocument:
    """One text with its origin."""

    source: str
    uri: str
    title: str
    kind: Kind
    license: str
    text: str
    family: str = ""
    """Documents of one non-empty family always share a cluster (a module's docstrings and its source)."""

    @property
    def size_bytes(self) -> int:
        return len(self.text.encode("utf-8"))

    @property
    def sha256(self) -> str:
        return sha256_text(self.text)


@dataclass(kw_only=True)
class Collected:
    """The documents of one source in a deterministic order, and why others were left out."""

    documents: list[RawDocument] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    """Reason -> number of files or documents."""
    examples: dict[str, str] = field(default_factory=dict)
    """Reason -> the first file or document left out for it."""

    def skip(self, reason: str, name: str) -> None:
        self.skipped[reason] += 1
        self.examples.setdefault(reason, name)
