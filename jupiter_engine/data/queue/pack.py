"""Packing: real chunks and accepted samples become training rows, mixed by tokens.

A row is a run of segments. Real text may be cut at a row's end (the rest opens the
next row); a sample is never cut unless it alone is longer than a row. Only as much
text is tokenised as the rows need.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from jupiter_engine.errors import NotEnoughData, StateError
from jupiter_engine.protocol.rows import Chunk, Sample
from jupiter_engine.protocol.specs import MixSpec

Class = Literal["real_docs", "real_code", "synthetic"]
CLASSES: tuple[Class, ...] = ("real_docs", "real_code", "synthetic")


class Codec(Protocol):
    """The part of TextCodec that packing needs."""

    @property
    def eos_ids(self) -> Sequence[int]: ...
    def encode(self, text: str, *, bos: bool = False) -> list[int]: ...
    def chat_example(self, messages: Sequence[dict[str, str]]) -> tuple[list[int], list[int]]: ...


@dataclass(frozen=True)
class Unit:
    """Tokens that belong together, with 1 where a token counts as a target."""

    id: str
    ids: list[int]
    mask: list[int]


@dataclass
class Supply:
    """One class's units in drawing order, tokenised when first needed, repeated when they run out."""

    sources: list[Callable[[], Unit]]
    placed: int = 0
    """Tokens handed out."""
    used: set[str] = field(default_factory=set)
    distinct: int = 0
    """Tokens of the different units handed out."""
    _made: dict[int, Unit] = field(default_factory=dict)
    _position: int = 0

    def next(self) -> Unit:
        number = self._position % len(self.sources)
        self._position += 1
        if number not in self._made:
            self._made[number] = self.sources[number]()
        return self._made[number]

    def take(self, unit: Unit, tokens: int) -> None:
        """Book `tokens` of a unit as placed."""
        self.placed += tokens
        if unit.id not in self.used:
            self.used.add(unit.id)
            self.distinct += len(unit.ids)

    @property
    def epochs(self) -> float:
        return self.placed / self.distinct if self.distinct else 0.0


@dataclass(frozen=True)
class Packed:
    """Arrays of shape [sequences, sequence_tokens + 1] and what went into them."""

    tokens: npt.NDArray[np.uint32]
    loss_mask: npt.NDArray[np.uint8]
    """1 where the token at this position counts as a target; never at a segment's first token."""
    segments: npt.NDArray[np.uint16]
    mix: dict[str, float]
    epochs: dict[str, float]
    distinct_tokens: int
    sample_ids: int


def shares(mix: MixSpec, available: Sequence[Class]) -> dict[Class, float]:
    """Wanted share of tokens of each available class: normalised, real classes together at least `real_floor`.

    Raises NotEnoughData if there is no class at all, or a floor but no real class.
    """
    wanted: dict[Class, float] = {name: getattr(mix, name) for name in available}
    total = sum(wanted.values())
    if total <= 0:
        raise NotEnoughData(
            "no class of the mix has data and a share above 0", fix="add documents, or correct `mix:` of the domain"
        )
    wanted = {name: share / total for name, share in wanted.items()}
    real = sum(share for name, share in wanted.items() if name != "synthetic")
    if real >= mix.real_floor:
        return wanted
    names = [name for name in wanted if name != "synthetic"]
    if not names:
        raise NotEnoughData(
            f"the mix wants at least {mix.real_floor:.0%} real text, and no train document exists",
            fix="add documents to the domain, or set real_floor: 0",
        )
    lifted: dict[Class, float] = {
        name: mix.real_floor * (wanted[name] / real if real else 1 / len(names)) for name in names
    }
    return {**lifted, "synthetic": 1 - mix.real_floor}


def real_units(
    chunks: Sequence[Chunk], codec: Codec, *, weights: dict[str, float], document_source: dict[str, str], seed: int
) -> dict[Class, list[Callable[[], Unit]]]:
    """Train chunks by class in drawing order: drawn by seed, likelier early the larger their source's weight.

    A document's last chunk ends with the end-of-text id. Vault chunks are refused.
    """
    if any(chunk.split != "train" for chunk in chunks):
        raise StateError("a vault chunk was about to reach training", fix="report this: it must never happen")
    last: dict[str, int] = {}
    for chunk in chunks:
        last[chunk.document] = max(last.get(chunk.document, 0), chunk.ordinal)
    rng = random.Random(seed)
    keyed: dict[Class, list[tuple[float, Chunk]]] = defaultdict(list)
    for chunk in sorted(chunks, key=lambda c: (c.document, c.ordinal)):
        weight = weights.get(document_source.get(chunk.document, ""), 1.0)
        # Efraimidis-Spirakis: sorting by log(u)/w draws without replacement with probability in proportion to w.
        keyed["real_docs" if chunk.kind == "docs" else "real_code"].append((np.log(1.0 - rng.random()) / weight, chunk))
    end = codec.eos_ids[0]

    def unit(chunk: Chunk) -> Callable[[], Unit]:
        def make() -> Unit:
            ids = codec.encode(chunk.text) + ([end] if chunk.ordinal == last[chunk.document] else [])
            return Unit(chunk.id, ids, [1] * len(ids))

        return make

    return {
        name: [unit(chunk) for _, chunk in sorted(found, key=lambda pair: (-pair[0], pair[1].id))]
        for name, found in keyed.items()
    }


