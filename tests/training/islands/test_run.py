"""Whole runs with islands of one rank, in real processes on this machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from jupiter_engine.checkpoints.model_folder import folder_sha256, verify
from jupiter_engine.protocol.specs import RoundSpec
from jupiter_engine.training.distributed.islands import exchange
from tests.training.islands.runs import audit, ending, island_folder, islands, log_of, one_rank, start_hub
from tests.training.nano import INFO, make_run, recipe

pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize("payload", ["int8", "float32"])
def test_two_islands_train_one_model(payload: str, tmp_path: Path) -> None:
    rounds = RoundSpec(round_s=0.5, grace_s=20.0, quorum=2, payload=payload)  # type: ignore[arg-type]
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
    with safe_open(target / "model.safetensors", "np") as file:
        assert file.metadata()["format"] == "pt"
    assert exchange.read(run.folder / "exchange" / exchange.END, exchange.End) == exchange.End(reason="done")
    for name in ("a", "b"):
        assert '"finished"' in (island_folder(run, name) / "events.jsonl").read_text(), log_of(run)
        assert result["islands"][name]["up_bytes"] > 0
    # Only what the last round needs is left.
    assert len(list((run.folder / "state").iterdir())) == 1
