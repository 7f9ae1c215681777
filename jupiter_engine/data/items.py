"""Multiple-choice items made from a text's own structure: no model writes a question or an answer.

Every item has four options of one type; the right one stands verbatim in its
evidence, a span of one chunk. Known items come from train documents, vault items
from vault documents.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from jupiter_engine.data import makers
from jupiter_engine.data.makers import Draft
from jupiter_engine.data.words import Vocabulary, among, combine, words
from jupiter_engine.files import sha256_text
from jupiter_engine.protocol.rows import Chunk, Document, Item

OPTIONS = 4
_CANDIDATES = 40
_COVERAGE_NGRAM = 8
_MAX_COVERED = 0.5


@dataclass(frozen=True)
class Source:
    """A document, its text and its chunks in order."""

    document: Document
    text: str
    chunks: Sequence[Chunk]


@dataclass
class ItemReport:
    """How many drafts became items, and why the others did not."""

    drafts: int = 0
    rejected: Counter[str] | None = None

    def reject(self, reason: str) -> None:
        self.rejected = self.rejected if self.rejected is not None else Counter()
        self.rejected[reason] += 1


def make(
    sources: Sequence[Source], *, seed: int, per_document_known: int = 40, per_document_vault: int = 200
) -> tuple[list[Item], ItemReport]:
    """Items of both pools in a deterministic order.

    A vault item that asks what train text answers in the same form, or whose evidence is mostly covered
    by train text, is rejected: it would not measure what was never trained upon.
    """
    report = ItemReport()
    pools: dict[str, list[Source]] = {"train": [], "vault": []}
    for source in sources:
        pools[source.document.split].append(source)
    items: list[Item] = []
    asked: set[tuple[str, str]] = set()
    for split, limit in (("train", per_document_known), ("vault", per_document_vault)):
        drafts = [draft for source in pools[split] for draft in makers.drafts(source.document, source.text)]
        report.drafts += len(drafts)
        siblings = _siblings(drafts)
        rights = _rights(drafts)
        by_id = {source.document.id: source for source in pools[split]}
        used: Counter[str] = Counter()
        for draft in sorted(drafts, key=lambda d: sha256_text(f"{seed} {d.maker} {d.question} {d.answer}")):
            if used[draft.document.id] >= limit:
                report.reject("enough items of this document")
                continue
            item = _item(draft, siblings, rights, by_id[draft.document.id], asked, seed, report)
            if item is not None:
                used[draft.document.id] += 1
                items.append(item)
        # Train text answers these, whether or not an item came of it: the vault must not ask them.
        asked.update((draft.maker, draft.question) for draft in drafts)
    return _uncovered(items, [source.text for source in pools["train"]], report), report


def _siblings(drafts: Iterable[Draft]) -> dict[str, dict[str, list[str]]]:
    """Type -> group -> distinct answers in order of appearance ('' groups the whole pool)."""
    found: dict[str, dict[str, dict[str, None]]] = defaultdict(lambda: defaultdict(dict))
    for draft in drafts:
        for group in ("", *draft.groups):
            found[draft.type][group].update(dict.fromkeys((draft.answer, *draft.alternatives)))
    return {kind: {group: list(answers) for group, answers in groups.items()} for kind, groups in found.items()}


def _rights(drafts: Iterable[Draft]) -> dict[tuple[str, str], set[str]]:
    """(maker, what is asked) -> every right answer that some document gives."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for draft in drafts:
        found[draft.maker, draft.asks].add(draft.answer)
    return found


