"""Fitness as a generator: of the samples a model writes about passages it never saw, how many pass the filters?

Each drawn vault chunk is given one of the domain's templates; the model writes a sample exactly as in the generate
stage (same prompt building, same sampling), and the rules of the filter stage that concern one sample alone say
whether it is usable. Rules that compare samples with each other or with the vault have no meaning here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from jupiter_engine.protocol.rows import Chunk
from jupiter_engine.protocol.specs import GenerationSpec, TemplateSpec
from jupiter_engine.training.evaluation.selection import alternated, drawn

FITNESS_VERSION = 1
"""Counts every change of how passages, templates and seeds are paired, or of the rules that judge a sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """One sample to be written: which passage, asked in which way, with which seed."""

    chunk: Chunk
    template: TemplateSpec
    topic: str
    seed: int


def assignments(
    chunks: Sequence[Chunk], generation: GenerationSpec, count: int, slice_number: int, seed: int
) -> list[Assignment]:
    """At most `count` passages of the vault slice with templates in proportion to their weights.

    Kinds take turns and clusters take turns, as for windows. Templates follow a low-discrepancy walk through their
    cumulative weights, so even a few passages hold the mix. Both models get the same list with the same seeds.
    """
    draw = f"fitness {slice_number} {seed}"
    vault = [chunk for chunk in chunks if chunk.split == "vault" and chunk.slice == slice_number]
    strata = [
        drawn(
            [chunk for chunk in vault if chunk.kind == kind],
            count,
            draw,
            name=lambda chunk: chunk.id,
            group=lambda chunk: chunk.cluster,
        )
        for kind in sorted({chunk.kind for chunk in vault})
    ]
    usable = [template for template in generation.templates if template.weight > 0]
    if not usable:
        return []
    passages = alternated(strata, count)
    walk = _walk([template.weight for template in usable], len(passages))
    return [
        _assignment(chunk, usable[index], f"{draw} {chunk.id}") for chunk, index in zip(passages, walk, strict=True)
    ]


def _assignment(chunk: Chunk, template: TemplateSpec, name: str) -> Assignment:
    number = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:7], "big")
    topic = template.topics[number % len(template.topics)] if template.topics else ""
    return Assignment(chunk=chunk, template=template, topic=topic, seed=number % 2**53)


def _walk(weights: Sequence[float], count: int) -> list[int]:
    """`count` indices whose shares follow `weights` at every length (golden-ratio steps through [0, 1))."""
    total = sum(weights)
    picked: list[int] = []
    for step in range(count):
        place = (0.5 + step * 0.618033988749895) % 1.0 * total
        index = 0
        while index + 1 < len(weights) and place >= weights[index]:
            place -= weights[index]
            index += 1
        picked.append(index)
    return picked
