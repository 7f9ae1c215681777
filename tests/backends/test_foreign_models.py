"""Model folders of the families that people start from: written by transformers, read here; written here, read there.

Tiny random models with the traits of the real ones (head sizes, grouping, theta, scaling, tying).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from jupiter_engine.backends.mlx import model as mlx_model
from jupiter_engine.backends.mlx.rotary import rotary_periods
from jupiter_engine.backends.torch import model as torch_model
from jupiter_engine.backends.torch.rotary import rotary_frequencies
from jupiter_engine.checkpoints.model_folder import copy_text_files, publish, verify, write_config
from jupiter_engine.protocol.shapes import PRESETS, parameter_count

import mlx.core as mx  # isort: skip - after backends.mlx, which readies its BLAS
import torch  # isort: skip - after backends.torch, which sets its waiting policy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # transformers' own warnings are not ours to fix
]

_SIZES: dict[str, Any] = {
    "vocab_size": 320, "num_hidden_layers": 2, "intermediate_size": 56, "initializer_range": 0.15,
    "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "smollm2": {
        "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    "llama-3.2-1b": {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    },
    "tinyllama": {
        "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "mistral": {
        # As in Mistral Nemo, heads x head_dim is not the hidden size.
        "hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "linear": {
        "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    },
    "yarn": {
        "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32,
        },
    },
}  # fmt: skip
Logits = npt.NDArray[np.float32]
TOKENS = np.random.default_rng(3).integers(0, 300, (2, 200))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory, tiny_folders: dict[str, Path]) -> dict[str, tuple[Path, Logits]]:
    """(folder as transformers writes it, logits as transformers computes them) of each family."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    root = tmp_path_factory.mktemp("foreign")
    found = {}
    for number, (family, values) in enumerate(FAMILIES.items()):
        torch.manual_seed(number)
        if family == "mistral":
            model: Any = MistralForCausalLM(MistralConfig(**_SIZES, **values))
        else:
            model = LlamaForCausalLM(LlamaConfig(**_SIZES, **values))
        model.save_pretrained(root / family)
        copy_text_files(tiny_folders["plain"], root / family)
        found[family] = root / family, theirs(model)
    return found


def theirs(model: Any) -> Logits:
    with torch.inference_mode():
        return np.asarray(model.eval()(torch.from_numpy(TOKENS)).logits.float().numpy())


def ours(folder: Path) -> dict[str, Logits]:
    with torch.inference_mode():
        one = torch_model.load_model(folder, "float32")(torch.from_numpy(TOKENS)).numpy()
    return {"torch": np.asarray(one), "mlx": np.array(mlx_model.load_model(folder, "float32")(mx.array(TOKENS)))}


def close(found: Logits, wanted: Logits) -> None:
    """Equal but for float32 rounding, relative to the largest logit."""
    scale = float(np.abs(wanted).max())
    assert scale > 0.5, "logits near zero would agree whatever is computed"
    np.testing.assert_allclose(found / scale, wanted / scale, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_transformers_is_computed_as_transformers_does(
    foreign: dict[str, tuple[Path, Logits]], family: str
) -> None:
    folder, wanted = foreign[family]
    info = verify(folder)
    assert info.rope_theta == FAMILIES[family]["rope_parameters"]["rope_theta"]
    assert info.tied == FAMILIES[family]["tie_word_embeddings"]
    for logits in ours(folder).values():
        close(logits, wanted)


@pytest.mark.parametrize("twin", ["torch", "mlx"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_ours_is_computed_alike_by_transformers_and_mlx_lm(
    foreign: dict[str, tuple[Path, Logits]], tmp_path: Path, family: str, twin: str
) -> None:
    from mlx_lm.utils import load_model
    from transformers import AutoModelForCausalLM

    folder, wanted = foreign[family]
    module: Any = {"torch": torch_model, "mlx": mlx_model}[twin]
    with publish(tmp_path / "m") as target:
        module.save_model(module.load_model(folder, "float32"), target, "float32")
        write_config(target, verify(folder))
        copy_text_files(folder, target)
    assert verify(tmp_path / "m") == verify(folder)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert model.config.tie_word_embeddings == FAMILIES[family]["tie_word_embeddings"]
    assert (model.config.eos_token_id, model.config.pad_token_id) == (2, 0)
    close(theirs(model), wanted)
    close(np.array(load_model(tmp_path / "m")[0](mx.array(TOKENS))), wanted)


@pytest.mark.parametrize("key", ["rope_theta", "scaling"])
def test_the_families_would_differ_without_their_rope(foreign: dict[str, tuple[Path, Logits]], key: str) -> None:
    """The comparisons above see RoPE: with another one the logits are far off."""
    folder, wanted = foreign["llama-3.2-1b"]
    model = torch_model.load_model(folder, "float32")
    info = verify(folder)
    if key == "scaling":
        model.frequencies = rotary_frequencies(info, None)
    else:
        model.frequencies = rotary_frequencies(verify(foreign["tinyllama"][0]), info.rope_scaling)[:1].repeat(8)
    with torch.inference_mode():
        changed = model(torch.from_numpy(TOKENS)).numpy()
    assert np.abs(changed - wanted).max() / np.abs(wanted).max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_angles_are_those_of_transformers(foreign: dict[str, tuple[Path, Logits]], family: str) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    folder, _ = foreign[family]
    info = verify(folder)
    rope = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder))
    frequencies = rotary_frequencies(info, info.rope_scaling)
    np.testing.assert_allclose(frequencies.numpy(), rope.inv_freq.numpy(), rtol=3e-7)
    np.testing.assert_allclose(np.array(1 / rotary_periods(info, info.rope_scaling)), rope.inv_freq.numpy(), rtol=2e-6)
    assert info.attention_scale == pytest.approx(info.head_dim**-0.5 * rope.attention_scaling**2, rel=1e-12)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_exactly_the_parameters_that_transformers_counts(name: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = PRESETS[name].shape
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert parameter_count(shape) == sum(value.numel() for value in model.parameters())
