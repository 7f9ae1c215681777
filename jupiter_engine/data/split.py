"""Train/vault split by containment clusters, so that nothing in the vault has a near copy in training.

Two documents belong together if they share at least a fifth of the smaller one's
distinct word 8-grams; 8-grams that stand in more than ten documents are boilerplate
and do not count. Every 8-gram is compared: nothing is sampled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jupiter_engine.data.collectors.document import RawDocument
from jupiter_engine.data.words import Hashes, Vocabulary
from jupiter_engine.files import sha256_text
from jupiter_engine.protocol.rows import Kind, Split

NGRAM = 8
MIN_SHARED = 0.2
MAX_DOCUMENTS_PER_NGRAM = 10

Pairs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Place:
    """Where a document stands."""

    cluster: str
    split: Split
    slice: int
    """-1 for train."""


# -- clusters ----------------------------------------------------------------------------------------


def clusters(documents: Sequence[RawDocument]) -> list[int]:
    """For each document the index of its cluster's first document (connected components; families count as joined)."""
    parent = list(range(len(documents)))

    def find(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    def join(left: int, right: int) -> None:
        a, b = find(left), find(right)
        parent[max(a, b)] = min(a, b)

    families: dict[str, int] = {}
    for number, document in enumerate(documents):
        if document.family:
            join(families.setdefault(document.family, number), number)
    for left, right in overlapping([document.text for document in documents]):
        join(int(left), int(right))
    return [find(number) for number in range(len(documents))]


def overlapping(texts: Sequence[str]) -> Pairs:
    """int64 [pairs, 2]: texts (by index, smaller first) of which one holds >= MIN_SHARED of the other's 8-grams."""
    vocabulary = Vocabulary()
    grams = [np.unique(vocabulary.ngrams(text, NGRAM)) for text in texts]
    owners = np.repeat(np.arange(len(grams), dtype=np.int64), [len(g) for g in grams])
    hashes: Hashes = np.concatenate([*grams, np.empty(0, dtype=np.uint64)])
    order = np.argsort(hashes, kind="stable")
    hashes, owners = hashes[order], owners[order]
    starts = np.flatnonzero(np.concatenate(([True], hashes[1:] != hashes[:-1]))) if len(hashes) else np.empty(0, int)
    counts = np.diff(np.append(starts, len(hashes)))
    kept = counts <= MAX_DOCUMENTS_PER_NGRAM
    sizes = np.bincount(owners[np.repeat(kept, counts)], minlength=len(texts))
    shared: list[npt.NDArray[np.int64]] = []
    for count in range(2, MAX_DOCUMENTS_PER_NGRAM + 1):
        groups = owners[starts[counts == count][:, None] + np.arange(count)]
        for left in range(count):
            shared.extend(groups[:, left] * len(texts) + groups[:, right] for right in range(left + 1, count))
    if not shared:
        return np.empty((0, 2), dtype=np.int64)
    codes, times = np.unique(np.concatenate(shared), return_counts=True)
    pairs = np.stack([codes // len(texts), codes % len(texts)], axis=1)
    smaller = np.minimum(sizes[pairs[:, 0]], sizes[pairs[:, 1]])
    return pairs[times >= MIN_SHARED * smaller]


# -- places ------------------------------------------------------------------------------------------


@dataclass
class _Cluster:
    name: str
    members: list[int]
    sizes: dict[Kind, int]
    facts: int

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())

    @property
    def load(self) -> npt.NDArray[np.float64]:
        """float64 [4]: what shall be even over the slices: bytes of docs, bytes of code, facts, documents."""
        return np.array([self.sizes["docs"], self.sizes["code"], self.facts, len(self.members)], dtype=np.float64)


def split(
    documents: Sequence[RawDocument],
    *,
    vault_share: float,
    slices: int,
    seed: int,
    previous: Mapping[str, Place] | None = None,
    facts: Sequence[int] | None = None,
) -> list[Place]:
    """A place for each document, clusters kept whole.

    `previous` gives the places of known documents by uri. A cluster that touches
    train stays train; else one that touches the vault stays in that slice. New
    clusters come in an order drawn from `seed` and go to the vault until it holds
    `vault_share` of all bytes; one larger than a quarter of a slice's even share always trains, because
    it would make its slice a test of one subject. Each vault cluster goes to the
    slice where it leaves bytes per kind, documents, and `facts` (how many items a
    document may give) most even.
    """
    found = _clusters(documents, facts or [0] * len(documents))
    total = sum(cluster.bytes for cluster in found)
    target = vault_share * total
    places: dict[str, tuple[Split, int]] = {}
    fresh: list[_Cluster] = []
    for cluster in found:
        kept = _kept_place(cluster, documents, previous or {}, slices)
        if kept is None:
            fresh.append(cluster)
        else:
            places[cluster.name] = kept
    filled = sum(cluster.bytes for cluster in found if places.get(cluster.name, ("train", -1))[0] == "vault")
    largest = _largest_allowed(found, target, slices)
    chosen: list[_Cluster] = []
    for cluster in sorted(fresh, key=lambda c: sha256_text(f"split {seed} {c.name}")):
        if cluster.bytes <= largest and filled + cluster.bytes <= target:
            filled += cluster.bytes
            chosen.append(cluster)
        else:
            places[cluster.name] = ("train", -1)
    places.update(_slices(chosen, [c for c in found if c.name in places], places, slices))
    out: list[Place | None] = [None] * len(documents)
    for cluster in found:
        for member in cluster.members:
            out[member] = Place(cluster.name, *places[cluster.name])
    return [place for place in out if place is not None]


def _clusters(documents: Sequence[RawDocument], facts: Sequence[int]) -> list[_Cluster]:
    members: dict[int, list[int]] = defaultdict(list)
    for number, root in enumerate(clusters(documents)):
        members[root].append(number)
    found = []
    for group in members.values():
        sizes: dict[Kind, int] = {"docs": 0, "code": 0}
        for number in group:
            sizes[documents[number].kind] += documents[number].size_bytes
        # Named by its first member's place of origin: the name survives small edits of the text.
        name = sha256_text(min(documents[number].uri for number in group))[:16]
        found.append(_Cluster(name, group, sizes, sum(facts[number] for number in group)))
    return found


def _kept_place(
    cluster: _Cluster, documents: Sequence[RawDocument], previous: Mapping[str, Place], slices: int
) -> tuple[Split, int] | None:
    known = [previous[documents[n].uri] for n in cluster.members if documents[n].uri in previous]
    if not known:
        return None
    if any(place.split == "train" for place in known):
        return ("train", -1)
    return ("vault", min(place.slice for place in known) % slices)


def _largest_allowed(found: Sequence[_Cluster], target: float, slices: int) -> float:
    """A quarter of a slice's even share; at least the median cluster, or the vault of a small corpus stays empty."""
    sizes = sorted(cluster.bytes for cluster in found)
    median = sizes[len(sizes) // 2] if sizes else 0
    return max(target / slices / 4, median)


def _slices(
    chosen: Sequence[_Cluster], settled: Sequence[_Cluster], places: Mapping[str, tuple[Split, int]], slices: int
) -> dict[str, tuple[Split, int]]:
    """Slices for the chosen vault clusters, largest first, on top of what the settled ones already hold."""
    load = np.zeros((slices, 4))
    for cluster in settled:
        place, number = places[cluster.name]
        if place == "vault":
            load[number] += cluster.load
    wanted = sum((cluster.load for cluster in chosen), load.sum(axis=0))
    weight = 1.0 / np.maximum(wanted, 1.0)
    out: dict[str, tuple[Split, int]] = {}
    for cluster in sorted(chosen, key=lambda c: (-c.bytes, c.name)):
        cost = (((load + cluster.load) * weight) ** 2).sum(axis=1) - ((load * weight) ** 2).sum(axis=1)
        best = int(np.argmin(cost))
        load[best] += cluster.load
        out[cluster.name] = ("vault", best)
    return out
