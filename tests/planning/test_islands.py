from __future__ import annotations

import pytest

from jupiter_engine.planning.islands import loss_penalty, round_cost


def test_measured_points_are_met() -> None:
    """Scaling Laws for DiLoCo, tables 4 and 5."""
    for parameters, islands, percent in (
        (1.3e9, 1, -0.4),
        (35e6, 2, 0.7),
        (180e6, 4, 1.1),
        (1.3e9, 2, 0.2),
        (1.3e9, 8, 1.3),
        (10e9, 4, 0.29),
    ):
        assert loss_penalty(parameters, islands) == pytest.approx(percent / 100)


def test_between_them_lies_what_lies_between_and_outside_the_nearest_counts() -> None:
    assert 0.003 < loss_penalty(125e6, 2) < 0.005
    assert loss_penalty(1e6, 4) == loss_penalty(35e6, 4)
    assert loss_penalty(70e9, 4) == loss_penalty(10e9, 4)
    assert loss_penalty(7e9, 8) == loss_penalty(2.4e9, 8)  # not measured beyond
    assert loss_penalty(1.3e9, 2) < loss_penalty(1.3e9, 3) < loss_penalty(1.3e9, 4)
    assert loss_penalty(35e6, 8) < loss_penalty(35e6, 16)


def test_rounds_cost_what_the_table_says_twice_over() -> None:
    """1.04 G weights over 1 GbE in bfloat16, both ways: 37 s by the sum (distributed training notes), twice said."""
    cost = round_cost(1.04e9, payload="bfloat16", bytes_per_s=117e6, round_s=600)
    assert cost.seconds == pytest.approx(2 * 36, rel=0.03)
    assert cost.share == pytest.approx(cost.seconds / (cost.seconds + 600))
    assert round_cost(1.04e9, payload="int8", bytes_per_s=117e6, round_s=600).seconds < 0.51 * cost.seconds
