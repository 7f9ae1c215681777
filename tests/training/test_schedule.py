from __future__ import annotations

import pytest

from jupiter_engine.protocol.specs import ScheduleSpec
from jupiter_engine.training.schedule import learning_rate

COSINE = ScheduleSpec(kind="cosine", warmup_share=0.1, final_share=0.1)


def test_warm_up_is_linear_over_tokens_and_starts_above_zero() -> None:
    assert learning_rate(COSINE, 1.0, 1, 1000) == pytest.approx(0.01)
    assert learning_rate(COSINE, 1.0, 50, 1000) == pytest.approx(0.5)
    assert learning_rate(COSINE, 1.0, 100, 1000) == pytest.approx(1.0)


def test_cosine_is_half_way_down_in_the_middle_and_ends_at_the_final_share() -> None:
    assert learning_rate(COSINE, 2.0, 550, 1000) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert learning_rate(COSINE, 2.0, 1000, 1000) == pytest.approx(0.2)


def test_constant_stays_at_the_peak_after_the_warm_up() -> None:
    spec = ScheduleSpec(kind="constant", warmup_share=0.2)
    assert learning_rate(spec, 3.0, 100, 1000) == pytest.approx(1.5)
    assert learning_rate(spec, 3.0, 200, 1000) == 3.0
    assert learning_rate(spec, 3.0, 1000, 1000) == 3.0


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_warm_up_and_only_warm_up_are_both_possible(share: float) -> None:
    spec = ScheduleSpec(kind="cosine", warmup_share=share, final_share=0.5)
    rates = [learning_rate(spec, 1.0, done, 10) for done in range(1, 11)]
    expected = sorted(rates, reverse=share == 0.0)
    assert rates == expected
    assert rates[-1] == pytest.approx(0.5 if share == 0.0 else 1.0)


@pytest.mark.parametrize("done", [0, 1001])
def test_a_position_outside_the_run_is_refused(done: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.1000"):
        learning_rate(COSINE, 1.0, done, 1000)
