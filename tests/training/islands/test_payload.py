"""Payload files: what comes back, how large it is, and that a damaged one is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.numpy import load_file

from jupiter_engine.errors import StateError
from jupiter_engine.files import sha256_file
from jupiter_engine.training.distributed.islands import payload
from jupiter_engine.training.distributed.islands.payload import (
    Payload,
    dequantise,
    from_bfloat16,
    of_arrays,
    payload_bytes,
    quantise,
    shapes_of,
    to_bfloat16,
    verified,
    write_payload,
)

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "a.weight": RANDOM.normal(0, 0.02, (33, 70)).astype(np.float32),
    "norm": RANDOM.normal(1, 0.1, 7).astype(np.float32),
    "empty": np.zeros((0, 3), dtype=np.float32),
    "b.weight": RANDOM.normal(0, 5.0, (4, 5, 6)).astype(np.float32),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks a tensor."""
    monkeypatch.setattr(payload, "CHUNK", 512)


@pytest.mark.parametrize("encoding", ["float32", "bfloat16", "int8"])
def test_what_was_written_comes_back_and_the_record_is_the_file(encoding: payload.Encoding, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    record = write_payload(path, shapes_of(ARRAYS), encoding, of_arrays(ARRAYS))
    assert (record.sha256, record.bytes) == (sha256_file(path), path.stat().st_size)
    assert 0 < record.bytes - payload_bytes(shapes_of(ARRAYS), encoding) < 2000
    with verified(path, record) as found:
        assert found.shapes == shapes_of(ARRAYS)
        arrays = found.arrays()
    for name, wanted in ARRAYS.items():
        scale = np.abs(wanted).max(initial=0.0)
        error = {"float32": 0.0, "bfloat16": scale * 2**-8, "int8": scale / 254 * 1.0001}[encoding]
        assert arrays[name].shape == wanted.shape
        assert np.abs(arrays[name] - wanted).max(initial=0.0) <= error


def test_the_safetensors_library_reads_the_files(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    write_payload(path, shapes_of(ARRAYS), "float32", of_arrays(ARRAYS), metadata={"format": "pt"})
    for name, value in load_file(path).items():
        np.testing.assert_array_equal(value, ARRAYS[name])
    write_payload(path, shapes_of(ARRAYS), "int8", of_arrays(ARRAYS))
    with safe_open(path, "np") as file:
        numbers, scales = file.get_tensor("a.weight"), file.get_tensor("a.weight.scale")
    np.testing.assert_array_equal(dequantise(numbers, scales), np.asarray(Payload(path).array("a.weight")).reshape(-1))


def test_bfloat16_rounds_as_torch_does(tmp_path: Path) -> None:
    import torch

    bits = RANDOM.integers(0, 2**32, 20_000, dtype=np.uint32)
    values = np.concatenate([bits.view(np.float32), np.array([0.0, -0.0, np.inf, -np.inf, np.nan], dtype=np.float32)])
    ours = from_bfloat16(to_bfloat16(values))
    theirs = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(ours, theirs)


@settings(max_examples=200, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        st.integers(1, 700),
        elements=st.floats(-(2.0**60), 2.0**60, width=32, allow_nan=False, allow_subnormal=True),
    )
)
def test_int8_is_off_by_at_most_half_a_step_of_its_block(values: np.ndarray) -> None:
    numbers, scales = quantise(values)
    back = dequantise(numbers, scales)
    step = np.repeat(scales, payload.BLOCK)[: len(values)]
    # A block whose step would not be a normal number is zero.
    tiny = np.finfo(np.float32).tiny * 127
    assert (np.abs(back - values) <= np.maximum(step * 0.5001, tiny * (step == 0))).all()


def test_int8_of_gaussian_values_is_off_by_less_than_one_percent() -> None:
    values = RANDOM.normal(0, 1e-3, 1 << 16).astype(np.float32)
    numbers, scales = quantise(values)
    error = np.linalg.norm(dequantise(numbers, scales) - values) / np.linalg.norm(values)
    assert 0.004 < error < 0.01


def test_a_file_is_written_through_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the project's own call, which on macOS empties the drive's cache as well."""
    synced: list[int] = []
    monkeypatch.setattr(payload, "sync_file", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    record = write_payload(tmp_path / "x", shapes_of(ARRAYS), "bfloat16", of_arrays(ARRAYS))
    assert synced == [record.bytes]


def test_what_is_not_finite_is_not_quantised() -> None:
    with pytest.raises(ValueError, match="finite"):
        quantise(np.array([1.0, np.nan], dtype=np.float32))


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_a_file_cut_short_is_refused(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    record = write_payload(path, shapes_of(ARRAYS), "float32", of_arrays(ARRAYS))
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    readers: list[Callable[[], Payload]] = [lambda: Payload(path), lambda: verified(path, record)]
    for read in readers:
        with pytest.raises(StateError, match="bytes"):
            read()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(StateError, match="SHA-256"):
        verified(path, record)
    path.write_bytes(b"\xff" * 40)
    with pytest.raises(StateError, match="cut short"):
        Payload(path)
    path.unlink()
    with pytest.raises(StateError, match="missing"):
        Payload(path)
