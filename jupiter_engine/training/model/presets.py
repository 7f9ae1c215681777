"""New models from a preset: a model folder with seeded random weights, the same bytes for either twin."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from jupiter_engine.checkpoints.model_folder import ModelInfo, copy_text_files, publish, write_config
from jupiter_engine.errors import UsageError
from jupiter_engine.protocol.shapes import PRESETS, Shape, tensor_shapes
from jupiter_engine.training.model.text import TextCodec

_STD = 0.02
_ALIGN = 64
"""A vocabulary is rounded up to a multiple of this: matrix products are faster on round sizes."""


def preset_shape(name: str, *, vocab_size: int | None = None) -> Shape:
    """The preset's shape, with another vocabulary where one is given (rounded up to a multiple of 64)."""
    preset = PRESETS.get(name)
    if preset is None:
        raise UsageError(f"there is no preset {name!r}", fix=f"choose one of {', '.join(PRESETS)}")
    if vocab_size is None:
        return preset.shape
    return msgspec.structs.replace(preset.shape, vocab_size=-(-vocab_size // _ALIGN) * _ALIGN)


def write_scratch(target: Path, *, preset: str, tokenizer: Path, seed: int, dtype: str = "float32") -> ModelInfo:
    """Publish a model folder of `preset` with random weights and the tokenizer of the folder `tokenizer`.

    The vocabulary is the tokenizer's, rounded up to a multiple of 64. Stored as `dtype` (float32 | bfloat16).
    """
    codec = TextCodec(tokenizer)
    shape = preset_shape(preset, vocab_size=codec.vocab_size)
    fields = {name: getattr(shape, name) for name in Shape.__struct_fields__}
    pad = codec.eos_ids[0] if codec.pad_id is None else codec.pad_id
    info = ModelInfo(**fields, dtype=dtype, bos_id=codec.bos_id, eos_ids=codec.eos_ids, pad_id=pad)
    write_random(target, info, tokenizer=tokenizer, seed=seed)
    return info


def write_random(target: Path, info: ModelInfo, *, tokenizer: Path, seed: int) -> None:
    """Publish a model folder of any shape with random weights, stored as `info.dtype`.

    Weights are normal with standard deviation 0.02; those that write into the
    residual stream are divided by sqrt(2 x layers) (GPT-2's rule), norms are 1.
    Every tensor has its own random stream, keyed by seed and name, so the same
    seed gives the same bytes on every machine.
    """
    with publish(target) as folder:
        copy_text_files(tokenizer, folder)
        write_config(folder, info)
        tensors = {name: _random(name, size, info.layers, seed) for name, size in tensor_shapes(info).items()}
        write_tensors(folder / "model.safetensors", tensors, info.dtype)


def _random(name: str, size: tuple[int, ...], layers: int, seed: int) -> np.ndarray:
    if len(size) == 1:
        return np.ones(size, dtype=np.float32)
    stream = np.random.Generator(np.random.PCG64([seed, *name.encode()]))
    std = _STD / (2 * layers) ** 0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else _STD
    return stream.standard_normal(size, dtype=np.float32) * np.float32(std)


def write_tensors(path: Path, tensors: dict[str, np.ndarray], dtype: str) -> None:
    """Write float32 arrays as a safetensors file in `dtype` (float32 | bfloat16, rounded to nearest even).

    numpy knows no bfloat16, so the safetensors package cannot write it from numpy arrays; the format is
    eight bytes of header length, a JSON header padded with spaces to a multiple of eight, then the raw data.
    """
    name_in_file, size = ("F32", 4) if dtype == "float32" else ("BF16", 2)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, value in tensors.items():
        end = offset + value.size * size
        header[name] = {"dtype": name_in_file, "shape": list(value.shape), "data_offsets": [offset, end]}
        offset = end
    head = msgspec.json.encode(header)
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for value in tensors.values():
            array = np.ascontiguousarray(value, dtype="<f4")
            file.write((array if dtype == "float32" else to_bfloat16(array)).tobytes())


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> the upper 16 bits as uint16, rounded to nearest even (finite values)."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
