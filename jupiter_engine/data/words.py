"""Words and word n-grams as numbers: what the split, the filters and the contamination guard compare."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

_WORD = re.compile(r"\w+")
_MIX = np.uint64(0x9E3779B97F4A7C15)
_STEP = np.uint64(0xD6E8FEB86659FD93)

Hashes = npt.NDArray[np.uint64]


def words(text: str) -> list[str]:
    """Lower-case runs of letters, digits and underscores, in order."""
    return _WORD.findall(text.lower())


class Vocabulary:
    """Gives every distinct word a number, so that n-grams become 64-bit hashes.

    Hashes are comparable only within one vocabulary. They depend on the order in
    which words were first seen, never on Python's per-process string hashing.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def numbers(self, text_words: Iterable[str]) -> Hashes:
        """uint64 [words]: the words' numbers; new words are added."""
        known = self._numbers
        return np.fromiter((known.setdefault(word, len(known) + 1) for word in text_words), dtype=np.uint64)

    def ngrams(self, text: str, n: int) -> Hashes:
        """uint64 [max(0, words - n + 1)]: one hash for each word n-gram of `text`, in order.

        Two different n-grams share a hash with a chance of about 2^-64 a pair.
        """
        return combine(self.numbers(words(text)), n)


def combine(numbers: Hashes, n: int) -> Hashes:
    """uint64 [max(0, len - n + 1)]: a polynomial hash of each window of `n` numbers."""
    count = len(numbers) - n + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    mixed = numbers * _MIX
    mixed ^= mixed >> np.uint64(29)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(n):  # uint64 arithmetic wraps, which is what a polynomial hash wants
        hashes = hashes * _STEP + mixed[offset : offset + count]
    return hashes


def longest_run(hits: npt.NDArray[np.bool_], n: int) -> int:
    """Words in the longest unbroken run of n-gram hits: m consecutive hits cover m + n - 1 words; 0 without a hit."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], hits.astype(np.int8), [0]))))
    if len(edges) == 0:
        return 0
    return int((edges[1::2] - edges[::2]).max()) + n - 1


def among(hashes: Hashes, known: Hashes) -> npt.NDArray[np.bool_]:
    """bool [hashes]: which stand in `known`, which must be sorted (np.unique sorts)."""
    if not len(known):
        return np.zeros(len(hashes), dtype=np.bool_)
    found: npt.NDArray[np.bool_] = known[np.searchsorted(known, hashes).clip(max=len(known) - 1)] == hashes
    return found
