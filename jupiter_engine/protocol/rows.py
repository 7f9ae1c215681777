"""Data rows: what stages write as JSON lines and the workspace keeps with full lineage."""

from __future__ import annotations

from typing import Literal

import msgspec

Split = Literal["train", "vault"]
Kind = Literal["docs", "code"]


class Row(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all rows. `id` is unique within its table and derived from content."""

    id: str


class Document(Row, frozen=True, kw_only=True):
    source: str
    uri: str
    """Where the text came from, e.g. `stdlib:topic/assert` or a file path."""
    title: str
    kind: Kind
    license: str
    bytes: int
    sha256: str
    cluster: str
    """Containment cluster: documents that repeat each other share it and share a split."""
    split: Split
    slice: int
    """Vault slice 0..slices-1; -1 for train documents."""


class Chunk(Row, frozen=True, kw_only=True):
    document: str
    ordinal: int
    title: str
    kind: Kind
    split: Split
    slice: int
    cluster: str
    text: str


class Item(Row, frozen=True, kw_only=True):
    """A multiple-choice item made deterministically from one chunk."""

    pool: Literal["known", "vault"]
    maker: str
    """signature | option | definition | ..."""
    document: str
    chunk: str
    cluster: str
    slice: int
    question: str
    options: tuple[str, ...]
    answer: int
    """Index of the right option."""
    evidence: str
    """The span of the chunk that makes the answer right (verbatim)."""


class Sample(Row, frozen=True, kw_only=True):
    """A synthetic sample as generated, before any filter."""

    template: str
    type: str
    prompt: str
    """What the trained model will be asked (no source chunk in it)."""
    response: str
    chunk: str
    document: str
    generator: str
    """Name of the generator in the registry."""
    generator_sha256: str
    request_sha256: str
    """Hash of the full request (model, prompt tokens, parameters, seed): the resume key."""
    seed: int
    prompt_tokens: int
    new_tokens: int
    finish: Literal["stop", "length"]
    cycle: int


class Verdict(Row, frozen=True, kw_only=True):
    """What the filter chain said of one sample (`id` is the sample's)."""

    accepted: bool
    reason: str
    """First rule that failed, `ok` otherwise."""
    scores: dict[str, float]


class Score(Row, frozen=True, kw_only=True):
    """One model's measured value on one unit of evaluation.

    `id` is `<model sha prefix>:<task>:<unit>`.
    """

    model: str
    model_sha256: str
    task: Literal["vault_bpb", "mcq_known", "mcq_vault", "yield"]
    unit: str
    """Window, item or chunk id."""
    document: str
    cluster: str
    value: float
    """vault_bpb: nats of the window's bytes; mcq: 0/1 correct (mean over rotations); yield: 0/1 usable."""
    weight: float
    """vault_bpb: scored bytes of the window; 1.0 otherwise."""
    answer: str = ""
    """What the model chose or wrote, for reading side by side."""


TABLES: dict[str, type[Row]] = {
    "documents": Document,
    "chunks": Chunk,
    "items": Item,
    "samples": Sample,
    "verdicts": Verdict,
    "scores": Score,
}
