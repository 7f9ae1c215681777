"""Groups of the MLX twin on real rings: divided state gives the undivided result, whatever the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from jupiter_engine.backends.mlx.collectives import BUCKET_BYTES
from jupiter_engine.backends.mlx.sharding import assign, rounds
from jupiter_engine.protocol.shapes import PRESETS, tensor_shapes
from tests.backends.mlx_ring import Found, opened, rows, run, shares, state_arrays, steps
from tests.training.nano import INFO

SHAPES = tensor_shapes(INFO)


def alone(first: int, last: int, **changes: Any) -> tuple[Found, list[float]]:
    trainer = opened(None, "none", changes)
    said = steps(trainer, first, last)
    return state_arrays(trainer.export_state()), said


def same(ours: Found, theirs: Found, tolerance: float) -> None:
    assert ours.keys() >= theirs.keys()
    for name, value in theirs.items():
        if name[:2] in ("w:", "m:"):
            assert ours[name].dtype == value.dtype, name
            np.testing.assert_allclose(ours[name], value, rtol=0, atol=tolerance, err_msg=name)


def test_tensors_are_dealt_out_evenly_and_each_once() -> None:
    sizes = {name: int(np.prod(size)) for name, size in tensor_shapes(PRESETS["1b"].shape).items()}
    for ranks in (1, 2, 3, 5):
        owned = assign(sizes, ranks)
        assert sorted(name for names in owned for name in names) == sorted(sizes)
        loads = [sum(sizes[name] for name in names) for names in owned]
        assert max(loads) <= 1.02 * sum(sizes.values()) / ranks
    assert assign(dict(reversed(sizes.items())), 3) == assign(sizes, 3)


def test_rounds_bound_every_message_and_waste_little() -> None:
    sizes = {name: 4 * int(np.prod(size)) for name, size in tensor_shapes(PRESETS["1b"].shape).items()}
    for ranks in (2, 3):
        owned = assign(sizes, ranks)
        dealt = rounds(owned, sizes)
        assert [[name for each in dealt for name in each[rank]] for rank in range(ranks)] == owned
        sent = 0
        for each in dealt:
            loads = [sum(sizes[name] for name in names) for names in each]
            assert max(loads) <= max(BUCKET_BYTES, *(sizes[name] for names in each for name in names))
            sent += ranks * max(loads)
        assert sent <= 1.25 * sum(sizes.values())


@pytest.mark.parametrize("ranks", [2, 3])
def test_zero1_is_bitwise_the_undivided_group(ranks: int, tmp_path: Path) -> None:
    """Uneven rows on every rank, two micro-batches on some; three steps."""
    whole = run(tmp_path / "none", ranks, "train", sharding="none", first=0, last=3)
    parts = run(tmp_path / "zero1", ranks, "train", sharding="zero1", first=0, last=3)
    same(parts[0], whole[0], 0.0)
    for rank in range(ranks):
        assert parts[rank]["said"].tolist() == whole[0]["said"].tolist()
        assert parts[rank]["held"] == whole[0]["held"]
        assert len(set(parts[rank]["prints"])) == 1
        assert ("whole" in parts[rank]) == (rank == 0)
    needed = [int(found["state_bytes"]) for found in parts]
    assert sum(needed) == whole[0]["state_bytes"]
    assert max(needed) < 1.15 * whole[0]["state_bytes"] / ranks
    ours, theirs = (load_file(tmp_path / kind / "model" / "model.safetensors") for kind in ("zero1", "none"))
    assert all(np.array_equal(ours[name], theirs[name]) for name in SHAPES)
    assert ours.keys() == theirs.keys() == SHAPES.keys()


@pytest.mark.parametrize("ranks", [2, 3])
def test_uneven_ranks_equal_one_big_batch(ranks: int, tmp_path: Path) -> None:
    assert len({len(part) for part in shares(ranks, 0, equal=False)}) == ranks
    found = run(tmp_path, ranks, "train", sharding="none", first=0, last=3)
    state, said = alone(0, 3)
    np.testing.assert_allclose(found[0]["said"], said, rtol=2e-5)
    same(found[0], state, 2e-5)


@pytest.mark.parametrize("name", ["muon", "adamw8bit", "adafactor"])
def test_zero1_carries_every_optimizers_state(name: str, tmp_path: Path) -> None:
    changes = {"optimizer": {"name": name}}
    whole = run(tmp_path / "none", 2, "train", sharding="none", first=0, last=2, **changes)
    parts = run(tmp_path / "zero1", 2, "train", sharding="zero1", first=0, last=2, **changes)
    same(parts[0], whole[0], 0.0)
    assert max(int(found["state_bytes"]) for found in parts) < 0.7 * whole[0]["state_bytes"]


@pytest.mark.parametrize("changes", [{"compute_dtype": "bfloat16"}, {"update": "lora", "lora": {"rank": 4}}])
def test_zero1_shares_what_the_forward_pass_takes(changes: dict[str, Any], tmp_path: Path) -> None:
    whole = run(tmp_path / "none", 2, "train", sharding="none", first=0, last=2, **changes)
    parts = run(tmp_path / "zero1", 2, "train", sharding="zero1", first=0, last=2, **changes)
    same(parts[0], whole[0], 0.0)
    assert parts[0]["said"].tolist() == whole[0]["said"].tolist()
    ours, theirs = ((tmp_path / kind / "model" / "model.safetensors").read_bytes() for kind in ("zero1", "none"))
    assert ours == theirs


def test_the_number_of_ranks_and_the_sharding_may_change_between_save_and_resume(tmp_path: Path) -> None:
    first = run(tmp_path / "two", 2, "train", sharding="zero1", first=0, last=2)
    np.savez(tmp_path / "state.npz", **first[0])  # type: ignore[arg-type]
    uninterrupted, said = alone(0, 4)
    trainer = opened(None, "none", {})
    from tests.backends.mlx_ring import state_of

    trainer.import_state(state_of(first[0]))
    trainer.share_state(2)
    rest = steps(trainer, 2, 4)
    same(state_arrays(trainer.export_state()), uninterrupted, 3e-5)
    np.testing.assert_allclose(rest, said[4:], rtol=1e-4)
    three = run(tmp_path / "three", 3, "train", sharding="zero1", first=2, last=4, resume=str(tmp_path / "state.npz"))
    same(three[0], uninterrupted, 3e-5)
    assert int(three[0]["updates"]) == 4


def test_fsdp_needs_a_scattered_sum_and_says_so_on_the_ring(tmp_path: Path) -> None:
    for rank in run(tmp_path, 2, "refused", sharding="fsdp"):
        assert "[ring] sum_scatter not supported" in str(rank["error"])
        assert "zero1" in str(rank["error"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"optimizer": {"name": "muon"}}, "optimizer adamw only"), ({"update": "lora"}, "update full")],
)
def test_fsdp_refuses_what_it_cannot_divide(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert words in str(run(tmp_path, 2, "refused", sharding="fsdp", emulate=True, **changes)[0]["error"])


def test_fsdp_refuses_rows_that_do_not_divide(tmp_path: Path) -> None:
    found = run(tmp_path, 3, "refused", sharding="fsdp", emulate=True)
    assert "cannot be divided evenly by 3 ranks" in str(found[0]["error"])


@pytest.mark.parametrize("recompute", [False, True])
def test_fsdp_with_an_emulated_scatter_equals_the_undivided_model(recompute: bool, tmp_path: Path) -> None:
    found = run(
        tmp_path, 2, "train", sharding="fsdp", first=0, last=3, emulate=True, recompute_activations=recompute
    )  # fmt: skip
    state, said = alone(0, 3)
    np.testing.assert_allclose(found[0]["said"], said, rtol=2e-5)
    same(found[0], state, 2e-5)
    trainer = opened(None, "none", {})
    assert int(found[0]["state_bytes"]) == trainer.state_bytes() // 2
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert all(np.array_equal(saved[name], found[0][f"w:{name}"]) for name in SHAPES)
    assert len(set(found[0]["prints"])) == 1
    steps(trainer, 0, 3)
    assert found[0]["held"] == pytest.approx(trainer.held_out(rows(np.arange(4))), rel=1e-5)


@pytest.mark.parametrize("sharding", ["none", "zero1", "fsdp"])
def test_islands_take_whole_weights_out_and_in(sharding: str, tmp_path: Path) -> None:
    found = run(tmp_path, 2, "islands", sharding=sharding, emulate=sharding == "fsdp")
    assert not any(name.startswith(("a:", "b:")) for name in found[1])
    reference = opened(None, "none", {})
    steps(reference, 0, 2)
    before = reference.weights()
    assert before is not None
    for name in SHAPES:
        np.testing.assert_allclose(found[0][f"b:{name}"], before[name], rtol=0, atol=2e-5)
        np.testing.assert_array_equal(found[0][f"a:{name}"], found[0][f"b:{name}"] + np.float32(0.5))
    reference.adopt({name: value + np.float32(0.5) for name, value in before.items()})
    steps(reference, 2, 3)
    same(found[0], state_arrays(reference.export_state()), 5e-5)


@pytest.mark.parametrize("sharding", ["none", "zero1"])
def test_every_collective_runs_on_the_cpu_stream(sharding: str, tmp_path: Path) -> None:
    for rank in run(tmp_path, 2, "traffic", sharding=sharding):
        assert rank["wrong"].tolist() == []
        assert rank["calls"][0] > 10
        assert (rank["calls"][1] > 0) == (sharding == "zero1")


def test_arrays_arrive_bit_by_bit(tmp_path: Path) -> None:
    found = run(tmp_path, 2, "transport")
    sent: dict[str, np.ndarray] = {
        "nan": np.array([np.nan, -0.0, np.inf], np.float32),
        "bytes": np.arange(7, dtype=np.uint8),
        "none": np.zeros((0, 3), np.float32),
        "one": np.array(5, np.uint64),
    }
    for name, value in sent.items():
        for rank in (0, 1):
            got = found[rank][f"b:{name}"]
            assert (got.dtype, got.shape, got.tobytes()) == (value.dtype, value.shape, value.tobytes())
            if name != "none" or rank == 1:
                again = found[0][f"g:{name}.{rank}"]
                assert (again.dtype, again.shape, again.tobytes()) == (value.dtype, value.shape, value.tobytes())
    assert "g:none.0" not in found[0]
    assert not any(name.startswith("g:") for name in found[1])
