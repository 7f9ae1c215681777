"""A model from scratch with a tokenizer of its own, through whole real cycles: every stage uses each model's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jupiter_engine.api import Workspace
from jupiter_engine.errors import ExitCode
from tests.faults.test_loop import jupiter
from tests.nano_workspace import DOMAIN, make_workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SCRATCH = (
    DOMAIN.replace(
        "training:\n",
        "training:\n  start: scratch\n  preset: nano\n  tokenizer: corpus\n  vocabulary: 600\n"
        "  early_stop: {every_steps: 4, sequences: 3}\n",
    )
    .replace("slices: 1", "slices: 2")
    .replace("mcq_vault: 4", "mcq_vault: 0")
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scratch")
    make_workspace(root, domain=SCRATCH)
    done = jupiter(root, "start", "--domain", "tiny", "--auto", "--cycles", "2", "--json")
    assert done.returncode == ExitCode.DONE, done.stdout[-3000:] + done.stderr
    return root


def test_the_candidate_speaks_its_own_tokenizer(root: Path) -> None:
    with Workspace(root) as workspace:
        stages = workspace.state.cycles["tiny-0001"].stages
        queue, trained = stages["queue"].result, stages["train"].result
    own = Path(queue["tokenizer"]) / "tokenizer.json"
    candidate = Path(trained["model"]["folder"])
    base = root / ".jupiter/models/nano/tokenizer.json"
    assert (candidate / "tokenizer.json").read_bytes() == own.read_bytes() != base.read_bytes()
    config = json.loads((candidate / "config.json").read_text())
    assert config["vocab_size"] == 640
    assert (config["eos_token_id"], config["pad_token_id"]) == ([2, 0], 0)


def test_both_are_measured_on_the_same_bytes_and_a_decision_falls(root: Path) -> None:
    with Workspace(root) as workspace:
        cycle = workspace.state.cycles["tiny-0001"]
        assert cycle.decision is not None
        # The untrained base with its own tokenizer against a model that has learnt the text: bits per byte compare.
        assert cycle.decision.verdict == "promote", cycle.decision.sentences
        scores = Path(cycle.stages["evaluate"].result["scores_path"])
    rows = [json.loads(line) for line in scores.read_text().splitlines()]
    windows: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["task"] == "vault_bpb":
            windows.setdefault(row["model"], {})[row["unit"]] = row["weight"]
    first, second = windows.values()
    assert first == second, "the same windows of the same number of bytes"


def test_the_held_out_text_is_not_the_looks(root: Path) -> None:
    with Workspace(root) as workspace:
        snapshot = Path(workspace.state.cycles["tiny-0001"].stages["queue"].result["snapshot"])
    manifest = json.loads((snapshot / "manifest.json").read_text())
    assert manifest["held_out"]["slice"] == 1, "the first look measures with slice 0"
    assert manifest["held_out"]["sequences"] == 3


def test_the_next_cycle_generates_with_the_promoted_model(root: Path) -> None:
    with Workspace(root) as workspace:
        assert {view.sample.generator for view in workspace.samples(domain="tiny", cycle=2)} == {"tiny-0001"}
        assert workspace.state.cycles["tiny-0002"].status == "finished"
