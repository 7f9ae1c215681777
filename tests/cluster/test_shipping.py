"""An order for another machine: relative paths that mean the same everywhere, and results that come home."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jupiter_engine.cluster.shipping import localise, ship
from jupiter_engine.errors import StateError
from jupiter_engine.protocol.orders import CollectOrder, GenerateOrder, ModelRef, TrainOrder
from jupiter_engine.protocol.specs import GenerationSpec, LaunchSpec, Recipe, TemplateSpec

HOME = Path("/home/ada/ws/.jupiter")
RUN = HOME / "runs" / "python-0001-train"
LAUNCH = LaunchSpec(twin="mlx", ranks=2, launcher="direct")


def train_order(start: str) -> TrainOrder:
    return TrainOrder(
        run=RUN.name,
        domain="python",
        cycle=1,
        recipe=Recipe(),
        launch=LaunchSpec(twin="torch"),
        snapshot=str(HOME / "corpus" / "python-0001"),
        start=ModelRef(name="base", folder=start, sha256="x"),
        target=str(HOME / "models" / "python-0001"),
    )


def test_paths_are_relative_to_the_run_folder_and_files_of_the_user_come_along() -> None:
    shipment = ship(train_order("/data/my model"), home=HOME, run_folder=RUN, twin="mlx", launch=LAUNCH)
    order = shipment.order
    assert isinstance(order, TrainOrder)
    assert order.launch == LAUNCH
    assert (order.snapshot, order.target) == ("../../corpus/python-0001", "../../models/python-0001")
    assert dict(shipment.inputs)[HOME / "corpus" / "python-0001"] == "corpus/python-0001"
    outside = dict(shipment.inputs)[Path("/data/my model")]
    assert outside.startswith("inputs/")
    assert order.start is not None
    there = "/Users/bob/.jupiter/workspaces/1"
    assert os.path.normpath(f"{there}/runs/{RUN.name}/{order.start.folder}") == f"{there}/{outside}"
    assert shipment.outputs == (("models/python-0001", HOME / "models" / "python-0001"),)


def test_the_twin_of_the_node_replaces_that_of_this_machine() -> None:
    order = GenerateOrder(
        run="r",
        domain="python",
        cycle=1,
        generation=GenerationSpec(templates=(TemplateSpec(id="qa", type="qa"),)),
        generator=ModelRef(name="b", folder=str(HOME / "models/b"), sha256="x"),
        chunks=str(HOME / "runs/c/results/chunks.jsonl"),
        twin="torch",
    )
    there = ship(order, home=HOME, run_folder=RUN, twin="mlx", launch=LAUNCH).order
    assert isinstance(there, GenerateOrder)
    assert (there.twin, there.chunks) == ("mlx", "../c/results/chunks.jsonl")


def test_stages_on_the_workspaces_files_are_not_shipped() -> None:
    with pytest.raises(StateError, match="collect"):
        ship(
            CollectOrder(run="r", domain="d", cycle=1, sources=()), home=HOME, run_folder=RUN, twin="mlx", launch=LAUNCH
        )


def test_results_come_home() -> None:
    there = "/Users/bob/.jupiter/workspaces/1"
    found = localise(
        {"model": {"folder": "../../models/m", "name": "m"}, "p": f"{there}/runs/{RUN.name}/results/a.jsonl", "n": [1]},
        home=HOME,
        run_folder=RUN,
        workspace_there=there,
        outputs=(HOME / "models/m",),
    )
    assert found == {
        "model": {"folder": str(HOME / "models/m"), "name": "m"},
        "p": str(RUN / "results/a.jsonl"),
        "n": [1],
    }


@pytest.mark.parametrize(
    "path",
    ["../../../../etc/passwd", "/there/../../etc", "../../..", "../../keys", "/home/ada/.ssh", "/there/models/m2"],
)
def test_a_node_does_not_choose_what_is_read_here(path: str) -> None:
    with pytest.raises(StateError, match="none of its own"):
        localise({"p": path}, home=HOME, run_folder=RUN, workspace_there="/there", outputs=(HOME / "models/m",))
