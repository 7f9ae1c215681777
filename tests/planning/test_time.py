from __future__ import annotations

import pytest
from msgspec.structs import replace

from jupiter_engine.planning.budget import Device
from jupiter_engine.planning.time import Calibration, reduce_seconds, speed_of, train_flops
from jupiter_engine.protocol.shapes import PRESETS
from jupiter_engine.protocol.specs import Recipe

BIG = PRESETS["1b"].shape
RECIPE = Recipe(sequence_tokens=2048, batch_sequences=16, micro_batch_sequences=2)


def device(name: str, kind: str = "metal", **more: object) -> Device:
    twin = "mlx" if kind == "metal" else "torch"
    return Device(node="n", kind=kind, twin=twin, name=name, **more)  # type: ignore[arg-type]


def test_arithmetic_is_six_a_weight_and_attention() -> None:
    """6.64 GF a token for the 1b shape at 2,048; a third more with recomputation, a third less for adapters."""
    full = train_flops(BIG, RECIPE)
    assert full == pytest.approx(6.64e9, rel=0.01)
    assert train_flops(BIG, replace(RECIPE, recompute_activations=True)) == pytest.approx(full * 4 / 3)
    assert train_flops(BIG, replace(RECIPE, update="lora")) == pytest.approx(full * 2 / 3)


@pytest.mark.parametrize(
    ("name", "kind", "low", "high"),
    [
        ("Apple M4", "metal", 180, 250),
        ("Apple M4 Max", "metal", 541, 970),
        ("NVIDIA GeForce RTX 4090", "cuda", 10500, 12800),
    ],
)
def test_the_table_gives_the_published_ranges(name: str, kind: str, low: float, high: float) -> None:
    """Tokens a second of the 1b shape at 2,048 tokens: Macs with recomputation, cards without."""
    recipe = replace(RECIPE, recompute_activations=kind == "metal")
    speed = speed_of(device(name, kind), BIG, recipe)
    assert speed.source == "table"
    assert speed.low == pytest.approx(low, rel=0.03)
    assert speed.high == pytest.approx(high, rel=0.03)


def test_utilisation_is_told_where_the_peak_is_known() -> None:
    assert speed_of(device("NVIDIA GeForce RTX 4090", "cuda"), BIG, RECIPE).mfu == pytest.approx(0.467, abs=0.02)
    assert speed_of(device("Apple M4"), BIG, RECIPE).mfu is None


CALIBRATED = Calibration(
    node="n", device="EPYC", kind="cpu", twin="torch", shape=BIG, sequence_tokens=2048, micro_batch=2,
    compute_dtype="bfloat16", recompute=False, update="full", optimizer="adamw", micro_batch_s=4.0, update_s=8.0,
    peak_bytes=1, steps=3, seconds=60.0, at=100.0,
)  # fmt: skip
CPU = Device(node="n", kind="cpu", twin="torch", name="EPYC", cores=2)


def test_what_was_measured_takes_the_place_of_the_table() -> None:
    speed = speed_of(CPU, BIG, RECIPE, calibrations=(CALIBRATED,))
    # 8 micro-batches of 4 s and an update of 8 s for 16 x 2048 tokens.
    assert speed.source == "measured"
    assert speed.middle == pytest.approx(16 * 2048 / 40, rel=0.01)
    assert speed.low < speed.middle < speed.high
    newer = replace(CALIBRATED, micro_batch_s=1.0, at=200.0)
    assert speed_of(CPU, BIG, RECIPE, calibrations=(CALIBRATED, newer)).middle == pytest.approx(32768 / 16, rel=0.01)


def test_another_shapes_measurement_is_converted_by_arithmetic() -> None:
    half = replace(RECIPE, sequence_tokens=1024)
    speed = speed_of(CPU, BIG, half, calibrations=(CALIBRATED,))
    assert speed.source == "scaled"
    micro = 4.0 * train_flops(BIG, half) * 1024 / (train_flops(BIG, RECIPE) * 2048)
    assert speed.middle == pytest.approx(16 * 1024 / (8 * micro + 8.0), rel=0.05)


@pytest.mark.parametrize(
    "other",
    [
        replace(CALIBRATED, node="m"), replace(CALIBRATED, device="Xeon"), replace(CALIBRATED, twin="mlx"),
        replace(CALIBRATED, compute_dtype="float32"),
    ],
)  # fmt: skip
def test_measurements_of_other_devices_or_precisions_do_not_count(other: Calibration) -> None:
    assert speed_of(CPU, BIG, RECIPE, calibrations=(other,)).source == "table"


@pytest.mark.parametrize(
    ("shared", "part"),
    [
        (CPU, 2),
        (device("Apple M4"), 2),
        (device("NVIDIA GeForce RTX 4090", "cuda"), 2),
        (device("NVIDIA GeForce RTX 4090", "cuda", cards=2), 1),
    ],
)
def test_ranks_share_a_processor_a_gpu_or_a_card(shared: Device, part: int) -> None:
    measured = replace(CALIBRATED, device=shared.name, kind=shared.kind, twin=shared.twin)
    for calibrations in ((), (measured,)):
        one, two = (speed_of(shared, BIG, RECIPE, ranks=ranks, calibrations=calibrations) for ranks in (1, 2))
        assert two.middle == pytest.approx(one.middle / part)


def test_a_ring_moves_twice_the_gradient_but_for_its_own_part() -> None:
    assert reduce_seconds(2.08e9, 2, 117e6) == pytest.approx(17.8, rel=0.01)
    assert reduce_seconds(2.08e9, 4, 117e6) == pytest.approx(26.7, rel=0.01)
    assert reduce_seconds(2.08e9, 1, 117e6) == 0.0
