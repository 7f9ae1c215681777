"""Synthetic score rows for two models with known true differences."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jupiter_engine.protocol.orders import ModelRef
from jupiter_engine.protocol.rows import Item, Score

CANDIDATE = ModelRef(name="cand", folder="/models/cand", sha256="c" * 64)
INCUMBENT = ModelRef(name="base", folder="/models/base", sha256="b" * 64)

Task = Literal["vault_bpb", "mcq_known", "mcq_vault", "yield"]


@dataclass(frozen=True)
class World:
    """True effects (positive: the candidate is better) and sample sizes."""

    bits: float = 0.0
    """True difference in bits per byte."""
    known: float = 0.0
    """True differences in share of right answers."""
    vault: float = 0.0
    usable: float = 0.0
    windows: int = 90
    items: int = 300
    chunks: int = 60
    per_document: int = 2
    discordance: float = 0.20


def score(model: ModelRef, task: Task, unit: str, value: float, *, cluster: str, weight: float = 1.0) -> Score:
    return Score(
        id=f"{model.sha256[:16]}:{task}:{unit}",
        model=model.name,
        model_sha256=model.sha256,
        task=task,
        unit=unit,
        document=cluster,
        cluster=cluster,
        value=value,
        weight=weight,
        answer="" if task == "vault_bpb" else f"{model.name} on {unit}",
    )


def scores(world: World, seed: int) -> list[Score]:
    rng = np.random.default_rng(seed)
    rows: list[Score] = []
    for index in range(world.windows):
        scored = float(rng.integers(900, 1200))
        base = rng.normal(1.0, 0.15)
        better = world.bits + rng.normal(0.0, 0.03)
        place = {"cluster": f"w{index // world.per_document}", "weight": scored}
        rows.append(score(INCUMBENT, "vault_bpb", f"w{index}", base * scored * math.log(2), **place))  # type: ignore[arg-type]
        rows.append(score(CANDIDATE, "vault_bpb", f"w{index}", (base - better) * scored * math.log(2), **place))  # type: ignore[arg-type]
    shares: Mapping[Task, tuple[int, float]] = {
        "mcq_known": (world.items, world.known),
        "mcq_vault": (world.items, world.vault),
        "yield": (world.chunks, world.usable),
    }
    for task, (count, effect) in shares.items():
        wins = (world.discordance + effect) / 2
        for index, draw in enumerate(rng.uniform(size=count)):
            ours, theirs = (1, 0) if draw < wins else (0, 1) if draw < world.discordance else (int(draw > 0.7),) * 2
            cluster = f"{task}{index // world.per_document}"
            rows.append(score(CANDIDATE, task, f"{task}-{index}", float(ours), cluster=cluster))
            rows.append(score(INCUMBENT, task, f"{task}-{index}", float(theirs), cluster=cluster))
    return rows


def items_of(rows: list[Score]) -> list[Item]:
    """An item for every question scored."""
    units = sorted({(row.unit, row.task, row.cluster) for row in rows if row.task.startswith("mcq")})
    return [
        Item(
            id=unit,
            pool="known" if task == "mcq_known" else "vault",
            maker="test",
            document=cluster,
            chunk=cluster,
            cluster=cluster,
            slice=0,
            question=f"What is {unit}?",
            options=("first", "second"),
            answer=1,
            evidence="second",
        )
        for unit, task, cluster in units
    ]
