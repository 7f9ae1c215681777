"""How requests become batches, for both twins: pure arithmetic on numpy arrays, no tensor library."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from jupiter_engine.backends.contract import ScoreRequest

Ints = npt.NDArray[np.int64]

SCORE_ROWS = 512
"""Positions whose logits exist at once: 100 MB in float32 at a vocabulary of 49k."""


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that depends on a request's seed and the index of the new token only.

    Counter-based, so what a request samples never depends on its neighbours in a batch.
    """
    digest = hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


@dataclass(slots=True)
class ScoreBatch:
    """Rows that go through the model together, and what is read off afterwards."""

    tokens: Ints
    """[B, T], padded with 0 at the end."""
    positions: Ints
    """[B, T]; a branch goes on where its prefix ends."""
    branches: Ints | None
    """[B, T]: 0 in the shared prefix, 1, 2, ... in the branches, -1 in the padding; None: plain causal rows."""
    sources: Ints
    """[N] flat indices into B * T of the positions that predict a wanted token."""
    targets: Ints
    """[N] the wanted tokens."""
    owners: list[tuple[int, int]]
    """(request index, number of its wanted tokens), in the order of `sources`."""

    def mask(self) -> npt.NDArray[np.bool_] | None:
        """[B, 1, T, T], True where the query (third axis) may see the key: not later, and prefix or own branch."""
        if self.branches is None:
            return None
        steps = np.arange(self.tokens.shape[1])
        keys, queries = self.branches[:, None, :], self.branches[:, :, None]
        seen = (steps[None, :] <= steps[:, None])[None] & ((keys == 0) | (keys == queries))
        return np.asarray(seen[:, None], dtype=np.bool_)


@dataclass(slots=True)
class _Tree:
    """Requests with the same tokens before their first wanted one: the prefix is computed once."""

    prefix: list[int]
    members: list[int] = field(default_factory=list)
    length: int = 0


def score_batches(requests: Sequence[ScoreRequest], *, batch_tokens: int) -> list[ScoreBatch]:
    """Group requests that share their prefix, sort by length, pad; longest first, so memory peaks at once.

    A batch holds at most `batch_tokens` tokens with its padding (or a single
    longer row). Requests that want nothing (first == len(tokens)) appear in none.
    """
    trees = _grow_trees(requests, batch_tokens)
    batches: list[ScoreBatch] = []
    for plain in (True, False):
        rows = sorted((tree for tree in trees if (len(tree.members) == 1) == plain), key=lambda tree: -tree.length)
        start = 0
        while start < len(rows):
            count = max(1, batch_tokens // rows[start].length)
            batches.append(_assemble(requests, rows[start : start + count], plain=plain))
            start += count
    return batches


def _grow_trees(requests: Sequence[ScoreRequest], batch_tokens: int) -> list[_Tree]:
    trees: list[_Tree] = []
    open_trees: dict[tuple[int, ...], _Tree] = {}
    for index, request in enumerate(requests):
        if request.first == len(request.tokens):
            continue
        prefix = tuple(request.tokens[: request.first])
        # The last token predicts nothing that is wanted, so it is never run.
        extra = len(request.tokens) - request.first - 1
        tree = open_trees.get(prefix)
        if tree is None or tree.length + extra > batch_tokens:
            tree = open_trees[prefix] = _Tree(list(prefix), length=len(prefix))
            trees.append(tree)
        tree.members.append(index)
        tree.length += extra
    return trees


def _assemble(requests: Sequence[ScoreRequest], trees: Sequence[_Tree], *, plain: bool) -> ScoreBatch:
    longest = max(tree.length for tree in trees)
    tokens = np.zeros((len(trees), longest), dtype=np.int64)
    positions = np.zeros_like(tokens)
    branches = np.full_like(tokens, -1)
    sources: list[int] = []
    targets: list[int] = []
    owners: list[tuple[int, int]] = []
    for row, tree in enumerate(trees):
        used = len(tree.prefix)
        tokens[row, :used] = tree.prefix
        positions[row, :used] = np.arange(used)
        branches[row, :used] = 0
        for number, index in enumerate(tree.members, 1):
            wanted = requests[index].tokens[requests[index].first :]
            end = used + len(wanted) - 1
            tokens[row, used:end] = wanted[:-1]
            positions[row, used:end] = np.arange(len(tree.prefix), len(tree.prefix) + len(wanted) - 1)
            branches[row, used:end] = number
            base = row * longest
            sources += [base + len(tree.prefix) - 1, *range(base + used, base + end)]
            targets += wanted
            owners.append((index, len(wanted)))
            used = end
    if plain:
        positions[:] = np.arange(longest)
    return ScoreBatch(
        tokens=tokens,
        positions=positions,
        branches=None if plain else branches,
        sources=np.asarray(sources, dtype=np.int64),
        targets=np.asarray(targets, dtype=np.int64),
        owners=owners,
    )
