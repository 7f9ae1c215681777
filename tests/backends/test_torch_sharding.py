"""Divided state in the torch twin: real gloo groups under torchrun against one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from jupiter_engine.backends.torch.sharding import owners
from jupiter_engine.backends.torch.train import TorchTrainer, open_trainer
from jupiter_engine.protocol.shapes import tensor_shapes
from jupiter_engine.protocol.specs import OptimizerSpec, Recipe
from tests.backends.torch_ranks import batch, launch, read_state, steps, write_state
from tests.training.nano import INFO, recipe, weights

UNEVEN: list[list[list[int]]] = [[[0, 1, 2], [3]], [[4, 5]], [[6], [7], [8, 9]]]
"""Micro-batches of three ranks: 2, 1 and 3 of them, of 3 + 1, 2 and 1 + 1 + 2 rows."""
PADDED: list[list[list[int]]] = [[[0, 1, 2], [3], []], [[4, 5], [], []], [[6], [7], [8, 9]]]
"""The same rows in lockstep: ranks with fewer micro-batches add some of which nothing counts."""
CLOSE = 2e-6
"""Sums of float32 gradients in another order, after three AdamW steps whose eps lets noise move nothing."""


def wanted(name: str = "adamw", **changes: Any) -> Recipe:
    spec = OptimizerSpec(name=name, learning_rate=1e-2, eps=1e-4, weight_decay=0.1)  # type: ignore[arg-type]
    return recipe(optimizer=spec, **changes)


def alone(recipe: Recipe) -> TorchTrainer:
    return open_trainer(INFO, recipe, weights(), threads=1, compile="off")


def scenario(recipe: Recipe, sharding: str, parts: list[list[list[int]]], **more: Any) -> dict[str, Any]:
    return {"steps": 3, **more, "recipe": msgspec.to_builtins(recipe), "sharding": sharding, "parts": parts}


def one_process(recipe: Recipe, count: int = 3) -> tuple[TorchTrainer, list[float]]:
    trainer = alone(recipe)
    flat = [rows for rank in UNEVEN for rows in rank]
    return trainer, steps(trainer, [flat], count)


PARTS = {"none": UNEVEN, "zero1": UNEVEN, "fsdp": PADDED}
EXACT = [
    ("none", "adamw"),
    ("zero1", "adamw"),
    ("zero1", "muon"),
    ("zero1", "adafactor"),
    ("fsdp", "adamw"),
    ("fsdp", "muon"),
    ("fsdp", "adamw8bit"),
]
LORA: dict[str, Any] = {"update": "lora", "compute_dtype": "bfloat16", "recompute_activations": True}
TWO = [[[0, 1], [2]], [[3], [4, 5]]]
MOVES = [(sharding, name) for sharding in ("zero1", "fsdp") for name in ("adamw", "adamw8bit", "adafactor")]


@dataclass(frozen=True)
class Group:
    folder: Path
    seen: dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Group:
    """What three ranks did, one scenario after the other in one group: a group takes seconds to start."""
    scenarios = {
        f"{sharding}-{name}": scenario(wanted(name), sharding, PARTS[sharding], discard=True, adopt=True)
        for sharding, name in EXACT
    }
    for sharding, parts in PARTS.items():
        scenarios[f"{sharding}-lora"] = scenario(wanted(**LORA), sharding, parts, adopt=True)
        scenarios[f"{sharding}-bfloat16"] = scenario(wanted(compute_dtype="bfloat16"), sharding, parts)
    folder = tmp_path_factory.mktemp("three")
    return Group(folder, launch(scenarios, folder, ranks=3))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Group:
    """Two steps on two ranks."""
    scenarios = {f"{sharding}-{name}": scenario(wanted(name), sharding, TWO, steps=2) for sharding, name in MOVES}
    folder = tmp_path_factory.mktemp("two")
    return Group(folder, launch(scenarios, folder, ranks=2))


@pytest.mark.slow
@pytest.mark.parametrize(("sharding", "optimizer"), EXACT)
def test_three_uneven_ranks_train_as_one_process(sharding: str, optimizer: str, three: Group) -> None:
    chosen = wanted(optimizer)
    trainer, norms = one_process(chosen)
    expected = trainer.export_state()
    assert expected is not None
    seen, folder = three.seen[f"{sharding}-{optimizer}"], three.folder / f"{sharding}-{optimizer}"
    assert [one["lockstep"] for one in seen] == [sharding == "fsdp"] * 3
    assert len({one["first"] for one in seen}) == len({one["last"] for one in seen}) == 1
    assert seen[0]["first"] != seen[0]["last"] != seen[0]["adopted"]
    for one in seen:
        np.testing.assert_allclose(one["norms"], norms, rtol=1e-5)
        assert one["norms"] == seen[0]["norms"], "each rank scales by the same norm"
        assert one["kept"]
        assert one["norm_after_discard"] == 0.0
        assert one["agreed"] == 3.0
    held = trainer.held_out(batch(UNEVEN[0][0]))
    assert seen[0]["held_out"] == pytest.approx(held, rel=1e-5)
    assert seen[0]["weights_equal_state"]
    state = read_state(folder / "state.npz")
    assert state.updates == 3
    assert state.weights.keys() == expected.weights.keys()
    assert state.moments.keys() == expected.moments.keys()
    eight = optimizer == "adamw8bit"
    loose = 50 if eight else 1
    for name, value in expected.weights.items():
        apart = np.abs(state.weights[name] - value)
        # A moment on the edge of two codes may take either: few weights do, and those by no more than a code's width.
        assert apart.max() <= CLOSE * (500 if eight else 1), name
        assert np.quantile(apart, 0.999) <= CLOSE * loose, name
    for name, value in expected.moments.items():
        assert state.moments[name].shape == value.shape
        if value.dtype == np.float32:
            np.testing.assert_allclose(state.moments[name], value, rtol=1e-3 * loose, atol=1e-6 * loose, err_msg=name)
    saved = load_file(folder / "model.safetensors")
    for name, value in state.weights.items():
        np.testing.assert_array_equal(saved[name], value)
    adopted = read_state(folder / "adopted.npz")
    for name, value in state.weights.items():
        np.testing.assert_array_equal(adopted.weights[name], value + np.float32(0.25), err_msg=name)
    for name, value in state.moments.items():
        np.testing.assert_array_equal(adopted.moments[name], value, err_msg=name)


@pytest.mark.slow
def test_a_run_moves_between_divided_ranks_and_one_process(two: Group, tmp_path: Path) -> None:
    """2 ranks -> 1 process -> 2 ranks, against one process all the way."""
    flat = [rows for rank in TWO for rows in rank]
    expected, norms, scenarios = {}, {}, {}
    for sharding, optimizer in MOVES:
        name, chosen = f"{sharding}-{optimizer}", wanted(optimizer)
        whole, middle = alone(chosen), alone(chosen)
        expected[name] = [steps(whole, [flat], 2) for _ in range(3)], whole.export_state()
        middle.import_state(read_state(two.folder / name / "state.npz"))
        norms[name] = steps(middle, [flat], 2)
        state = middle.export_state()
        assert state is not None
        assert state.updates == 4
        write_state(tmp_path / f"{name}.npz", state)
        more = {"resume": str(tmp_path / f"{name}.npz"), "updates": 4}
        scenarios[name] = scenario(chosen, sharding, TWO, **{"steps": 2, **more})
    back = launch(scenarios, tmp_path / "back", ranks=2)
    for name, (wanted_norms, state) in expected.items():
        eight = name.endswith("8bit")
        found = [two.seen[name][0]["norms"], norms[name], back[name][0]["norms"]]
        np.testing.assert_allclose(found, wanted_norms, rtol=1e-2 if eight else 1e-4, err_msg=name)
        ended = read_state(tmp_path / "back" / name / "state.npz")
        assert state is not None
        assert ended.updates == state.updates == 6
        moved = 0.0
        for weight, value in state.weights.items():
            atol = 1e-3 if eight else 1e-5
            np.testing.assert_allclose(ended.weights[weight], value, rtol=0, atol=atol, err_msg=f"{name} {weight}")
            moved = max(moved, float(np.abs(value - weights()[weight]).max()))
        assert moved > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("sharding", PARTS)
def test_lora_in_a_group(sharding: str, three: Group, tmp_path: Path) -> None:
    trainer, norms = one_process(wanted(**LORA))
    expected = trainer.export_state()
    assert expected is not None
    seen, folder = three.seen[f"{sharding}-lora"], three.folder / f"{sharding}-lora"
    assert [one["lockstep"] for one in seen] == [sharding == "fsdp"] * 3
    assert len({one["last"] for one in seen}) == 1
    np.testing.assert_allclose(seen[0]["norms"], norms, rtol=2e-2)
    state = read_state(folder / "state.npz")
    assert state.weights.keys() == expected.weights.keys()
    assert all(".lora_" in name for name in state.weights)
    trainer.save(tmp_path)
    ours, theirs = load_torch(tmp_path / "model.safetensors"), load_torch(folder / "model.safetensors")
    assert ours.keys() == theirs.keys() == tensor_shapes(INFO).keys()
    for name, value in ours.items():
        assert torch.allclose(theirs[name].float(), value.float(), atol=2e-2), name


@pytest.mark.slow
@pytest.mark.parametrize("sharding", PARTS)
def test_bfloat16_products_in_a_group(sharding: str, three: Group) -> None:
    trainer, norms = one_process(wanted(compute_dtype="bfloat16"))
    expected = trainer.export_state()
    assert expected is not None
    seen = three.seen[f"{sharding}-bfloat16"]
    np.testing.assert_allclose(seen[0]["norms"], norms, rtol=2e-2)
    assert len({one["last"] for one in seen}) == 1
    state = read_state(three.folder / f"{sharding}-bfloat16" / "state.npz")
    for name, value in expected.weights.items():
        start = weights()[name]
        change, ours = value - start, state.weights[name] - start
        assert np.linalg.norm(change - ours) < 0.1 * np.linalg.norm(change), name
    # Master weights, not their rounded copies, went into the state.
    bits = state.weights["model.norm.weight"].view(np.uint32) & np.uint32(0xFFFF)
    assert (bits != 0).any()


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["zero1", "fsdp"])
def test_two_ranks_hold_half_of_the_optimizers_state_each(sharding: str, two: Group) -> None:
    replicated = alone(wanted()).state_bytes()
    assert replicated == 8 * sum(int(np.prod(size)) for size in tensor_shapes(INFO).values())
    held = [one["moment_bytes"] for one in two.seen[f"{sharding}-adamw"]]
    assert sum(held) == replicated, "nothing is held twice and nothing is missing"
    assert max(held) < 0.52 * replicated


def test_owners_share_the_numbers_evenly_and_every_rank_deals_alike() -> None:
    shapes = tensor_shapes(INFO)
    dealt = owners(shapes, 3)
    assert dealt.keys() == shapes.keys()
    load = [sum(int(np.prod(shapes[name])) for name, rank in dealt.items() if rank == one) for one in range(3)]
    assert max(load) - min(load) <= max(int(np.prod(size)) for size in shapes.values())
    assert owners(dict(reversed(shapes.items())), 3) == dealt


def test_a_group_of_one_divides_nothing() -> None:
    trainer = open_trainer(INFO, wanted(), weights(), threads=1, sharding="fsdp", compile="off")
    assert not trainer.lockstep
    assert steps(trainer, [[[0, 1]]], 1)[0] > 0
