"""A model folder in the Hugging Face Llama layout: verified before use, published whole or not at all.

Only safetensors headers and JSON files are read here; no tensor library is loaded,
so a damaged folder is refused in milliseconds, with every fault named.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from jupiter_engine.checkpoints import rope
from jupiter_engine.checkpoints.special_tokens import REDO, SpecialIds, check, load_json
from jupiter_engine.errors import ModelInvalid
from jupiter_engine.files import disk_full, sync_folder, write_atomic
from jupiter_engine.protocol.shapes import Shape, parameter_count, tensor_shapes

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
_HEADER_LIMIT = 100_000_000
_SUPPORTED = "use a Llama-architecture model (model_type llama or mistral) in Hugging Face layout, unquantised"


class ModelInfo(Shape, frozen=True, kw_only=True):
    """Everything that a twin needs to build the model, read from config.json and checked against the tensors."""

    dtype: str = "bfloat16"
    """Stored precision: float32, bfloat16 or float16."""
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    rope_scaling: dict[str, float | str] | None = None
    """None for plain RoPE; else `rope_type` (see checkpoints.rope.KINDS) and its factors, as in config.json."""

    @property
    def parameters(self) -> int:
        return parameter_count(self)

    @property
    def attention_scale(self) -> float:
        """What attention scores are multiplied with before the softmax.

        YaRN multiplies queries and keys by a factor each; here that is part of the scale, which is the same.
        """
        factor = rope.attention_factor(self.rope_scaling)
        return factor * factor / math.sqrt(self.head_dim)


def folder_sha256(folder: Path) -> str:
    """Hash over names and contents of the folder's *.safetensors, config.json and tokenizer.json (those present)."""
    digest = hashlib.sha256()
    names = sorted([*(path.name for path in folder.glob("*.safetensors")), "config.json", "tokenizer.json"])
    for name in names:
        path = folder / name
        if not path.exists():
            continue
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def verify(folder: Path) -> ModelInfo:
    """Check that a folder holds a whole, consistent Llama model and return what it is.

    Raises ModelInvalid naming every missing, misshapen or unexpected tensor, a
    truncated weight file, an unreadable JSON file, a tokenizer that does not fit
    the embedding or names other special tokens than config.json, or an
    architecture that the twins do not have. Special ids that config.json leaves
    open are the tokenizer's.
    """
    if not folder.is_dir():
        raise ModelInvalid(f"{folder} is no folder", fix="check the path, or prepare the model first")
    info = _read_config(folder)
    headers = _read_headers(folder)
    expected = tensor_shapes(info)
    ignored = {name for name in headers if name.endswith("rotary_emb.inv_freq")}
    if info.tied:
        # Some writers store the tied output projection a second time.
        ignored.add("lm_head.weight")
    faults = [f"{name} is missing" for name in expected if name not in headers]
    faults += [
        f"{name} has shape {list(headers[name].shape)}, config.json asks for {list(shape)}"
        for name, shape in expected.items()
        if name in headers and headers[name].shape != shape
    ]
    faults += [f"{name} is unexpected" for name in headers if name not in expected and name not in ignored]
    if faults:
        raise ModelInvalid(f"{folder}: {_listed(faults)}", fix=REDO)
    dtypes = {headers[name].dtype for name in expected}
    foreign = sorted(dtypes - _DTYPES.keys())
    if foreign:
        raise ModelInvalid(f"{folder}: tensors are stored as {', '.join(foreign)}", fix=_SUPPORTED)
    special = check(folder, SpecialIds(bos=info.bos_id, eos=info.eos_ids, pad=info.pad_id), info.vocab_size)
    stored = _DTYPES[headers["model.embed_tokens.weight"].dtype]
    return msgspec.structs.replace(info, dtype=stored, bos_id=special.bos, eos_ids=special.eos, pad_id=special.pad)


