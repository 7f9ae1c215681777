"""Both twins compute the Llama that transformers computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from jupiter_engine.backends.contract import Dtype
from jupiter_engine.backends.mlx import model as mlx_model
from jupiter_engine.backends.torch import model as torch_model
from jupiter_engine.backends.torch import rotary as torch_rotary
from jupiter_engine.checkpoints.model_folder import verify
from jupiter_engine.protocol.shapes import parameter_count

import mlx.core as mx  # isort: skip - after backends.mlx, which readies its BLAS
import torch  # isort: skip - after backends.torch, which sets its waiting policy

Logits = npt.NDArray[np.float32]
KINDS = ("plain", "grouped", "scaled")


def tokens_of(shape: tuple[int, int], seed: int = 0) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 300, shape)


def torch_logits(folder: Path, tokens: npt.NDArray[np.int64], segments: npt.NDArray[np.int64] | None = None) -> Logits:
    model = torch_model.load_model(folder, "float32")
    with torch.inference_mode():
        logits = model(torch.from_numpy(tokens), None if segments is None else torch.from_numpy(segments))
    return np.asarray(logits.numpy())


def mlx_logits(folder: Path, tokens: npt.NDArray[np.int64], segments: npt.NDArray[np.int64] | None = None) -> Logits:
    model = mlx_model.load_model(folder, "float32")
    return np.array(model(mx.array(tokens), None if segments is None else mx.array(segments)))


@pytest.mark.parametrize("kind", KINDS)
def test_twins_agree(tiny_folders: dict[str, Path], kind: str) -> None:
    tokens = tokens_of((2, 100))
    ours = torch_logits(tiny_folders[kind], tokens)
    assert np.abs(ours).max() > 0.05, "logits that are all zero would agree too"
    np.testing.assert_allclose(mlx_logits(tiny_folders[kind], tokens), ours, atol=2e-5)


@pytest.mark.parametrize("twin", [torch_logits, mlx_logits])
@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_a_row_do_not_see_each_other(tiny_folders: dict[str, Path], kind: str, twin: object) -> None:
    assert callable(twin)
    tokens = tokens_of((1, 60))
    segments = np.array([[0] * 17 + [1] * 30 + [2] * 13])
    packed = twin(tiny_folders[kind], tokens, segments)
    for start, end in ((0, 17), (17, 47), (47, 60)):
        alone = twin(tiny_folders[kind], tokens[:, start:end])
        np.testing.assert_allclose(packed[:, start:end], alone, atol=2e-5)
    unsplit = twin(tiny_folders[kind], tokens)
    assert np.abs(packed[:, 17:] - unsplit[:, 17:]).max() > 1e-3, "the mask changed nothing"


def test_causal(tiny_folders: dict[str, Path]) -> None:
    tokens = tokens_of((1, 20))
    changed = tokens.copy()
    changed[0, -1] = (changed[0, -1] + 1) % 300
    first, second = (torch_logits(tiny_folders["grouped"], one) for one in (tokens, changed))
    np.testing.assert_array_equal(first[:, :-1], second[:, :-1])
    assert np.abs(first[:, -1] - second[:, -1]).max() > 1e-4


def test_scaled_rope_differs_from_plain_rope(tiny_folders: dict[str, Path]) -> None:
    info = verify(tiny_folders["scaled"])
    scaled = torch_rotary.rotary_frequencies(info, info.rope_scaling)
    plain = torch_rotary.rotary_frequencies(verify(tiny_folders["plain"]), None)
    assert float(scaled[0]) == pytest.approx(1.0), "short wavelengths are kept"
    assert float(scaled[-1]) == pytest.approx(10000 ** (-30 / 32) / 8.0), "long wavelengths are stretched by the factor"
    assert plain.shape[0] == 4


@pytest.mark.parametrize("kind", KINDS)
def test_parameter_count_is_exact(tiny_folders: dict[str, Path], kind: str) -> None:
    model = torch_model.load_model(tiny_folders[kind], "float32")
    assert sum(value.numel() for value in model.parameters()) == parameter_count(verify(tiny_folders[kind]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("writer", [torch_model, mlx_model])
@pytest.mark.parametrize("reader", [torch_model, mlx_model])
def test_weights_cross_twins_bit_for_bit(
    tiny_folders: dict[str, Path], tmp_path: Path, writer: object, reader: object, dtype: Dtype
) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((tiny_folders["grouped"] / name).read_bytes())
    writer.save_model(writer.load_model(tiny_folders["grouped"], dtype), tmp_path, dtype)  # type: ignore[attr-defined]
    assert verify(tmp_path).dtype == dtype
    reader.save_model(reader.load_model(tmp_path, dtype), tmp_path, dtype)  # type: ignore[attr-defined]
    again = torch_model.load_model(tmp_path, "float32").state_dict()
    for name, value in torch_model.load_model(tiny_folders["grouped"], dtype).state_dict().items():
        assert torch.equal(again[name], value.float()), name


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # transformers' own warnings are not ours to fix
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_transformers(tiny_folders: dict[str, Path], kind: str) -> None:
    from transformers import LlamaForCausalLM

    tokens = tokens_of((2, 100))
    model = LlamaForCausalLM.from_pretrained(tiny_folders[kind], dtype=torch.float32)
    with torch.inference_mode():
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(torch_logits(tiny_folders[kind], tokens), theirs, atol=2e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # mlx-lm imports transformers
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_mlx_lm(tiny_folders: dict[str, Path], kind: str) -> None:
    from mlx_lm.utils import load_model

    tokens = tokens_of((2, 100))
    model, _ = load_model(tiny_folders[kind])
    theirs = np.array(model(mx.array(tokens)))
    np.testing.assert_allclose(mlx_logits(tiny_folders[kind], tokens), theirs, atol=2e-5)
