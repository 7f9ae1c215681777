"""What the planner is asked, as cluster file and earlier cycles say it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from jupiter_engine.orchestrator.planner import distinct_tokens, members_of
from jupiter_engine.planning.plan import Question, outlook
from jupiter_engine.protocol.shapes import PRESETS
from jupiter_engine.protocol.specs import Recipe
from jupiter_engine.protocol.state import CycleState, StageState, StageStatus, State
from jupiter_engine.settings.cluster import ClusterSettings

BIG = {"name": "big", "host": "10.0.0.1", "device_type": "mac", "memory_gb": 128, "chip": "M4 Max"}
SMALL = {"name": "small", "host": "10.0.0.2", "device_type": "mac", "memory_gb": 16, "chip": "M4"}
MACS = {
    "nodes": [BIG, SMALL],
    "groups": [{"name": "g", "nodes": ["big", "small"]}],
    "launch": {"group": "g"},
}
CARDS = {
    "nodes": [{"name": "box", "host": "10.0.0.1", "device_type": "nvidia", "memory_gb": 24, "chip": "RTX 4090"}],
    "groups": [{"name": "cards", "nodes": ["box"], "ranks_per_node": 2}],
    "launch": {"group": "cards"},
}
RECIPE = Recipe(sequence_tokens=1024, batch_sequences=32, micro_batch_sequences=16)


def asked(root: Path, cluster: object, recipe: Recipe = RECIPE) -> Question:
    members = members_of(root, msgspec.convert(cluster, ClusterSettings))
    return Question(shape=PRESETS["350m"].shape, recipe=recipe, members=members)


def state(queue: dict[str, Any]) -> State:
    """A workspace whose newest cycle of domain `d` sealed training data with this result."""
    told: tuple[tuple[str, str, StageStatus, dict[str, Any]], ...] = (
        ("c1", "d", "done", {"distinct_tokens": 5, "epochs": {"domain": 9.0}}),
        ("c2", "d", "done", queue),
        ("c3", "d", "pending", {}),
        ("c4", "other", "done", {"distinct_tokens": 7, "epochs": {"domain": 9.0}}),
    )
    cycles = {
        name: CycleState(
            id=name,
            domain=domain,
            number=1,
            mode="auto",
            remaining=0,
            settings={},
            created_at=0.0,
            by="me",
            stages={"queue": StageState(stage="queue", status=status, result=result)},
        )
        for name, domain, status, result in told
    }
    return State(cycles=cycles)


def test_a_machines_own_micro_batch_decides_whether_the_plan_fits(tmp_path: Path) -> None:
    assert outlook(asked(tmp_path, MACS), compare=False).fits is False
    nodes = [BIG, {**SMALL, "micro_batch_sequences": 1}]
    answer = outlook(asked(tmp_path, {**MACS, "nodes": nodes}), compare=False)
    assert [node.micro_batch for node in answer.nodes] == [16, 1]
    assert answer.fits is True


def test_a_rank_has_a_card_to_itself_where_only_the_cluster_file_speaks(tmp_path: Path) -> None:
    recipe = Recipe(sequence_tokens=1024, batch_sequences=16, micro_batch_sequences=8)
    (node,) = outlook(asked(tmp_path, CARDS, recipe), compare=False).nodes
    assert node.ranks == 2
    assert node.needed == node.memory.total
    assert node.fits is True


@pytest.mark.parametrize(
    ("epochs", "known"),
    [({"domain": 2.5, "replay": 0.1}, 61440), ({"domain": 0.4, "replay": 1.0}, None), ({}, None)],
)
def test_the_domains_text_is_counted_only_where_the_data_had_to_repeat_it(
    epochs: dict[str, float], known: int | None
) -> None:
    assert distinct_tokens(state({"distinct_tokens": 61440, "epochs": epochs}), "d") == known
    assert distinct_tokens(State(), "d") is None