def _item(
    draft: Draft,
    siblings: dict[str, dict[str, list[str]]],
    rights: dict[tuple[str, str], set[str]],
    source: Source,
    asked: set[tuple[str, str]],
    seed: int,
    report: ItemReport,
) -> Item | None:
    key = (draft.maker, draft.question)
    if key in asked:
        report.reject("asked already")
        return None
    if _contains(draft.question, draft.answer):
        report.reject("question contains the answer")
        return None
    chunk, evidence = _evidence(draft, source)
    if chunk is None:
        report.reject("answer not inside one chunk")
        return None
    rng = random.Random(sha256_text(f"item {seed} {draft.maker} {draft.question}"))
    distractors = _distractors(draft, siblings[draft.type], rights[draft.maker, draft.asks], rng)
    if distractors is None:
        report.reject("too few siblings of fitting length")
        return None
    asked.add(key)
    answer = rng.randrange(OPTIONS)
    options = (*distractors[:answer], draft.answer, *distractors[answer:])
    return Item(
        id=sha256_text("\0".join((draft.maker, draft.question, *options, chunk.id)))[:16],
        pool="known" if source.document.split == "train" else "vault",
        maker=draft.maker,
        document=source.document.id,
        chunk=chunk.id,
        cluster=source.document.cluster,
        slice=source.document.slice,
        question=draft.question,
        options=options,
        answer=answer,
        evidence=evidence,
    )


def _contains(question: str, answer: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(answer.lower())}(?!\w)", question.lower()) is not None


def _evidence(draft: Draft, source: Source) -> tuple[Chunk | None, str]:
    """The chunk that holds the draft's span, or at least its line with the answer, and that span."""
    offset = 0
    for chunk in source.chunks:
        end = offset + len(chunk.text)
        for start, stop in draft.spans:
            evidence = source.text[start:stop].strip()
            if offset <= start and stop <= end and draft.answer in " ".join(evidence.split()):
                return chunk, evidence
        offset = end
    return None, ""


def _distractors(draft: Draft, groups: dict[str, list[str]], right: set[str], rng: random.Random) -> list[str] | None:
    """Three siblings of the nearest group that has enough, lengths balanced around the answer's.

    How many shall be longer than the answer is drawn first, so "take the longest" wins no more than chance.
    """
    longer_wanted = rng.randrange(OPTIONS)
    size = len(draft.answer)
    for group in (*draft.groups, ""):
        candidates = [a for a in groups.get(group, []) if a != draft.answer and not (draft.asks and a in right)]
        # A large pool is sampled: checking thousands of siblings for every item would cost minutes.
        candidates = rng.sample(candidates, min(len(candidates), _CANDIDATES))
        # Far too long or short a sibling gives itself away; among the rest the choice is free.
        fitting = sorted(filter(draft.accepts, candidates), key=lambda a: abs(len(a) - size) > max(8, size))
        if len(fitting) < OPTIONS - 1:
            continue
        longer = [a for a in fitting if len(a) > size or (len(a) == size and longer_wanted)]
        shorter = [a for a in fitting if len(a) < size or (len(a) == size and not longer_wanted)]
        take = min(len(longer), max(longer_wanted, OPTIONS - 1 - len(shorter)))
        if (take == 0) != (longer_wanted == 0) or (take == OPTIONS - 1) != (longer_wanted == OPTIONS - 1):
            continue  # the answer would stand out by its length although the draw said otherwise
        chosen = longer[:take] + shorter[: OPTIONS - 1 - take]
        rng.shuffle(chosen)
        return chosen
    return None


def _uncovered(items: list[Item], train_texts: Sequence[str], report: ItemReport) -> list[Item]:
    """Without the vault items of which more than half the evidence's word 8-grams stand in train text."""
    if not any(item.pool == "vault" for item in items):
        return items
    vocabulary = Vocabulary()
    known = [vocabulary.ngrams(text, _COVERAGE_NGRAM) for text in train_texts]
    train = np.unique(np.concatenate(known)) if known else np.empty(0, dtype=np.uint64)
    kept = []
    for item in items:
        if item.pool == "vault":
            grams = combine(vocabulary.numbers(words(item.evidence)), _COVERAGE_NGRAM)
            if len(grams) and float(among(grams, train).mean()) > _MAX_COVERED:
                report.reject("evidence stands in train text")
                continue
        kept.append(item)
    return kept
