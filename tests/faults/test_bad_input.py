"""Bad input ends at once, with words, the documented exit status, and nothing lost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jupiter_engine.api import Workspace
from jupiter_engine.errors import ExitCode
from jupiter_engine.worker.prepare import make_nano
from tests.nano_workspace import DOMAIN, make_workspace

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound model folder, made once."""
    folder = tmp_path_factory.mktemp("model") / "nano"
    make_nano(folder, seed=0)
    return folder


def auto(root: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "jupiter_engine.cli", "start", "--workspace", str(root), "--domain", "tiny", "--auto"]
    return subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


def with_base(root: Path, model: Path) -> None:
    make_workspace(root, domain=DOMAIN.replace("base: nano", f"base: {model}"))


def test_an_empty_corpus(tmp_path: Path) -> None:
    make_workspace(tmp_path)
    shutil.rmtree(tmp_path / "config/domains/corpus")
    (tmp_path / "config/domains/corpus").mkdir()
    done = auto(tmp_path)
    assert done.returncode == ExitCode.NOT_ENOUGH_DATA
    assert "collect: FAILED - The corpus is empty" in done.stdout
    assert "notes" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_a_corpus_that_is_filled_after_the_failure_continues(tmp_path: Path) -> None:
    make_workspace(tmp_path)
    corpus = tmp_path / "config/domains/corpus"
    corpus.rename(tmp_path / "away")
    corpus.mkdir()
    assert auto(tmp_path).returncode == ExitCode.NOT_ENOUGH_DATA
    corpus.rmdir()
    (tmp_path / "away").rename(corpus)
    done = auto(tmp_path)
    assert done.returncode == ExitCode.DONE, done.stdout[-2000:]
    with Workspace(tmp_path) as workspace:
        assert list(workspace.state.cycles) == ["tiny-0001"]


def test_a_model_folder_with_a_missing_tensor(tmp_path: Path, nano: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(nano, model)
    path = model / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    del header["model.layers.1.mlp.up_proj.weight"]
    changed = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(data[:8] + changed + data[8 + length :])
    with_base(tmp_path / "w", model)
    done = auto(tmp_path / "w")
    assert done.returncode == ExitCode.STAGE_FAILED
    assert "model.layers.1.mlp.up_proj.weight" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "w/.jupiter/runs/tiny-0001-collect").exists()


def test_a_tokenizer_larger_than_the_model(tmp_path: Path, nano: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(nano, model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(
        {
            "id": 999_999,
            "content": "<beyond>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    )
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with_base(tmp_path / "w", model)
    done = auto(tmp_path / "w")
    assert done.returncode == ExitCode.STAGE_FAILED
    assert "prepare: FAILED" in done.stdout
    assert "embedding" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_a_base_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with_base(tmp_path / "w", tmp_path / "empty")
    done = auto(tmp_path / "w")
    assert done.returncode == ExitCode.USAGE
    assert "config.json" in done.stderr
    assert "tiny.yaml" in done.stderr


def test_a_machine_too_small_for_the_model_is_said_before_it_is_made(tmp_path: Path) -> None:
    # Full training of 3b takes about 55 GB of memory and 36 GB a checkpoint; four of those are kept.
    domain = DOMAIN.replace("  sequence_tokens: 32", "  start: scratch\n  preset: 3b\n  sequence_tokens: 32")
    domain = domain.replace("checkpoint_every_steps: 3", "checkpoint_every_steps: 3\n  keep_checkpoints: 1000")
    make_workspace(tmp_path, domain=domain)
    done = auto(tmp_path)
    assert done.returncode in (ExitCode.STAGE_FAILED, ExitCode.NO_NODE)
    said = done.stdout + done.stderr
    assert "The disk is full" in said or "which allows" in said
    assert not (tmp_path / ".jupiter/runs/tiny-0001-train/start").exists()
    assert "Traceback" not in done.stdout + done.stderr
