from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

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


def test_wsd_is_level_and_then_falls_along_a_line() -> None:
    spec = ScheduleSpec(kind="wsd", warmup_share=0.1, decay_share=0.4, final_share=0.2)
    assert learning_rate(spec, 1.0, 50, 1000) == pytest.approx(0.5)
    assert learning_rate(spec, 1.0, 100, 1000) == learning_rate(spec, 1.0, 600, 1000) == 1.0
    assert learning_rate(spec, 1.0, 800, 1000) == pytest.approx(0.6)
    assert learning_rate(spec, 1.0, 1000, 1000) == pytest.approx(0.2)


@pytest.mark.parametrize(("warmup", "decay"), [(0.0, 0.0), (0.3, 1.0), (0.0, 1.0), (1.0, 0.5)])
def test_wsd_without_warm_up_decay_or_level_part(warmup: float, decay: float) -> None:
    spec = ScheduleSpec(kind="wsd", warmup_share=warmup, decay_share=decay, final_share=0.0)
    rates = [learning_rate(spec, 1.0, done, 10) for done in range(1, 11)]
    assert max(rates) <= 1.0
    assert rates[-1] == pytest.approx(0.0 if decay and warmup < 1.0 else 1.0)
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


# -- the same curves as the libraries', over steps of equal tokens ------------------------------------

STEPS = 40


def ours(spec: ScheduleSpec) -> list[float]:
    return [learning_rate(spec, 0.5, 7 * step, 7 * STEPS) for step in range(1, STEPS + 1)]


def theirs(scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]) -> list[float]:
    """Rates after 1, 2, ... calls of step: theirs at position k is ours of the step that ends there."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    chosen = scheduler(optimizer)
    rates = []
    for _ in range(STEPS):
        optimizer.step()
        chosen.step()
        rates.append(chosen.get_last_lr()[0])
    return rates


def test_cosine_equals_transformers() -> None:
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    spec = ScheduleSpec(kind="cosine", warmup_share=0.25, final_share=0.1)
    reference = theirs(
        lambda optimizer: get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, num_warmup_steps=10, num_training_steps=STEPS, min_lr_rate=0.1
        )
    )
    assert ours(spec) == pytest.approx(reference)


def test_cosine_equals_torch() -> None:
    spec = ScheduleSpec(kind="cosine", warmup_share=0.0, final_share=0.1)
    reference = theirs(
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS, eta_min=0.05)
    )
    assert ours(spec) == pytest.approx(reference)


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_wsd_equals_transformers(final: float) -> None:
    from transformers import get_wsd_schedule

    spec = ScheduleSpec(kind="wsd", warmup_share=0.2, decay_share=0.5, final_share=final)
    reference = theirs(
        lambda optimizer: get_wsd_schedule(
            optimizer,
            num_warmup_steps=8,
            num_decay_steps=20,
            num_training_steps=STEPS,
            min_lr_ratio=final,
            warmup_type="linear",
            decay_type="linear",
        )
    )
    # Theirs begins its warm-up at the final share, ours at zero.
    first = 8 if final else 0
    assert ours(spec)[first:] == pytest.approx(reference[first:])
