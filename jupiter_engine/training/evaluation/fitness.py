"""Fitness as a generator: of the samples a model writes about passages it never saw, how many pass the filters?

Each drawn vault chunk is given one of the domain's templates; the model writes a sample exactly as in the generate
stage (same prompt building, same sampling), and the rules of the filter stage that concern one sample alone say
whether it is usable. Rules that compare samples with each other or with the vault have no meaning here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from jupiter_engine.data.filters.chain import usable
from jupiter_engine.data.generators import wordings
from jupiter_engine.protocol.rows import Chunk
from jupiter_engine.protocol.specs import FilterSpec, GenerationSpec, TemplateSpec
from jupiter_engine.training.evaluation.scoring import Codec
from jupiter_engine.training.evaluation.selection import drawn

FITNESS_VERSION = 1
"""Counts every change of how a sample is parsed and judged (a changed request changes the cache key by itself)."""


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

    Documentation is preferred to code where there is any, as in the generate stage; clusters take turns. Templates
    follow a low-discrepancy walk through their cumulative weights, so even a few passages hold the mix. Both models
    get the same list with the same seeds.
    """
    draw = f"fitness {slice_number} {seed}"
    vault = [chunk for chunk in chunks if chunk.split == "vault" and chunk.slice == slice_number and chunk.text.strip()]
    pool = [chunk for chunk in vault if chunk.kind == "docs"] or vault
    passages = drawn(pool, count, draw, name=lambda chunk: chunk.id, group=lambda chunk: chunk.cluster)
    templates = [template for template in generation.templates if template.weight > 0]
    if not templates:
        return []
    walk = _walk([template.weight for template in templates], len(passages))
    return [
        _assignment(chunk, templates[index], f"{draw} {chunk.id}") for chunk, index in zip(passages, walk, strict=True)
    ]


def prompt(passage: Assignment, generation: GenerationSpec, codec: Codec) -> list[int]:
    """Token ids that the model continues: the chat with its answer already opened, as in the generate stage."""
    ask = _ask(passage, generation)
    ids = codec.chat_prompt(list(ask.messages))
    return [*ids, *codec.encode(ask.opening)] if ask.opening else ids


def judge(
    passage: Assignment, text: str, *, finished: bool, generation: GenerationSpec, rules: FilterSpec
) -> tuple[float, str]:
    """(1.0 or 0.0, what was written with the verdict) for the model's continuation `text`.

    `finished`: the model ended by itself, it was not cut off at the token limit.
    """
    whole = _ask(passage, generation).opening + text
    parsed = wordings.parse(passage.template, passage.chunk, whole, finished=finished, topic=passage.topic)
    good, reason, _ = usable(passage.template.type, parsed.prompt, parsed.response, passage.chunk.text, rules)
    return float(good), f"[{'usable' if good else reason}] {parsed.prompt}\n{parsed.response}".rstrip()


def request_text(passage: Assignment, generation: GenerationSpec) -> str:
    """All text that the model is shown, with the roles: part of the cache key, so a new wording is measured anew."""
    ask = _ask(passage, generation)
    return "\0".join([*(f"{one['role']}\0{one['content']}" for one in ask.messages), ask.opening])


def _ask(passage: Assignment, generation: GenerationSpec) -> wordings.Ask:
    return wordings.ask(passage.template, passage.chunk, topic=passage.topic, context_bytes=generation.context_bytes)


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
