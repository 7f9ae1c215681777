"""The filter chain: named rules in a fixed order; the first that fails is the sample's reason.

Nothing is deleted: a rejected sample keeps its verdict and its scores.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from rensa import RMinHash, RMinHashLSH

from jupiter_engine.data.filters import rules
from jupiter_engine.data.words import Vocabulary, among, combine, longest_run, words
from jupiter_engine.files import sha256_text
from jupiter_engine.protocol.rows import Item, Sample, Verdict
from jupiter_engine.protocol.specs import FilterSpec

OK = "ok"
EMPTY = "empty"
LEFTOVERS = "template leftovers"
META = "refusal or talk about itself"
SHORT = "too short"
LONG = "too long"
REPETITIVE = "repetitive"
UNGROUNDED = "not grounded in its chunk"
COPIED = "copied from its chunk"
NOT_PYTHON = "python code does not parse"
VAULT = "shares a run with the vault"
ITEM = "shares a run with an evaluation item"
EXACT = "exact duplicate"
NEAR = "near duplicate"
REASONS = (EMPTY, LEFTOVERS, META, SHORT, LONG, NOT_PYTHON, REPETITIVE, UNGROUNDED, COPIED, VAULT, ITEM, EXACT, NEAR)

_RUN_NGRAM = 8
_BOILERPLATE_TEXTS = 10
_ITEM_SHARE = 0.6
_SHINGLE = 5
_PERMUTATIONS = 128
_BANDS = 32
"""128 / 32 = 4 rows a band: two texts of similarity 0.5 meet in one with a chance of 87 %, of 0.75 with > 99.99 %."""
_PERMUTATION_SEED = 42


def usable(
    kind: str, prompt: str, response: str, chunk_text: str, spec: FilterSpec
) -> tuple[bool, str, dict[str, float]]:
    """(usable, reason, scores) of one sample by itself: every rule but contamination and duplicates.

    `kind` is the template type (`code` must hold Python that parses).
    """
    count = len(words(response))
    scores = {"words": float(count)}
    if not prompt.strip() or not response.strip():
        return False, EMPTY, scores
    if rules.has_leftovers(f"{prompt}\n{response}"):
        return False, LEFTOVERS, scores
    if rules.is_meta(response) or rules.is_meta(prompt):
        return False, META, scores
    if count < spec.min_words:
        return False, SHORT, scores
    if count > spec.max_words:
        return False, LONG, scores
    if kind == "code" and not rules.python_parses(response):
        return False, NOT_PYTHON, scores
    measured = (
        ("repetition", rules.repetition(response), spec.max_repetition, REPETITIVE),
        ("grounding", rules.grounding(response, chunk_text), spec.min_grounding, UNGROUNDED),
        ("copy", rules.copied(response, chunk_text), spec.max_copy, COPIED),
    )
    scores.update((name, round(value, 4)) for name, value, _, _ in measured)
    for name, value, limit, reason in measured:
        if value < limit if name == "grounding" else value > limit:
            return False, reason, scores
    return True, OK, scores


class FilterChain:
    """All rules, with the memory that contamination and duplicates need; judge samples in a fixed order."""

    def __init__(
        self, spec: FilterSpec, vault_texts: Sequence[str], items: Sequence[Item], earlier: Iterable[Sample] = ()
    ) -> None:
        self._spec = spec
        self._contamination = Contamination(vault_texts, items, spec.max_vault_run_words)
        self._duplicates = Duplicates(spec.near_duplicate)
        for sample in earlier:
            self._duplicates.add(_whole(sample))

    def judge(self, sample: Sample, chunk_text: str) -> Verdict:
        """The verdict; an accepted sample becomes one that later samples must not repeat."""
        accepted, reason, scores = usable(sample.type, sample.prompt, sample.response, chunk_text, self._spec)
        if accepted:
            reason = self._contamination.reason(_whole(sample), scores) or self._duplicates.reason(
                _whole(sample), sample.response, scores
            )
        if not reason or reason == OK:
            self._duplicates.add(_whole(sample), sample.response)
            return Verdict(id=sample.id, accepted=True, reason=OK, scores=scores)
        return Verdict(id=sample.id, accepted=False, reason=reason, scores=scores)


def _whole(sample: Sample) -> str:
    return f"{sample.prompt}\n{sample.response}"


class Contamination:
    """Runs of words that a text shares with the vault or with evaluation items.

    A run is an unbroken series of word 8-grams that all stand in the vault (not
    necessarily at one place, so a run is never understated). 8-grams found in more
    than ten vault texts are boilerplate and do not count.
    """

    def __init__(self, vault_texts: Sequence[str], items: Sequence[Item], max_run_words: int) -> None:
        self._vocabulary = Vocabulary()
        self._max_run = max_run_words
        grams = [np.unique(self._vocabulary.ngrams(text, _RUN_NGRAM)) for text in vault_texts]
        hashes, counts = np.unique(np.concatenate([*grams, np.empty(0, np.uint64)]), return_counts=True)
        self._vault = hashes[counts <= _BOILERPLATE_TEXTS]
        self._items: dict[int, list[int]] = defaultdict(list)
        self._needed: list[float] = []
        for number, item in enumerate(items):
            item_words = words(f"{item.question} {item.options[item.answer]}")
            self._needed.append(max(float(_RUN_NGRAM), _ITEM_SHARE * len(item_words)))
            for value in set(combine(self._vocabulary.numbers(item_words), _RUN_NGRAM).tolist()):
                self._items[value].append(number)

    def reason(self, text: str, scores: dict[str, float]) -> str:
        """'' or why the text is contaminated; adds `vault_run` and `item_run` (words) to the scores."""
        grams = self._vocabulary.ngrams(text, _RUN_NGRAM)
        run = longest_run(among(grams, self._vault), _RUN_NGRAM)
        scores["vault_run"] = float(run)
        item_run, too_long = self._item_run(grams.tolist())
        scores["item_run"] = float(item_run)
        if run >= self._max_run:
            return VAULT
        return ITEM if too_long else ""

    def _item_run(self, grams: list[int]) -> tuple[int, bool]:
        longest, too_long = 0, False
        running: dict[int, int] = {}
        for gram in grams:
            running = {number: running.get(number, _RUN_NGRAM - 1) + 1 for number in self._items.get(gram, ())}
            for number, length in running.items():
                longest = max(longest, length)
                too_long = too_long or length >= self._needed[number]
        return longest, too_long


class Duplicates:
    """Samples seen so far: exact by normalised words, near by MinHash over word 5-grams."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._exact: set[str] = set()
        self._near = RMinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS, num_bands=_BANDS)
        self._hashes: list[RMinHash] = []

    def reason(self, text: str, response: str, scores: dict[str, float]) -> str:
        """'' or why the text repeats an earlier one; adds `nearest` (estimated Jaccard similarity) to the scores."""
        if _normal(text) in self._exact or _normal(response) in self._exact:
            return EXACT
        minhash = _minhash(text)
        candidates = self._near.query(minhash)
        nearest = max((self._hashes[key].jaccard(minhash) for key in candidates), default=0.0)
        scores["nearest"] = round(nearest, 4)
        return NEAR if nearest >= self._threshold else ""

    def add(self, text: str, response: str = "") -> None:
        self._exact.add(_normal(text))
        if response:
            self._exact.add(_normal(response))
        minhash = _minhash(text)
        self._near.insert(len(self._hashes), minhash)
        self._hashes.append(minhash)


def _normal(text: str) -> str:
    return sha256_text(" ".join(words(text)))


def _minhash(text: str) -> RMinHash:
    found = words(text)
    shingles = [" ".join(found[i : i + _SHINGLE]) for i in range(max(1, len(found) - _SHINGLE + 1))]
    minhash = RMinHash(num_perm=_PERMUTATIONS, seed=_PERMUTATION_SEED)
    minhash.update(shingles)
    return minhash
