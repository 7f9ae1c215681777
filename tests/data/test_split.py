from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from jupiter_engine.data import split, words
from jupiter_engine.data.collectors.document import RawDocument
from jupiter_engine.protocol.rows import Kind
from tests.data.fixture_corpus import words_of


def document(uri: str, text: str, kind: Kind = "docs", family: str = "") -> RawDocument:
    return RawDocument(source="s", uri=uri, title=uri, kind=kind, license="MIT", text=text, family=family)


def corpus(count: int, size: int = 120) -> list[RawDocument]:
    return [document(f"d{n}", words_of(f"doc {n}", size), "code" if n % 3 == 0 else "docs") for n in range(count)]


def test_a_document_inside_another_is_clustered_by_the_smaller_ones_share() -> None:
    small = words_of("a", 60)
    documents = [document("big", small + " " + words_of("b", 2000)), document("small", small), *corpus(3)]
    assert split.clusters(documents) == [0, 0, 2, 3, 4]


@pytest.mark.parametrize(("shared", "together"), [(40, True), (20, False)])
def test_the_threshold_is_a_fifth_of_the_smaller_documents_8_grams(shared: int, together: bool) -> None:
    common = words_of("common", shared)
    left = document("left", common + " " + words_of("l", 130 - shared))
    right = document("right", common + " " + words_of("r", 400))
    # shared 8-grams: shared - 7; of 130 - 7 = 123: 33 are 27 %, 13 are 11 %
    assert (split.clusters([left, right])[1] == 0) is together


def test_boilerplate_in_more_than_ten_documents_joins_nothing() -> None:
    licence = words_of("licence", 100)
    ten = [document(f"d{n}", licence + " " + words_of(f"own {n}", 100)) for n in range(10)]
    eleven = [*ten, document("d10", licence + " " + words_of("own 10", 100))]
    assert set(split.clusters(ten)) == {0}
    assert split.clusters(eleven) == list(range(11))


def test_chains_of_overlap_and_families_are_one_component() -> None:
    a, b = words_of("a", 80), words_of("b", 80)
    documents = [
        document("1", a),
        document("2", a + " " + b),
        document("3", b),
        document("4", words_of("x", 90), family="module x"),
        document("5", words_of("y", 90), family="module x"),
    ]
    assert split.clusters(documents) == [0, 0, 0, 3, 3]


def test_no_cluster_is_torn_and_the_vault_holds_its_share_evenly() -> None:
    documents = corpus(300)
    places = split.split(documents, vault_share=0.2, slices=3, seed=1)
    by_cluster = defaultdict(set)
    load: dict[tuple[int, str], int] = defaultdict(int)
    for doc, place in zip(documents, places, strict=True):
        by_cluster[place.cluster].add((place.split, place.slice))
        load[place.slice, doc.kind] += doc.size_bytes
        assert (place.slice == -1) == (place.split == "train")
    assert all(len(found) == 1 for found in by_cluster.values())
    total = sum(load.values())
    vault = total - load[-1, "docs"] - load[-1, "code"]
    assert 0.18 < vault / total <= 0.2
    for kind in ("docs", "code"):
        sizes = [load[n, kind] for n in range(3)]
        assert max(sizes) < 1.25 * min(sizes)


def test_an_oversized_cluster_always_trains() -> None:
    documents = [*corpus(100), document("huge", words_of("huge", 4000))]
    for seed in range(8):
        places = split.split(documents, vault_share=0.3, slices=2, seed=seed)
        assert places[-1].split == "train"


def test_the_split_depends_on_the_seed_only() -> None:
    documents = corpus(80)
    first = split.split(documents, vault_share=0.2, slices=2, seed=5)
    assert first == split.split(documents, vault_share=0.2, slices=2, seed=5)
    assert first != split.split(documents, vault_share=0.2, slices=2, seed=6)


def test_known_documents_keep_their_place_and_new_ones_fill_the_vault() -> None:
    old = corpus(100)
    first = split.split(old, vault_share=0.2, slices=2, seed=5)
    previous = {d.uri: p for d, p in zip(old, first, strict=True)}
    new = [document(f"n{n}", words_of(f"new {n}", 120)) for n in range(100)]
    second = split.split([*new, *old], vault_share=0.2, slices=2, seed=99, previous=previous)
    assert [(p.split, p.slice) for p in second[100:]] == [(p.split, p.slice) for p in first]
    assert sum(p.split == "vault" for p in second[:100]) == sum(p.split == "vault" for p in first)


def test_a_new_copy_of_a_train_document_trains_and_pulls_its_vault_relative_along() -> None:
    old = corpus(100)
    first = split.split(old, vault_share=0.2, slices=2, seed=5)
    previous = {d.uri: p for d, p in zip(old, first, strict=True)}
    vault = next(d for d, p in zip(old, first, strict=True) if p.split == "vault")
    train = next(d for d, p in zip(old, first, strict=True) if p.split == "train")
    bridge = document("bridge", vault.text + " " + train.text)
    copy = document("copy of vault", vault.text + " " + words_of("more", 20))
    with_copy = split.split([*old, copy], vault_share=0.2, slices=2, seed=5, previous=previous)
    assert (with_copy[-1].split, with_copy[-1].slice) == ("vault", previous[vault.uri].slice)
    with_bridge = split.split([*old, bridge], vault_share=0.2, slices=2, seed=5, previous=previous)
    assert with_bridge[-1].split == "train"
    assert with_bridge[old.index(vault)].split == "train"


def test_overlaps_agree_with_a_plain_count_of_shared_8_grams() -> None:
    pieces = [words_of(f"piece {n}", 30) for n in range(12)]
    texts = [" ".join(pieces[(n * k) % 12] for k in range(1, 5)) + words_of(f"own {n}", n * 10) for n in range(14)]
    grams = [{tuple(w[i : i + 8]) for i in range(len(w) - 7)} for w in (words.words(t) for t in texts)]
    frequency: dict[tuple[str, ...], int] = defaultdict(int)
    for found in grams:
        for gram in found:
            frequency[gram] += 1
    kept = [{g for g in found if frequency[g] <= 10} for found in grams]
    expected = {
        (i, j)
        for i in range(14)
        for j in range(i + 1, 14)
        if kept[i] & kept[j] and len(kept[i] & kept[j]) >= 0.2 * min(len(kept[i]), len(kept[j]))
    }
    assert {(int(a), int(b)) for a, b in split.overlapping(texts)} == expected
    assert 3 < len(expected) < 91


def test_longest_run_counts_words() -> None:
    hits = np.array([True, False, True, True, True, False])
    assert words.longest_run(hits, 8) == 10
    assert words.longest_run(np.zeros(4, dtype=np.bool_), 8) == 0
