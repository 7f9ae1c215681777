"""All sources of a domain: their fingerprint, and their documents after the domain's own choices."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from jupiter_engine.data.collectors import files, stdlib
from jupiter_engine.data.collectors.document import Collected, RawDocument
from jupiter_engine.errors import CorpusEmpty
from jupiter_engine.files import sha256_text
from jupiter_engine.protocol.specs import SourceSpec

MIN_DOCUMENT_BYTES = 120
_VERSION = "collect-1"
"""Part of every fingerprint: raise it when the same files would give other documents."""

_COLLECTORS: dict[str, Callable[[SourceSpec], Collected]] = {"stdlib": stdlib.collect, "files": files.collect}


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """What one source gave."""

    source: str
    documents: int
    bytes: int
    skipped: dict[str, int]
    examples: dict[str, str]

    def sentence(self) -> str:
        left_out = ", ".join(f"{n} {reason} (e.g. {self.examples[reason]})" for reason, n in self.skipped.items())
        return f"source {self.source}: {self.documents} documents" + (f"; left out: {left_out}" if left_out else "")


def fingerprint(sources: Sequence[SourceSpec], settings: object) -> str:
    """SHA-256 over interpreter version, specs, `settings` (plain JSON) and name, size and mtime of every file.

    Reads no file content: it answers "did anything change?" in a moment.
    """
    digest = hashlib.sha256(f"{_VERSION} {sys.version} {json.dumps(settings, sort_keys=True)}".encode())
    for source in sources:
        digest.update(msgspec.json.encode(source))
        listed = stdlib.modules(stdlib.library_root()) if source.type == "stdlib" else files.find(source)
        for name, path in listed:
            stat = path.stat()
            digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def collect(
    sources: Sequence[SourceSpec],
    *,
    keywords: Sequence[str] = (),
    negative_keywords: Sequence[str] = (),
    seed: int = 0,
    on_source: Callable[[int, int, str], None] | None = None,
) -> tuple[list[RawDocument], list[SourceReport]]:
    """Documents of all sources, in source order; exact repeats, tiny and unwanted ones left out and counted.

    With `keywords`, documents that hold none of them (whole word, any case) are left
    out; so are those that hold a negative one. Where `max_bytes` forces a choice, it
    follows an order drawn from `seed`.
    Raises CorpusEmpty if nothing usable is left, ConfigError for a path that does not exist.
    """
    documents: list[RawDocument] = []
    reports: list[SourceReport] = []
    seen: set[str] = set()
    wanted, unwanted = _matchers(keywords), _matchers(negative_keywords)
    for number, source in enumerate(sources):
        if on_source is not None:
            on_source(number, len(sources), source.id)
        collected = _COLLECTORS[source.type](source)
        kept = _usable(collected, wanted, unwanted, seen)
        if source.max_bytes is not None:
            kept = _within(kept, source.max_bytes, seed, collected)
        documents.extend(kept)
        reports.append(
            SourceReport(
                source=source.id,
                documents=len(kept),
                bytes=sum(d.size_bytes for d in kept),
                skipped=dict(collected.skipped),
                examples=collected.examples,
            )
        )
    if not documents:
        raise _empty(sources, reports)
    return documents, reports


def _matchers(keywords: Sequence[str]) -> list[re.Pattern[str]]:
    return [re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE) for word in keywords]


def _usable(
    collected: Collected, wanted: list[re.Pattern[str]], unwanted: list[re.Pattern[str]], seen: set[str]
) -> list[RawDocument]:
    kept = []
    for document in collected.documents:
        if document.size_bytes < MIN_DOCUMENT_BYTES:
            collected.skip(f"shorter than {MIN_DOCUMENT_BYTES} bytes", document.uri)
        elif wanted and not any(pattern.search(document.text) for pattern in wanted):
            collected.skip("no keyword", document.uri)
        elif any(pattern.search(document.text) for pattern in unwanted):
            collected.skip("negative keyword", document.uri)
        elif (sha256 := document.sha256) in seen:
            collected.skip("same text as an earlier document", document.uri)
        else:
            seen.add(sha256)
            kept.append(document)
    return kept


def _within(documents: list[RawDocument], max_bytes: int, seed: int, collected: Collected) -> list[RawDocument]:
    """Whole families that fit in `max_bytes`, taken in an order drawn from `seed`; the source's order is kept.

    Families (a module's docstrings and its source) go in or out together, so a
    small corpus still shows each subject from both sides.
    """
    families: dict[str, list[RawDocument]] = {}
    for document in documents:
        families.setdefault(document.family or document.uri, []).append(document)
    kept: set[str] = set()
    room = max_bytes
    for name in sorted(families, key=lambda name: sha256_text(f"{seed} {name}")):
        size = sum(d.size_bytes for d in families[name])
        if size <= room:
            room -= size
            kept.update(d.uri for d in families[name])
        else:
            for document in families[name]:
                collected.skip("beyond max_bytes", document.uri)
    return [d for d in documents if d.uri in kept]


def _empty(sources: Sequence[SourceSpec], reports: Sequence[SourceReport]) -> CorpusEmpty:
    named = ", ".join(f"{s.id} ({s.path or s.type})" for s in sources) or "none is configured"
    reasons: Counter[str] = Counter()
    for report in reports:
        reasons.update(report.skipped)
    why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "no file matched"
    fixes = []
    if any(s.type == "files" for s in sources):
        fixes.append("check `path:` and `include:`")
    if reasons["beyond max_bytes"]:
        fixes.append("raise `max_bytes:`")
    if reasons["negative keyword"] or reasons["no keyword"]:
        fixes.append("correct `keywords:` and `negative_keywords:`")
    if not fixes:
        fixes.append("add a source to the domain")
    return CorpusEmpty(f"no usable document in the sources: {named}; {why}", fix=", or ".join(fixes))
