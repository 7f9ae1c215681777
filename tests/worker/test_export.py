"""Exported models open in other programs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jupiter_engine.checkpoints.model_folder import folder_sha256, verify
from jupiter_engine.errors import ModelInvalid, UsageError
from jupiter_engine.worker import export, prepare


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("export") / "nano"
    prepare.make_nano(target, seed=0)
    return target


CARD = export.Card(
    name='py "expert"', license="apache-2.0", domain="python", facts={"Training tokens": "1.2M | 3"},
    sources=("stdlib (PSF-2.0)",), decision=("better by 0.04",),
)  # fmt: skip


def test_the_copy_is_the_model(nano: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "model"
    result = export.export_model(nano, target, CARD)
    assert verify(target) == verify(nano)
    assert (target / "model.safetensors").read_bytes() == (nano / "model.safetensors").read_bytes()
    assert result["sha256"] == folder_sha256(target)
    assert result["bytes"] == sum(path.stat().st_size for path in target.iterdir())
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(
        result["files"]
    )
    assert {path.stat().st_mode & 0o777 for path in target.iterdir()} == {0o644}


def test_the_card_states_the_facts(nano: Path) -> None:
    text = export.model_card(CARD, verify(nano), "model")
    front = text.split("---")[1]
    assert 'license: "apache-2.0"' in front
    assert '# py "expert"' in text
    assert "| Training tokens | 1.2M \\| 3 |" in text
    assert "| Parameters | 1.0M |" in text
    assert "- stdlib (PSF-2.0)" in text
    assert "- better by 0.04" in text
    bare = export.model_card(export.Card(), verify(nano), "model")
    assert "license:" not in bare
    assert "Trained on" not in bare


def test_a_full_folder_is_refused_and_untouched(nano: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UsageError, match="is not empty"):
        export.export_model(nano, tmp_path, export.Card())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_filled(nano: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    export.export_model(nano, tmp_path / "here", export.Card())
    verify(tmp_path / "here")


def test_a_damaged_model_is_not_exported(nano: Path, tmp_path: Path) -> None:
    prepare.make_nano(tmp_path / "m", seed=0)
    (tmp_path / "m" / "tokenizer.json").unlink()
    with pytest.raises(ModelInvalid, match=r"tokenizer\.json is missing"):
        export.export_model(tmp_path / "m", tmp_path / "out", export.Card())
    assert not (tmp_path / "out").exists()


def test_the_program_answers_in_json(nano: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    (tmp_path / "card.json").write_text(json.dumps({"name": "x"}))
    arguments = ["--model", str(nano), "--target", str(tmp_path / "out"), "--card", str(tmp_path / "card.json")]
    assert export.main(arguments) == 0
    assert json.loads(capsysbinary.readouterr().out)["parameters"] == 1_049_728
    assert export.main(arguments) == 2
    assert json.loads(capsysbinary.readouterr().out)["error"]["kind"] == "UsageError"
    (tmp_path / "card.json").write_text('{"nmae": "x"}')
    assert export.main([*arguments[:3], str(tmp_path / "other"), *arguments[4:]]) == 2
    assert b"nmae" in capsysbinary.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the other programs' own warnings are not ours to fix
def test_transformers_and_mlx_lm_open_it_and_agree(nano: Path, tmp_path: Path) -> None:
    import mlx.core as mx
    import mlx_lm
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from jupiter_engine.backends.torch.model import load_model
    from jupiter_engine.training.model.text import TextCodec

    target = tmp_path / "model"
    export.export_model(nano, target, CARD)
    messages = [{"role": "user", "content": "What is a list?"}]
    ids = TextCodec(nano).chat_prompt(messages)
    with torch.inference_mode():
        ours = load_model(nano, "float32")(torch.tensor([ids]))[0].numpy()
        theirs = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    np.testing.assert_allclose(theirs.numpy(), ours, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert (
        list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]) == ids
    )
    model, wrapped = mlx_lm.load(str(target))[:2]
    assert list(wrapped.apply_chat_template(messages, add_generation_prompt=True)) == ids
    model.set_dtype(mx.float32)
    np.testing.assert_allclose(np.array(model(mx.array([ids]))[0]), ours, atol=1e-4)
    answer = mlx_lm.generate(model, wrapped, prompt=ids, max_tokens=4)
    assert isinstance(answer, str)