def config_values(info: ModelInfo) -> dict[str, Any]:
    """config.json as transformers 5 and mlx-lm both read it.

    transformers 5 takes `rope_parameters`, mlx-lm only `rope_theta` (with
    another theta than 10000 it would compute wrong logits silently), and their
    defaults for `tie_word_embeddings` differ: so all three are always written.
    """
    eos: int | list[int] | None = list(info.eos_ids) or None
    if len(info.eos_ids) == 1:
        eos = info.eos_ids[0]
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": info.bos_id,
        "dtype": info.dtype,
        "eos_token_id": eos,
        "head_dim": info.head_dim,
        "hidden_act": "silu",
        "hidden_size": info.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": info.intermediate_size,
        "max_position_embeddings": info.context,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": info.heads,
        "num_hidden_layers": info.layers,
        "num_key_value_heads": info.kv_heads,
        "pad_token_id": info.pad_id,
        "rms_norm_eps": info.rms_norm_eps,
        **rope.write(info.rope_theta, info.rope_scaling),
        "tie_word_embeddings": info.tied,
        "torch_dtype": info.dtype,
        "use_cache": True,
        "vocab_size": info.vocab_size,
    }


def write_config(folder: Path, info: ModelInfo) -> None:
    """Write config.json and generation_config.json for `info` into `folder`."""
    values = config_values(info)
    write_atomic(folder / "config.json", _json(values))
    ids = {key: values[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if values[key] is not None}
    write_atomic(folder / "generation_config.json", _json(ids))


TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
"""Files that belong to the tokenizer; copied unchanged from a model to what is trained from it."""


def copy_text_files(source: Path, target: Path) -> None:
    """Copy the tokenizer's files (those present) from one model folder to another."""
    for name in TEXT_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


@contextlib.contextmanager
def publish(target: Path) -> Iterator[Path]:
    """Write a model folder whole or not at all.

    Yields an empty temporary sibling to write into; when the block ends
    without an error every file gets mode 0644 and is synced, then the sibling
    is renamed to `target` (an older `target` is replaced). After an error, or
    a kill, `target` is as it was (or absent, for a kill between the two renames
    of a replacement); a killed writer's leftover is removed by the next one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temp = target.with_name(f".{target.name}.partial")
    shutil.rmtree(temp, ignore_errors=True)
    temp.mkdir()
    try:
        yield temp
        for path in sorted(temp.iterdir()):
            path.chmod(0o644)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(temp)
        if target.exists():
            old = target.with_name(f".{target.name}.replaced")
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
            temp.rename(target)
            shutil.rmtree(old)
        else:
            temp.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        shutil.rmtree(temp, ignore_errors=True)
        raise disk_full(error, target) from error
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise


# -- reading -------------------------------------------------------------------------------------


class _Tensor(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def _read_config(folder: Path) -> ModelInfo:
    path = folder / "config.json"
    values = load_json(path)
    kind = values.get("model_type")
    if kind not in ("llama", "mistral"):
        raise ModelInvalid(f"{path}: model_type is {kind!r}, Jupiter runs 'llama'", fix=_SUPPORTED)
    refused = {
        "attention biases": bool(values.get("attention_bias")),
        "MLP biases": bool(values.get("mlp_bias")),
        "quantised weights": "quantization" in values or "quantization_config" in values,
        f"the activation {values.get('hidden_act')!r}": values.get("hidden_act", "silu") not in ("silu", "swish"),
        "the interleaved RoPE layout": bool(values.get("rope_traditional")),
    }
    for what, present in refused.items():
        if present:
            raise ModelInvalid(f"{path}: the model has {what}, which Jupiter does not run", fix=_SUPPORTED)
    try:
        info = _info_of(values)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        what = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise ModelInvalid(f"{path}: {what}", fix=REDO) from error
    _check_window(path, values, info)
    return info


def _check_window(path: Path, values: dict[str, Any], info: ModelInfo) -> None:
    """A sliding window as long as the context changes nothing; a shorter one is not computed here."""
    sliding = values["model_type"] == "mistral" or "sliding_attention" in (values.get("layer_types") or ())
    # A Mistral config.json without the key means 4096 to transformers; null means none.
    window = values.get("sliding_window", 4096) if sliding else None
    if window is not None and int(window) < info.context:
        raise ModelInvalid(
            f"{path}: the model has a sliding attention window of {window} tokens and a context of {info.context}; "
            "Jupiter runs full attention only",
            fix=f"set max_position_embeddings to {window} in a copy of its config.json: up to there both are the same",
        )


def _info_of(values: dict[str, Any]) -> ModelInfo:
    heads = int(values["num_attention_heads"])
    hidden = int(values["hidden_size"])
    kv_heads = int(values.get("num_key_value_heads") or heads)
    layers, vocab, intermediate = (int(values[key]) for key in ("num_hidden_layers", "vocab_size", "intermediate_size"))
    if min(heads, hidden, kv_heads, vocab, layers, intermediate) < 1:
        raise ValueError("a size is smaller than 1")
    if heads % kv_heads:
        raise ValueError(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    if values.get("head_dim") is None and hidden % heads:
        raise ValueError(
            f"hidden_size {hidden} is no multiple of num_attention_heads {heads}, and no head_dim is given"
        )
    head_dim = int(values.get("head_dim") or hidden // heads)
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; rotary embedding needs an even one")
    theta, scaling = rope.read(values)
    bos, pad = _ids(values.get("bos_token_id")), _ids(values.get("pad_token_id"))
    return ModelInfo(
        vocab_size=vocab,
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        context=int(values.get("max_position_embeddings", 2048)),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        tied=bool(values.get("tie_word_embeddings", False)),
        bos_id=bos[0] if bos else None,
        eos_ids=_ids(values.get("eos_token_id")),
        # Llama's first releases wrote -1 for "no padding".
        pad_id=pad[0] if pad and pad != (-1,) else None,
    )


def _ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    listed = value if isinstance(value, list) else [value]
    if all(isinstance(one, int) and not isinstance(one, bool) for one in listed):
        return tuple(listed)
    raise ValueError(f"{value!r} is no token id")


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or every file that model.safetensors.index.json names; ModelInvalid if one is missing."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if not index.exists():
        raise ModelInvalid(f"{folder} holds no model.safetensors", fix=REDO)
    weight_map = load_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelInvalid(f"{index} holds no weight_map", fix=REDO)
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not (folder / name).exists():
            raise ModelInvalid(f"{index} names {name}, which is not in the folder", fix=REDO)
    return [folder / name for name in names]


def _read_headers(folder: Path) -> dict[str, _Tensor]:
    tensors: dict[str, _Tensor] = {}
    for path in weight_files(folder):
        tensors.update(_read_header(path))
    return tensors


def _read_header(path: Path) -> dict[str, _Tensor]:
    """The safetensors header: 8 bytes little-endian length, then JSON; checked against the file's size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise ModelInvalid(f"{path} is truncated or no safetensors file", fix=REDO)
        raw = file.read(length)
    try:
        values = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        values.pop("__metadata__", None)
        tensors = {name: msgspec.json.decode(value, type=_Tensor) for name, value in values.items()}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelInvalid(f"{path}: its header cannot be read ({error})", fix=REDO) from error
    end = max((tensor.data_offsets[1] for tensor in tensors.values()), default=0)
    if size != 8 + length + end:
        raise ModelInvalid(f"{path} has {size} bytes, its header asks for {8 + length + end}", fix=REDO)
    return tensors


def _json(values: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(values), indent=2) + b"\n"


def _listed(faults: list[str], most: int = 12) -> str:
    more = len(faults) - most
    return "; ".join(faults[:most]) + (f"; and {more} more" if more > 0 else "")
