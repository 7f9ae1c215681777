"""Packing: real chunks and accepted samples become training rows, mixed by tokens.

A row is a run of segments. Real text may be cut at a row's end (the rest opens the
next row), so it fills every gap; a sample is never cut unless it alone is longer
than a row. Rows of samples only are packed best-fit (data.queue.best_fit). Only as
much text is tokenised as the rows need.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from jupiter_engine.data.queue.best_fit import BestFit
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
    counted_tokens: int
    """Targets whose loss counts, added up unit by unit as they were placed."""
    padding_tokens: int
    """Input positions (all but a row's last column) that hold nothing; they count nowhere."""
    cut_samples: int
    """Samples longer than a row, of which only the beginning is there."""


@dataclass(frozen=True)
class HeldOut:
    """Rows of vault text, arrays as in Packed of shape [n, sequence_tokens + 1]."""

    tokens: npt.NDArray[np.uint32]
    loss_mask: npt.NDArray[np.uint8]
    segments: npt.NDArray[np.uint16]


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
    rows = _Rows(sequences, sequence_tokens + 1, end_id)
    if list(wanted) == ["synthetic"]:
        supply = supplies["synthetic"]
        fit: BestFit[Unit] = BestFit(sequences, rows.width)
        fit.fill(supply.next)
        for row, placed_units in enumerate(fit.filled):
            for unit in placed_units:
                supply.take(unit, rows.put(row, unit))
                rows.cut_samples += len(unit.ids) > rows.width
    else:
        filler = _Filler(supplies, wanted, rows)
        for row in range(sequences):
            filler.fill(row)
    if not rows.counted:
        raise NotEnoughData("no token could be placed in a training row", fix="add documents to the domain")
    placed = sum(supply.placed for supply in supplies.values())
    return Packed(
        tokens=rows.tokens,
        loss_mask=rows.mask,
        segments=rows.segments,
        mix={name: round(supply.placed / placed, 4) for name, supply in supplies.items()},
        epochs={name: round(supply.epochs, 4) for name, supply in supplies.items()},
        distinct_tokens=sum(supply.distinct for supply in supplies.values()),
        sample_ids=len(supplies["synthetic"].used) if "synthetic" in supplies else 0,
        counted_tokens=rows.counted,
        padding_tokens=rows.close(),
        cut_samples=rows.cut_samples,
    )


def held_out_rows(
    chunks: Sequence[Chunk], codec: Codec, *, slice_number: int, sequences: int, sequence_tokens: int, seed: int
) -> HeldOut:
    """At most `sequences` rows of the vault chunks of one slice, in an order drawn by seed; nothing is repeated.

    Chunks follow one another as segments and are cut at a row's end. Train chunks and other slices are left out;
    NotEnoughData if the slice holds no text.
    """
    drawn = sorted((c for c in chunks if c.split == "vault" and c.slice == slice_number), key=lambda c: c.id)
    random.Random(seed + 2).shuffle(drawn)
    rows = _Rows(sequences, sequence_tokens + 1, codec.eos_ids[0])
    row = 0
    for chunk in drawn:
        ids = codec.encode(chunk.text)
        while ids and row < sequences:
            count = rows.put(row, Unit(chunk.id, ids, [1] * len(ids)))
            ids = ids[count:]
            row += rows.room(row) == 0
    used = min(sequences, row + (rows.room(row) < rows.width if row < sequences else 0))
    if not rows.counted:
        raise NotEnoughData(
            f"vault slice {slice_number} holds no text to measure the held-out loss on",
            fix="add documents to the domain, or set training.early_stop.every_steps: 0",
        )
    rows.close()
    return HeldOut(rows.tokens[:used], rows.mask[:used], rows.segments[:used])


class _Rows:
    """The arrays of a snapshot while they are filled from the left, row by row."""

    def __init__(self, sequences: int, width: int, end_id: int) -> None:
        self.width = width
        self.tokens = np.full((sequences, width), end_id, dtype=np.uint32)
        self.mask = np.zeros((sequences, width), dtype=np.uint8)
        self.segments = np.zeros((sequences, width), dtype=np.uint16)
        self.counted = self.cut_samples = 0
        self._filled = [0] * sequences
        self._next = [0] * sequences

    def room(self, row: int) -> int:
        return self.width - self._filled[row]

    def put(self, row: int, unit: Unit) -> int:
        """Write as much of `unit` as the row holds, as a segment of its own; returns how many tokens that is."""
        start = self._filled[row]
        count = min(len(unit.ids), self.width - start)
        stop = start + count
        self.tokens[row, start:stop] = unit.ids[:count]
        self.mask[row, start:stop] = unit.mask[:count]
        self.mask[row, start] = 0  # nothing of its own segment precedes it
        self.segments[row, start:stop] = self._next[row]
        self.counted += sum(unit.mask[1:count])
        self._filled[row] = stop
        self._next[row] += 1
        return count

    def close(self) -> int:
        """Make what is left of each row a segment that counts nowhere; returns how many input positions those are."""
        for row, filled in enumerate(self._filled):
            self.segments[row, filled:] = self._next[row]
        return sum(max(self.width - 1 - filled, 0) for filled in self._filled)


class _Filler:
    """Fills rows one after the other, carrying cut real text over to the next row."""

    def __init__(self, supplies: dict[Class, Supply], wanted: dict[Class, float], rows: _Rows) -> None:
        self._supplies = supplies
        self._wanted = wanted
        self._rows = rows
        self._rest: dict[Class, deque[Unit]] = {name: deque() for name in wanted}

    def fill(self, row: int) -> None:
        while room := self._rows.room(row):
            name, unit = self._choose(room)
            if unit is None:
                return
            count = self._rows.put(row, unit)
            self._supplies[name].take(unit, count)
            if count < len(unit.ids):
                if name == "synthetic":
                    self._rows.cut_samples += 1
                else:
                    self._rest[name].append(Unit(unit.id, unit.ids[count:], unit.mask[count:]))

    def _choose(self, room: int) -> tuple[Class, Unit | None]:
        """The class furthest behind that has something to place in `room` tokens, and its next unit."""
        total = sum(supply.placed for supply in self._supplies.values()) + 1
        behind = sorted(self._wanted, key=lambda name: self._supplies[name].placed / total - self._wanted[name])
        for name in behind:
            rest = self._rest[name]
            unit = rest.popleft() if rest else self._supplies[name].next()
            if not unit.ids:
                continue
            if name != "synthetic" or len(unit.ids) <= room or room == self._rows.width:
                return name, unit
            rest.appendleft(unit)
        return behind[0], None
