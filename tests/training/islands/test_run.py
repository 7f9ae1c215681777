"""Whole runs with islands of one rank, in real processes on this machine."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors import safe_open

from jupiter_engine.checkpoints.model_folder import folder_sha256, verify
from jupiter_engine.protocol.facts import Metric
from jupiter_engine.protocol.specs import OptimizerSpec, RoundSpec
from jupiter_engine.training.distributed.islands import exchange
from tests.training.islands.runs import audit, ending, island_folder, islands, log_of, one_rank, start_hub, two_ranks
from tests.training.nano import INFO, make_run, recipe

pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize("payload", ["int8", "float32"])
def test_two_islands_train_one_model(payload: str, tmp_path: Path) -> None:
    # A fast machine makes all steps within one time-out: a limit in steps sees to several rounds.
    rounds = RoundSpec(round_s=200.0, grace_s=20.0, quorum=2, payload=payload, max_steps=8)  # type: ignore[arg-type]
    run = make_run(tmp_path, recipe(steps=60), islands(rounds, a=one_rank(), b=one_rank()))
    with ending(run):
        assert start_hub(run).wait(timeout=200) == 0, log_of(run)
    audit(run)
    result = run.events("finished")[0]["result"]
    target = Path(run.order.target)
    assert verify(target) == INFO
    assert result["model"]["sha256"] == folder_sha256(target)
    assert (result["steps"], result["rounds"]) == (60, len(run.metrics()))
    assert result["last_loss"] < result["first_loss"] - 1.0
    assert all(np.isfinite(value).all() for value in run.weights().values())
    # One warm-up for the whole run: no round begins another.
    rates = [metric.learning_rate for metric in run.metrics()]
    after = rates[rates.index(max(rates)) :]
    assert all(later <= 1.2 * rate for rate, later in pairwise(after))
    assert rates[-1] < 0.4 * run.order.recipe.optimizer.learning_rate
    with safe_open(target / "model.safetensors", "np") as file:
        assert file.metadata()["format"] == "pt"
    end = exchange.read(run.folder / "exchange" / exchange.END, exchange.End)
    assert end is not None
    assert end.reason == "done"
    for name in ("a", "b"):
        assert '"finished"' in (island_folder(run, name) / "events.jsonl").read_text(), log_of(run)
        assert result["islands"][name]["up_bytes"] > 0
    # Only what the last round needs is left.
    assert len(list((run.folder / "state").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_mlx_island_and_a_torch_island_of_two_ranks_train_one_model(tmp_path: Path) -> None:
    # Counted in steps: how many rounds there are must not depend on how busy the machine is.
    rounds = RoundSpec(round_s=200.0, grace_s=60.0, quorum=2, payload="bfloat16", max_steps=8)
    run = make_run(tmp_path, recipe(steps=64), islands(rounds, macs=two_ranks("mlx"), boxes=two_ranks("torch")))
    with ending(run):
        assert start_hub(run).wait(timeout=350) == 0, log_of(run)
    audit(run)
    result = run.events("finished")[0]["result"]
    assert result["last_loss"] < result["first_loss"] - 1.0
    assert verify(Path(run.order.target)) == INFO
    for name in ("macs", "boxes"):
        lines = (island_folder(run, name) / "metrics.jsonl").read_bytes().splitlines()
        ranks = {len(msgspec.json.decode(line, type=Metric).rank_seconds) for line in lines}
        assert ranks == {2}
        assert result["islands"][name]["up_bytes"] > 0


@pytest.mark.parametrize("update", ["full", "lora"])
def test_what_is_published_is_the_start_moved_by_what_was_learnt(update: str, tmp_path: Path) -> None:
    """One island, outer step 1 without momentum: the merged model is that island's own."""
    rounds = RoundSpec(
        round_s=100.0, grace_s=20.0, payload="float32", outer_learning_rate=1.0, outer_momentum=0.0, max_steps=5
    )
    wanted = recipe(steps=10, update=update, optimizer=OptimizerSpec(learning_rate=1e-2))
    run = make_run(tmp_path, wanted, islands(rounds, only=one_rank()))
    with ending(run):
        assert start_hub(run).wait(timeout=200) == 0, log_of(run)
    audit(run)
    alone = make_run(tmp_path, wanted, one_rank(), name="alone")
    with ending(alone):
        assert start_hub(alone).wait(timeout=200) == 0, log_of(alone)
    # The same rows in the same order, the same schedule: moments went on over the merge.
    for name, value in alone.weights().items():
        np.testing.assert_allclose(run.weights()[name], value, rtol=0, atol=2e-4)
    assert [metric.step for metric in run.metrics()] == [5, 10]
    together = sum(metric.loss * count for metric, count in zip(run.metrics(), [5, 5], strict=True)) / 10
    assert together == pytest.approx(sum(metric.loss for metric in alone.metrics()) / 10, rel=0.02)
