"""The loop closes, for real: promotion, generation with the promoted model, rollback, export, chat."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jupiter_engine.api import Workspace
from jupiter_engine.errors import ExitCode
from tests.nano_workspace import make_workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def jupiter(root: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jupiter_engine.cli", argv[0], "--workspace", str(root), *argv[1:]]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loop")
    make_workspace(root)
    done = jupiter(root, "start", "--domain", "tiny", "--auto", "--cycles", "2", "--json")
    assert done.returncode == ExitCode.DONE, done.stdout[-3000:] + done.stderr
    (root / "events.jsonl").write_text(done.stdout)
    return root


def events(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]


def test_every_event_is_one_json_object_with_its_sequence(root: Path) -> None:
    entries = [e for e in events(root) if "entry" in e]
    sequence = [e["seq"] for e in entries]
    assert sequence == sorted(set(sequence))
    assert {"cycle_created", "stage_started", "stage_finished", "decision_made", "cycle_finished"} <= {
        e["entry"]["entry"] for e in entries
    }


def test_the_trained_nano_is_promoted_and_generates_next(root: Path) -> None:
    with Workspace(root) as workspace:
        first = workspace.state.cycles["tiny-0001"]
        assert first.decision is not None
        assert first.decision.verdict == "promote", first.decision.sentences
        assert {v.sample.generator for v in workspace.samples(domain="tiny", cycle=1)} == {"nano"}
        assert {v.sample.generator for v in workspace.samples(domain="tiny", cycle=2)} == {"tiny-0001"}


def test_the_second_cycle_repeats_nothing(root: Path) -> None:
    with Workspace(root) as workspace:
        assert workspace.state.cycles["tiny-0002"].stages["collect"].result["reused"] is True
        prepared = workspace.state.cycles["tiny-0002"].stages["prepare"].result
        assert prepared["model"] == workspace.state.cycles["tiny-0001"].stages["prepare"].result["model"]


def test_no_vault_text_was_trained_upon(root: Path) -> None:
    with Workspace(root) as workspace:
        snapshot = Path(workspace.state.cycles["tiny-0001"].stages["queue"].result["snapshot"])
        results = root / ".jupiter/runs/tiny-0001-collect/results/chunks.jsonl"
        chunks = [json.loads(line) for line in results.read_text().splitlines()]
        vault = [c["text"] for c in chunks if c["split"] == "vault"]
        assert vault
    code = (
        "import sys; from pathlib import Path; import json\n"
        "from jupiter_engine.data.queue.snapshot import read_snapshot\n"
        "from jupiter_engine.training.model.text import TextCodec\n"
        "snapshot = read_snapshot(Path(sys.argv[1])); codec = TextCodec(Path(sys.argv[2]))\n"
        "print(json.dumps(' '.join(codec.decode([int(t) for t in row]) for row in snapshot.tokens)))"
    )
    model = root / ".jupiter/models/nano"
    argv = [sys.executable, "-c", code, str(snapshot), str(model)]
    trained = json.loads(subprocess.run(argv, capture_output=True, text=True, check=True).stdout)
    for text in vault:
        for line in text.splitlines():
            # Short lines (headings, returns) are common to all documents.
            if len(line) > 120:
                assert line[:100] not in trained


def test_rollback_and_the_base_is_never_deleted(root: Path) -> None:
    with Workspace(root) as workspace:
        names = [g.name for g in workspace.state.generators["tiny"]]
    done = jupiter(root, "rollback", "--domain", "tiny", "--to", "nano", "--json")
    assert done.returncode == ExitCode.DONE, done.stderr
    assert json.loads(done.stdout)["name"] == "nano"
    listed = json.loads(jupiter(root, "generators", "--json").stdout)["tiny"]
    assert [g["name"] for g in listed] == names
    assert [g["name"] for g in listed if g["active"]] == ["nano"]
    assert (root / ".jupiter/models/nano/model.safetensors").exists()


def test_export_opens_in_stock_transformers_and_mlx_lm(root: Path, tmp_path: Path) -> None:
    target = tmp_path / "exported"
    done = jupiter(root, "export", "tiny-0001", str(target))
    assert done.returncode == ExitCode.DONE, done.stderr
    code = (
        "import sys, warnings; warnings.simplefilter('ignore'); folder = sys.argv[1]\n"
        "import torch, numpy as np; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "ids = tokenizer('def open(path): return path')['input_ids']\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)\n"
        "a = model(torch.tensor([ids])).logits[0].detach().numpy()\n"
        "import mlx.core as mx; from mlx_lm import load; other, same = load(folder)\n"
        "assert same.encode('def open(path): return path') == ids\n"
        "other.set_dtype(mx.float32); b = np.array(other(mx.array([ids]))[0])\n"
        "print(float(abs(a - b).max()))"
    )
    checked = subprocess.run([sys.executable, "-c", code, str(target)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr[-2000:]
    assert float(checked.stdout.splitlines()[-1]) < 1e-3


def test_chat_answers_with_a_named_model(root: Path) -> None:
    done = jupiter(root, "chat", "--model", "tiny-0001", "--prompt", "What opens?", "--max-new-tokens", "8")
    assert done.returncode == ExitCode.DONE, done.stderr
    assert "Traceback" not in done.stderr


def test_model_info_of_a_trained_model(root: Path) -> None:
    facts = json.loads(jupiter(root, "model-info", "--model", "tiny-0001", "--json").stdout)
    with Workspace(root) as workspace:
        model = workspace.state.cycles["tiny-0001"].stages["train"].result["model"]
    assert facts["sha256"] == model["sha256"]
    assert facts["parameters"] > 1_000_000
