"""Model folders: what is refused and why, and publishing whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jupiter_engine.checkpoints.model_folder import (
    ModelInfo,
    folder_sha256,
    publish,
    verify,
    write_config,
)
from jupiter_engine.errors import ModelInvalid
from jupiter_engine.protocol.shapes import tensor_shapes

INFO = ModelInfo(
    vocab_size=20, hidden_size=8, layers=2, heads=2, kv_heads=1, head_dim=4, intermediate_size=12, context=32,
    rope_theta=50000.0, tied=False, dtype="bfloat16", bos_id=1, eos_ids=(2,), pad_id=0,
)  # fmt: skip


def write_weights(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(offset))


def write_model(folder: Path, info: ModelInfo = INFO, ids: int = 20) -> Path:
    folder.mkdir(exist_ok=True)
    write_config(folder, info)
    write_weights(folder / "model.safetensors", tensor_shapes(info))
    vocab = {f"t{one}": one for one in range(ids)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": []}))
    return folder


def edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(values)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "DROP"}))


def refused(folder: Path) -> ModelInvalid:
    with pytest.raises(ModelInvalid) as caught:
        verify(folder)
    assert caught.value.fix
    return caught.value


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_written_is_read_back(tmp_path: Path, tied: bool) -> None:
    info = msgspec.structs.replace(INFO, tied=tied)
    assert verify(write_model(tmp_path / "m", info)) == info


def test_config_serves_transformers_and_mlx_lm(tmp_path: Path) -> None:
    values = json.loads((write_model(tmp_path / "m") / "config.json").read_text())
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 50000.0
    assert values["tie_word_embeddings"] is False
    assert values["eos_token_id"] == 2
    assert values["architectures"] == ["LlamaForCausalLM"]


def test_llama3_scaling_survives(tmp_path: Path) -> None:
    scaling: dict[str, float | str] = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16.0,
    }  # fmt: skip
    info = msgspec.structs.replace(INFO, rope_scaling=scaling)
    assert verify(write_model(tmp_path / "m", info)).rope_scaling == scaling


def test_every_missing_and_misshapen_tensor_is_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    shapes = tensor_shapes(INFO)
    del shapes["lm_head.weight"], shapes["model.layers.1.mlp.up_proj.weight"]
    shapes["model.norm.weight"] = (9,)
    shapes["model.layers.0.self_attn.q_proj.bias"] = (8,)
    write_weights(folder / "model.safetensors", shapes)
    detail = refused(folder).detail
    assert "lm_head.weight is missing" in detail
    assert "model.layers.1.mlp.up_proj.weight is missing" in detail
    assert "model.norm.weight has shape [9], config.json asks for [8]" in detail
    assert "model.layers.0.self_attn.q_proj.bias is unexpected" in detail


def test_a_second_copy_of_a_tied_projection_is_accepted(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", msgspec.structs.replace(INFO, tied=True))
    write_weights(folder / "model.safetensors", tensor_shapes(INFO))
    assert verify(folder).tied


YARN = {"rope_type": "yarn", "rope_theta": 50000.0, "factor": 2.0, "original_max_position_embeddings": 16}


def settings(folder: Path, **values: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda f: f.rename(f.with_name("gone")), "is no folder"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json is missing"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json cannot be read"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), r"config\.json cannot be read"),
    "no layers key": (lambda f: edit_config(f, num_hidden_layers="DROP"), "num_hidden_layers"),
    "other architecture": (lambda f: edit_config(f, model_type="qwen2"), "qwen2"),
    "sliding window": (lambda f: edit_config(f, model_type="mistral", sliding_window=16), "window of 16 tokens"),
    "sliding layers": (
        lambda f: edit_config(f, layer_types=["full_attention", "sliding_attention"], sliding_window=16),
        "window of 16 tokens",
    ),
    "long mistral of old": (
        lambda f: edit_config(f, model_type="mistral", max_position_embeddings=8192),
        "window of 4096 tokens and a context of 8192",
    ),
    "MLP bias": (lambda f: edit_config(f, mlp_bias=True), "MLP biases"),
    "interleaved rope": (lambda f: edit_config(f, rope_traditional=True), "interleaved"),
    "odd head": (lambda f: edit_config(f, head_dim=3), "needs an even one"),
    "no head_dim": (lambda f: edit_config(f, head_dim=None, num_attention_heads=3, num_key_value_heads=3), "multiple"),
    "bias": (lambda f: edit_config(f, attention_bias=True), "attention biases"),
    "quantised": (lambda f: edit_config(f, quantization={"bits": 4}), "quantised"),
    "activation": (lambda f: edit_config(f, hidden_act="gelu"), "gelu"),
    "two thetas": (lambda f: edit_config(f, rope_theta=10000.0), "two values of rope_theta"),
    "rope without its factor": (lambda f: edit_config(f, rope_parameters={"rope_type": "yarn"}), "factor"),
    "dynamic rope": (lambda f: edit_config(f, rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "'dynamic'"),
    "longrope": (lambda f: edit_config(f, rope_scaling={"type": "longrope", "factor": 2.0}), "'longrope'"),
    "two scalings": (
        lambda f: edit_config(f, rope_scaling={"type": "linear", "factor": 2.0}),
        "different RoPE scalings",
    ),
    "two kinds": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "linear", "type": "default", "factor": 2.0}),
        "name different scalings",
    ),
    "partial rope": (lambda f: edit_config(f, partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    "own attention factor": (
        lambda f: edit_config(f, rope_parameters={**YARN, "attention_factor": 2.0}),
        "attention_factor",
    ),
    "mscale": (lambda f: edit_config(f, rope_parameters={**YARN, "mscale_all_dim": 1.0}), "mscale_all_dim"),
    "theta": (lambda f: edit_config(f, rope_parameters={}, rope_theta=0.5), "larger than 1"),
    "heads": (lambda f: edit_config(f, num_attention_heads=3, num_key_value_heads=2), "no multiple"),
    "zero": (lambda f: edit_config(f, num_attention_heads=0), "smaller than 1"),
    "negative id": (
        lambda f: (f / "tokenizer.json").write_text('{"model": {"vocab": {"a": -1, "b": 0}}}'),
        "the token id -1",
    ),
    "bos outside": (lambda f: edit_config(f, bos_token_id=20), "bos_token_id 20"),
    "pad outside": (lambda f: edit_config(f, pad_token_id=99), "pad_token_id 99"),
    "id no number": (lambda f: edit_config(f, eos_token_id=True), "no token id"),
    "other bos": (lambda f: settings(f, bos_token="t3"), "has the id 3, config.json says bos_token_id 1"),
    "other eos": (lambda f: settings(f, eos_token={"content": "t4"}), "has the id 4, config.json says eos_token_id 2"),
    "unknown special token": (lambda f: settings(f, pad_token="<pad>"), "tokenizer.json does not hold"),
    "added token beyond": (
        lambda f: settings(f, added_tokens_decoder={"20": {"content": "<tool>"}}),
        "'<tool>' has the id 20",
    ),
    "added token beyond, older file": (
        lambda f: (f / "added_tokens.json").write_text('{"<tool>": 21}'),
        "'<tool>' has the id 21",
    ),
    "added tokens odd": (lambda f: settings(f, added_tokens_decoder={"x": {}}), "added tokens"),
    "eos outside": (lambda f: edit_config(f, eos_token_id=20), "eos_token_id 20"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"holds no model\.safetensors"),
    "cut weights": (lambda f: cut(f / "model.safetensors", -1), "its header asks for"),
    "cut header": (lambda f: cut(f / "model.safetensors", 40), "truncated"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "truncated"),
    "float64": (lambda f: write_weights(f / "model.safetensors", tensor_shapes(INFO), "F64"), "F64"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
    "odd tokenizer": (lambda f: (f / "tokenizer.json").write_text('{"model": 3}'), "vocabulary"),
    "no ids": (lambda f: (f / "tokenizer.json").write_text('{"model": {"vocab": {}}}'), "vocabulary"),
}


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    folder = write_model(tmp_path / "m")
    verify(folder)
    act, words = DAMAGE[damage]
    act(folder)
    with pytest.raises(ModelInvalid, match=words):
        verify(folder)


def test_what_config_json_leaves_open_is_the_tokenizers(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    edit_config(folder, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    settings(folder, bos_token="t1", eos_token="t5", pad_token="t0")
    info = verify(folder)
    assert (info.bos_id, info.eos_ids, info.pad_id) == (1, (5,), 0)


def test_one_of_several_eos_ids_and_another_pad_are_no_contradiction(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    edit_config(folder, eos_token_id=[2, 7], pad_token_id=-1)
    settings(folder, eos_token="t7", pad_token="t2")
    info = verify(folder)
    assert (info.eos_ids, info.pad_id) == ((2, 7), 2)


@pytest.mark.parametrize("window", [None, 32, 4096])
def test_a_window_that_covers_the_context_is_accepted(tmp_path: Path, window: int | None) -> None:
    folder = write_model(tmp_path / "m")
    edit_config(folder, model_type="mistral", sliding_window=window)
    assert verify(folder) == INFO


def test_a_unigram_vocabulary_is_read(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    vocab = [[f"t{one}", -1.0] for one in range(20)]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    assert verify(folder) == INFO
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [*vocab, ["t20", -1.0]]}}))
    assert "ids up to 20" in refused(folder).detail


ROPES: dict[str, tuple[dict[str, object], dict[str, float | str] | None]] = {
    "old, plain": ({"rope_theta": 7.0, "rope_scaling": None}, None),
    "old, linear": (
        {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2}},
        {"rope_type": "linear", "factor": 2.0},
    ),
    "both, equal": (
        {
            "rope_theta": 7.0,
            "rope_scaling": {"type": "linear", "factor": 2},
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0},
        },
        {"rope_type": "linear", "factor": 2.0},
    ),
    "new, yarn": (
        {"rope_parameters": {**YARN, "rope_theta": 7.0, "attention_factor": 1.0693147180559945, "truncate": True}},
        {
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 16.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
    ),
}


@pytest.mark.parametrize("form", ROPES)
def test_rope_is_read_from_either_form_and_written_in_both(tmp_path: Path, form: str) -> None:
    keys, scaling = ROPES[form]
    folder = write_model(tmp_path / "m")
    edit_config(folder, **{"rope_theta": "DROP", "rope_parameters": "DROP", "rope_scaling": "DROP", **keys})
    info = verify(folder)
    assert (info.rope_theta, info.rope_scaling) == (7.0, scaling)
    write_config(folder, info)
    written = json.loads((folder / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 7.0
    assert written.get("rope_scaling", {"rope_type": "default"}) == {
        key: value for key, value in written["rope_parameters"].items() if key != "rope_theta"
    }
    assert verify(folder) == info


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    assert "ids up to 20, the embedding has 20 rows" in refused(write_model(tmp_path / "m", ids=21)).detail


def test_mistral_without_a_window_is_a_llama(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    edit_config(folder, model_type="mistral", sliding_window=None)
    assert verify(folder) == INFO


def test_weights_in_several_files(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    shapes = tensor_shapes(INFO)
    halves = [dict(list(shapes.items())[:5]), dict(list(shapes.items())[5:])]
    names = ["model-1.safetensors", "model-2.safetensors"]
    for name, half in zip(names, halves, strict=True):
        write_weights(folder / name, half)
    index = {"weight_map": {key: name for name, half in zip(names, halves, strict=True) for key in half}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert verify(folder) == INFO
    (folder / names[1]).unlink()
    assert names[1] in refused(folder).detail


def test_the_hash_covers_what_matters(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    before = folder_sha256(folder)
    (folder / "README.md").write_text("x")
    assert folder_sha256(folder) == before
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert folder_sha256(folder) != before
    edited = folder_sha256(folder)
    edit_config(folder, rms_norm_eps=1e-4)
    assert folder_sha256(folder) != edited


def test_publish_is_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"

    def fail() -> None:
        with publish(target) as folder:
            (folder / "a").write_text("half")
            assert not target.exists()
            raise RuntimeError("mid-write")

    with pytest.raises(RuntimeError, match="mid-write"):
        fail()
    assert list(target.parent.iterdir()) == []
    with publish(target) as folder:
        (folder / "a").write_text("first")
        (folder / "a").chmod(0o600)
    assert (target / "a").stat().st_mode & 0o777 == 0o644
    with publish(target) as folder:
        (folder / "b").write_text("second")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_publish_clears_a_killed_writers_leftover(tmp_path: Path) -> None:
    leftover = tmp_path / ".model.partial"
    leftover.mkdir()
    (leftover / "half").write_text("x")
    with publish(tmp_path / "model") as folder:
        assert list(folder.iterdir()) == []
        (folder / "a").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
