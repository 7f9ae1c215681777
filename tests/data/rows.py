"""Rows for the data tests, with the fields that a test does not care about filled in."""

from __future__ import annotations

from typing import Any

from jupiter_engine.protocol.rows import Chunk, Item, Sample


def chunk(name: str = "c1", **fields: Any) -> Chunk:
    values: dict[str, Any] = {
        "id": name,
        "document": "d1",
        "ordinal": 0,
        "title": "textwrap.shorten",
        "kind": "docs",
        "split": "train",
        "slice": -1,
        "cluster": "k1",
        "text": "Collapse and truncate the given text to fit in the given width.\n",
    }
    return Chunk(**{**values, **fields})


def sample(name: str = "s1", **fields: Any) -> Sample:
    values: dict[str, Any] = {
        "id": name,
        "template": "qa",
        "type": "qa",
        "prompt": "What does textwrap.shorten do with a long text?",
        "response": "It collapses the whitespace and truncates the given text so that it fits in the given width.",
        "chunk": "c1",
        "document": "d1",
        "generator": "base",
        "generator_sha256": "0" * 64,
        "request_sha256": name * 8,
        "seed": 1,
        "prompt_tokens": 10,
        "new_tokens": 10,
        "finish": "stop",
        "cycle": 1,
    }
    return Sample(**{**values, **fields})


def item(name: str = "i1", **fields: Any) -> Item:
    values: dict[str, Any] = {
        "id": name,
        "pool": "vault",
        "maker": "purpose",
        "document": "d9",
        "chunk": "c9",
        "cluster": "k9",
        "slice": 0,
        "question": "Which function removes the common leading whitespace from every line of a text block",
        "options": ("dedent", "indent", "wrap", "fill"),
        "answer": 0,
        "evidence": "dedent",
    }
    return Item(**{**values, **fields})
