"""The outer step: golden numbers, equality with torch's SGD, clipping, streams of any chunk size."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from jupiter_engine.training.distributed.islands import outer, payload
from jupiter_engine.training.distributed.islands.payload import Payload, of_arrays, shapes_of, write_payload

Arrays = dict[str, np.ndarray]


def arrays(seed: int, scale: float = 1.0) -> Arrays:
    random = np.random.default_rng(seed)
    return {
        "w": random.normal(0, scale, (40, 50)).astype(np.float32),
        "norm": random.normal(0, scale, 5).astype(np.float32),
    }


def stored(path: Path, values: Arrays) -> Path:
    write_payload(path, shapes_of(values), "float32", of_arrays(values))
    return path


def test_golden_numbers_of_two_steps(tmp_path: Path) -> None:
    """By hand: weights 3 and 1, rate 0.5, momentum 0.5.

    delta = (3 * 4 + 1 * 8) / 4 = 5; m = 5; theta = 10 - 0.5 * (5 + 2.5) = 6.25
    delta = 5; m = 2.5 + 5 = 7.5; theta = 6.25 - 0.5 * (5 + 3.75) = 1.875
    """
    theta, momentum = stored(tmp_path / "t0", {"x": np.array([10.0], dtype=np.float32)}), None
    parts = [
        outer.Contribution(payload=Payload(stored(tmp_path / "a", {"x": np.array([4.0], dtype=np.float32)})), weight=3),
        outer.Contribution(payload=Payload(stored(tmp_path / "b", {"x": np.array([8.0], dtype=np.float32)})), weight=1),
    ]
    for number, wanted in ((1, 6.25), (2, 1.875)):
        new, kept = tmp_path / f"t{number}", tmp_path / f"m{number}"
        done = outer.outer_step(theta, momentum, parts, rate=0.5, mu=0.5, new_theta=new, new_momentum=kept)
        assert Payload(new).array("x")[0] == wanted
        assert done.delta_norm == 5.0
        theta, momentum = new, kept
    assert momentum is not None
    assert Payload(momentum).array("x")[0] == 7.5


@pytest.mark.parametrize("chunk", [256, 1024, 1 << 22])
def test_equals_torchs_nesterov_sgd_over_several_rounds(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(payload, "CHUNK", chunk)
    start = arrays(0)
    reference = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    sgd = torch.optim.SGD(reference.values(), lr=0.6, momentum=0.9, nesterov=True)
    theta, momentum = stored(tmp_path / "t0", start), None
    for step in range(1, 6):
        deltas = [arrays(10 * step + island, 1e-2) for island in range(3)]
        tokens = [100.0, 250.0, 17.0]
        for name, parameter in reference.items():
            wide = np.stack([delta[name].astype(np.float64) for delta in deltas])
            mean = np.tensordot(np.array(tokens) / sum(tokens), wide, axes=1)
            parameter.grad = torch.tensor(mean.astype(np.float32))
        sgd.step()
        parts = [
            outer.Contribution(payload=Payload(stored(tmp_path / f"d{step}.{i}", d)), weight=w)
            for i, (d, w) in enumerate(zip(deltas, tokens, strict=True))
        ]
        new, kept = tmp_path / f"t{step}", tmp_path / f"m{step}"
        outer.outer_step(theta, momentum, parts, rate=0.6, mu=0.9, new_theta=new, new_momentum=kept)
        theta, momentum = new, kept
    for name, parameter in reference.items():
        np.testing.assert_allclose(Payload(theta).array(name), parameter.detach().numpy(), rtol=0, atol=1e-6)


def test_one_island_at_rate_one_without_momentum_is_that_island(tmp_path: Path) -> None:
    base, trained = arrays(1), arrays(2)
    path = stored(tmp_path / "base", base)
    outer.write_contribution(Payload(path), trained, tmp_path / "up", "float32")
    part = outer.Contribution(payload=Payload(tmp_path / "up"), weight=5)
    new = tmp_path / "new"
    outer.outer_step(path, None, [part], rate=1.0, mu=0.0, new_theta=new, new_momentum=tmp_path / "m")
    for name, value in trained.items():
        np.testing.assert_allclose(Payload(new).array(name), value, atol=3e-7)


def test_the_base_travels_as_bfloat16_where_contributions_are_int8(tmp_path: Path) -> None:
    theta = stored(tmp_path / "t", arrays(3))
    sizes = {kind: outer.write_base(theta, tmp_path / kind, kind).bytes for kind in ("float32", "bfloat16", "int8")}
    assert sizes["int8"] == sizes["bfloat16"] < 0.6 * sizes["float32"]


def test_a_contribution_of_another_model_is_refused(tmp_path: Path) -> None:
    base = Payload(stored(tmp_path / "t", arrays(3)))
    with pytest.raises(ValueError, match="other tensors"):
        outer.write_contribution(base, {"w": arrays(3)["w"]}, tmp_path / "up", "float32")
    assert outer.same_tensors(base.shapes, shapes_of(arrays(0)))
    assert not outer.same_tensors(base.shapes, {"w": (50, 40), "norm": (5,)})


def test_norm_is_that_of_all_tensors_together(tmp_path: Path) -> None:
    values = arrays(4)
    wanted = math.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in values.values()))
    assert outer.norm(Payload(stored(tmp_path / "t", values))) == pytest.approx(wanted, rel=1e-12)
    values["norm"][2] = np.nan
    assert math.isnan(outer.norm(Payload(stored(tmp_path / "t", values))))


def test_contributions_above_the_median_are_scaled_to_it_and_far_above_refused() -> None:
    found = outer.clip({"a": 1.0, "b": 2.0, "c": 4.0, "d": 5.0, "e": math.nan}, 3.0)
    assert found.median == 2.0
    assert found.scales == {"a": 1.0, "b": 1.0, "c": 0.5, "d": 0.4}
    assert list(found.refused) == ["e"]
    assert list(outer.clip({"a": 1.0, "b": 2.0, "c": 4.0, "d": 9.5}, 3.0).refused) == ["d"]
    # Of two islands the calmer one is the measure, whatever the other did.
    two = outer.clip({"a": 1.0, "b": 1000.0}, 3.0)
    assert (two.scales, list(two.refused)) == ({"a": 1.0}, ["b"])
    assert outer.clip({"a": 0.0, "b": 0.0}, 3.0).scales == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_a_fast_island_is_no_runaway(power: float) -> None:
    """Two slow islands and one that makes 20 times their steps, however far steps lead."""
    steps = {"mac-1": 10, "mac-2": 11, "card": 200}
    found = outer.clip({island: outer.drift(0.1 * made**power, made) for island, made in steps.items()}, 3.0)
    assert not found.refused
    assert min(found.scales.values()) > 0.4


def test_rates_are_the_tuned_ones_and_straight_between() -> None:
    assert [outer.outer_rate(count) for count in (1, 2, 3, 4, 6, 8, 20)] == pytest.approx(
        [0.4, 0.6, 0.6, 0.6, 0.7, 0.8, 0.8]
    )
    with pytest.raises(ValueError, match="at least 1"):
        outer.outer_rate(0)


def test_memory_does_not_grow_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge of 16 MB of weights with chunks of 64 kB holds less than 2 MB: a step of 1 G parameters, with its
    chunks of 16 MB, stays under 1 GiB."""
    monkeypatch.setattr(payload, "CHUNK", 1 << 14)
    shapes = {"big": (4096, 1024), "norm": (1024,)}

    def noise(name: str, first: int, end: int) -> np.ndarray:
        return np.random.default_rng(first).normal(0, 0.02, end - first).astype(np.float32)

    write_payload(tmp_path / "t", shapes, "float32", noise)
    for island in ("a", "b"):
        write_payload(tmp_path / island, shapes, "int8", noise)
    tracemalloc.start()
    parts = [outer.Contribution(payload=Payload(tmp_path / island), weight=1) for island in ("a", "b")]
    assert outer.norm(parts[0].payload) > 0
    outer.outer_step(
        tmp_path / "t", None, parts, rate=0.6, mu=0.9, new_theta=tmp_path / "n", new_momentum=tmp_path / "m"
    )
    outer.write_base(tmp_path / "n", tmp_path / "b2", "bfloat16")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 << 20, peak
    # In the same proportion: values held at once for every value of a chunk.
    assert peak / (1 << 14) * (4 << 20) < 1 << 30
