"""New models with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jupiter_engine.checkpoints.model_folder import folder_sha256, verify
from jupiter_engine.errors import UsageError
from jupiter_engine.protocol.shapes import PRESETS, parameter_count
from jupiter_engine.training.model.presets import preset_shape, to_bfloat16, write_scratch
from jupiter_engine.training.model.text import TextCodec


def test_the_same_seed_gives_the_same_bytes(tokenizer_folder: Path, tmp_path: Path) -> None:
    infos = [
        write_scratch(tmp_path / name, preset="nano", tokenizer=tokenizer_folder, seed=seed, dtype="bfloat16")
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    hashes = [folder_sha256(tmp_path / name) for name in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]
    assert verify(tmp_path / "a") == infos[0]
    assert infos[0].vocab_size == 640, "600 ids, rounded up to a multiple of 64"


EXACT = {
    "nano": 1_049_728, "125m": 114_838_272, "350m": 335_594_496, "500m": 490_272_000, "1b": 1_040_254_976,
    "3b": 2_919_410_688,
}  # fmt: skip
"""As transformers counts them (tests/backends/test_foreign_models.py asks it)."""


def test_presets_have_exactly_these_parameters() -> None:
    assert {name: parameter_count(preset.shape) for name, preset in PRESETS.items()} == EXACT
    one = PRESETS["1b"].shape
    assert (one.layers, one.hidden_size, one.intermediate_size, one.heads, one.kv_heads) == (16, 2048, 8192, 32, 8)
    assert (one.vocab_size, one.tied) == (32768, True)


def test_special_tokens_are_the_tokenizers(tokenizer_folder: Path, tmp_path: Path) -> None:
    info = write_scratch(tmp_path / "m", preset="nano", tokenizer=tokenizer_folder, seed=1)
    codec = TextCodec(tmp_path / "m")
    assert (info.bos_id, info.eos_ids, info.pad_id) == (codec.bos_id, codec.eos_ids, codec.pad_id) == (None, (2, 0), 0)


def test_weights_have_the_stated_spread(tokenizer_folder: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    write_scratch(tmp_path / "m", preset="nano", tokenizer=tokenizer_folder, seed=1)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    assert tensors["model.layers.0.self_attn.q_proj.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert tensors["model.layers.0.mlp.down_proj.weight"].std() == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert (tensors["model.norm.weight"] == 1).all()
    assert not np.array_equal(
        tensors["model.layers.0.mlp.gate_proj.weight"], tensors["model.layers.0.mlp.up_proj.weight"]
    )


def test_bfloat16_rounds_to_nearest_even() -> None:
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-7 - 2**-20, 0.0], dtype=np.float32)
    back = (to_bfloat16(values).astype(np.uint32) << 16).view(np.float32)
    assert back.tolist() == [1.0, 1.0, 1 + 2**-6, -1 - 2**-7, 0.0]


def test_an_unknown_preset_names_the_known() -> None:
    with pytest.raises(UsageError, match="7b") as caught:
        preset_shape("7b")
    assert "nano, 125m" in caught.value.fix
