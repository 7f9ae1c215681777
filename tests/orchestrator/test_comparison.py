"""Two trainings side by side."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jupiter_engine.orchestrator.comparison import compare, differing, loss_at, summarise
from jupiter_engine.protocol.facts import Metric


def metric(step: int, *, tokens: int, loss: float, **changes: object) -> Metric:
    values: dict[str, object] = {
        "step": step,
        "tokens": tokens,
        "loss": loss,
        "learning_rate": 1e-4,
        "grad_norm": 1.0,
        "tokens_per_s": 100.0,
        "seconds": 2.0,
        "at": float(step),
        **changes,
    }
    return Metric(**values)  # type: ignore[arg-type]


def falling(steps: int, tokens_a_step: int, rate: float) -> list[Metric]:
    """A loss that depends on the trained tokens alone."""
    tokens = [tokens_a_step * (i + 1) for i in range(steps)]
    return [metric(i + 1, tokens=t, loss=5.0 * math.exp(-rate * t / 10_000)) for i, t in enumerate(tokens)]


def test_losses_are_compared_at_equal_tokens_not_at_equal_steps() -> None:
    small, large = falling(400, 100, 1.0), falling(50, 800, 1.0)
    found = compare(small, large, {}, {})
    assert [place.tokens for place in found.curve][-1] == 40_000
    # The same function of tokens: what is left is the width of the mean.
    assert all(abs(place.a - place.b) < 0.2 for place in found.curve)
    worse = compare(small, falling(50, 800, 0.5), {}, {})
    assert all(place.b > place.a for place in worse.curve[1:])


def test_runs_of_different_length_are_compared_over_what_both_have() -> None:
    found = compare(falling(10, 100, 1.0), falling(40, 100, 1.0), {}, {})
    assert [place.tokens for place in found.curve][-1] == 1000
    assert len(found.curve) == 10


def test_a_run_that_ends_before_the_others_first_step_shares_nothing() -> None:
    assert compare(falling(1, 10, 1.0), falling(3, 1000, 1.0), {}, {}).curve == ()


def test_summary_takes_the_best_held_out_loss_and_the_greatest_memory() -> None:
    metrics = [
        metric(1, tokens=10, loss=3.0, held_out_loss=2.9, peak_bytes=(5, 9), mfu=0.2),
        metric(2, tokens=20, loss=2.0, held_out_loss=2.5, peak_bytes=(6, 8), mfu=0.4),
        metric(3, tokens=30, loss=1.0, held_out_loss=2.7, peak_bytes=(6, 8)),
    ]
    found = summarise(metrics)
    assert (found.held_out_loss, found.held_out_step) == (2.5, 2)
    assert found.peak_bytes == 9
    assert found.mfu == pytest.approx(0.3)
    assert found.last_loss == 1.0
    assert found.seconds == 6.0
    assert found.waiting_share is None


def test_waiting_is_a_share_of_all_ranks_time() -> None:
    one = metric(
        1,
        tokens=10,
        loss=1.0,
        rank_seconds=(3.0, 1.0),
        data_seconds=(0.1, 0.1),
        communication_seconds=(0.4, 0.4),
        idle_seconds=(0.0, 2.0),
    )
    assert summarise([one]).waiting_share == pytest.approx(3.0 / 7.0)


def test_settings_that_differ_are_named_by_their_path() -> None:
    a = {"training": {"steps": 12, "optimizer": {"name": "adamw"}}, "sources": [{"id": "x"}], "same": [1, 2]}
    b = {"training": {"steps": 24, "optimizer": {"name": "muon"}}, "sources": [{"id": "y"}], "same": [1, 2], "new": 1}
    assert differing(a, b) == {
        "training.steps": ("12", "24"),
        "training.optimizer.name": ('"adamw"', '"muon"'),
        "sources[0].id": ('"x"', '"y"'),
        "new": ("-", "1"),
    }


@given(st.lists(st.floats(0.1, 9.0), min_size=1, max_size=30), st.integers(0, 400), st.integers(1, 200))
def test_loss_at_stays_within_the_losses(losses: list[float], tokens: int, window: int) -> None:
    metrics = [metric(i + 1, tokens=10 * (i + 1), loss=loss) for i, loss in enumerate(losses)]
    assert min(losses) - 1e-9 <= loss_at(metrics, tokens, window) <= max(losses) + 1e-9
