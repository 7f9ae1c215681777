"""Which template is asked on which chunk: every sample index has one fixed answer."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from jupiter_engine.data.words import words
from jupiter_engine.errors import ConfigError, NotEnoughData
from jupiter_engine.files import sha256_text
from jupiter_engine.protocol.rows import Chunk
from jupiter_engine.protocol.specs import TemplateSpec


@dataclass(frozen=True)
class Draw:
    """One sample to ask for."""

    index: int
    template: TemplateSpec
    chunk: Chunk
    topic: str
    seed: int
    """Sampling seed of this request."""


def plan(templates: Sequence[TemplateSpec], chunks: Sequence[Chunk], *, samples: int, seed: int) -> list[Draw]:
    """`samples` draws: templates in proportion to their weights at every point, chunks spread over documents.

    Only train chunks are drawn. A template meets a chunk a second time only after it
    has met all of them; each template starts elsewhere in the order, so that few
    samples still cover many documents. Prose types prefer docs chunks, where there are any.
    Raises NotEnoughData without a train chunk, ConfigError without a template of positive weight.
    """
    train = [chunk for chunk in chunks if chunk.split == "train" and chunk.text.strip()]
    if not train:
        raise NotEnoughData("there is no train chunk to generate from", fix="add documents to the domain")
    active = [template for template in templates if template.weight > 0]
    if not active:
        raise ConfigError("no template has a weight above 0", fix="give generation.templates a positive weight")
    order = spread(train, seed)
    prose = [chunk for chunk in order if chunk.kind == "docs"] or order
    used = [0] * len(active)
    draws = []
    for index in range(samples):
        number = _next(active, used)
        template = active[number]
        k, used[number] = used[number], used[number] + 1
        pool = prose if template.type != "code" else (prose or order)
        topic = template.topics[k % len(template.topics)] if template.topics else ""
        if topic:
            chunk = _about(topic, pool)[(k // len(template.topics)) % len(pool)]
        else:
            chunk = pool[(number * len(pool) // len(active) + k) % len(pool)]
        request_seed = int(sha256_text(f"sample {seed} {index}")[:15], 16)
        draws.append(Draw(index, template, chunk, topic, request_seed))
    return draws


def spread(chunks: Sequence[Chunk], seed: int) -> list[Chunk]:
    """All chunks, in rounds over the documents: one chunk of each document before a second of any."""
    by_document: dict[str, list[Chunk]] = defaultdict(list)
    for chunk in chunks:
        by_document[chunk.document].append(chunk)
    rng = random.Random(seed)
    names = sorted(by_document)
    rng.shuffle(names)
    for name in names:
        rng.shuffle(by_document[name])
    longest = max(len(group) for group in by_document.values())
    return [by_document[name][n] for n in range(longest) for name in names if n < len(by_document[name])]


def _next(templates: Sequence[TemplateSpec], used: Sequence[int]) -> int:
    """The template that lies furthest behind its share."""
    return min(range(len(templates)), key=lambda n: ((used[n] + 0.5) / templates[n].weight, n))


def _about(topic: str, pool: Sequence[Chunk]) -> list[Chunk]:
    """The pool, chunks that hold most of the topic's words first."""
    wanted = set(words(topic))
    return sorted(pool, key=lambda chunk: -len(wanted & set(words(f"{chunk.title} {chunk.text}"))))