def synthetic_units(samples: Sequence[Sample], codec: Codec, *, seed: int) -> list[Callable[[], Unit]]:
    """Accepted samples as chat examples in a seeded order; only the answer counts as target."""
    ordered = sorted(samples, key=lambda sample: sample.id)
    random.Random(seed + 1).shuffle(ordered)

    def unit(sample: Sample) -> Callable[[], Unit]:
        def make() -> Unit:
            ids, mask = codec.chat_example(
                [{"role": "user", "content": sample.prompt}, {"role": "assistant", "content": sample.response}]
            )
            return Unit(sample.id, ids, mask)

        return make

    return [unit(sample) for sample in ordered]


def pack(
    units: dict[Class, list[Callable[[], Unit]]], mix: MixSpec, *, sequences: int, sequence_tokens: int, end_id: int
) -> Packed:
    """Exactly `sequences` rows; at every point the class that lies furthest behind its share comes next.

    Units that are too few are repeated in the same order (`epochs` says how often).
    Raises NotEnoughData if nothing can be placed.
    """
    supplies = {name: Supply(units[name]) for name in CLASSES if units.get(name)}
    wanted = {name: share for name, share in shares(mix, list(supplies)).items() if share > 0}
    width = sequence_tokens + 1
    tokens = np.full((sequences, width), end_id, dtype=np.uint32)
    mask = np.zeros((sequences, width), dtype=np.uint8)
    segments = np.zeros((sequences, width), dtype=np.uint16)
    filler = _Filler(supplies, wanted, width)
    for row in range(sequences):
        filler.fill(tokens[row], mask[row], segments[row])
    if not mask[:, 1:].any():
        raise NotEnoughData("no token could be placed in a training row", fix="add documents to the domain")
    placed = sum(supply.placed for supply in supplies.values())
    return Packed(
        tokens=tokens,
        loss_mask=mask,
        segments=segments,
        mix={name: round(supply.placed / placed, 4) for name, supply in supplies.items()},
        epochs={name: round(supply.epochs, 4) for name, supply in supplies.items()},
        distinct_tokens=sum(supply.distinct for supply in supplies.values()),
        sample_ids=len(supplies["synthetic"].used) if "synthetic" in supplies else 0,
    )


class _Filler:
    """Fills rows one after the other, carrying cut real text over to the next row."""

    def __init__(self, supplies: dict[Class, Supply], wanted: dict[Class, float], width: int) -> None:
        self._supplies = supplies
        self._wanted = wanted
        self._width = width
        self._rest: dict[Class, deque[Unit]] = {name: deque() for name in wanted}

    def fill(
        self, tokens: npt.NDArray[np.uint32], mask: npt.NDArray[np.uint8], segments: npt.NDArray[np.uint16]
    ) -> None:
        filled = segment = 0
        while filled < self._width:
            name, unit = self._choose(self._width - filled)
            if unit is None:
                # Only samples are left and none fits: the row is padded with a segment that counts nowhere.
                segments[filled:] = segment
                return
            count = min(len(unit.ids), self._width - filled)
            stop = filled + count
            tokens[filled:stop] = unit.ids[:count]
            mask[filled:stop] = unit.mask[:count]
            mask[filled] = 0  # nothing of its own segment precedes it
            segments[filled:stop] = segment
            self._supplies[name].take(unit, count)
            if count < len(unit.ids) and name != "synthetic":
                self._rest[name].append(Unit(unit.id, unit.ids[count:], unit.mask[count:]))
            filled, segment = stop, segment + 1

    def _choose(self, room: int) -> tuple[Class, Unit | None]:
        """The class furthest behind that has something to place in `room` tokens, and its next unit."""
        total = sum(supply.placed for supply in self._supplies.values()) + 1
        behind = sorted(self._wanted, key=lambda name: self._supplies[name].placed / total - self._wanted[name])
        for name in behind:
            rest = self._rest[name]
            unit = rest.popleft() if rest else self._supplies[name].next()
            if not unit.ids:
                continue
            if name != "synthetic" or len(unit.ids) <= room or room == self._width:
                return name, unit
            rest.appendleft(unit)
        return behind[0], None
