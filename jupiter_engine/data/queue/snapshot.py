"""A snapshot: the packed training rows of one cycle, immutable once its manifest stands.

manifest.json is written last; a folder without it is no snapshot. Reading verifies
the hash of every file against it. Where the recipe measures a held-out loss, the
rows for it lie here, too.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from jupiter_engine.errors import StateError
from jupiter_engine.files import read_json, require_free, sha256_file, write_atomic, write_json

VERSION = 1
MANIFEST = "manifest.json"
_NAMES = ("tokens.npy", "loss_mask.npy", "segments.npy")
_HELD_OUT = "held_out_"
_T = TypeVar("_T", bound=np.unsignedinteger[Any])
_REDO = "remove the folder and run the queue stage again"


class HeldOutFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The rows of vault text that a run measures its held-out loss on."""

    sequences: int
    tokens: int
    """Targets whose loss counts."""
    slice: int
    """Vault slice they come from; never the one that the coming look measures with."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a snapshot holds."""

    version: int = VERSION
    tokenizer_sha256: str
    vocab_size: int
    sequence_tokens: int
    """Input tokens of a row; rows are one token longer, for the last target."""
    sequences: int
    tokens: int
    """Targets whose loss counts (sum of the loss mask without its first column)."""
    input_tokens: int = 0
    """Tokens that a pass over all rows puts into the model: sequences x sequence_tokens."""
    padding_tokens: int = 0
    """Of these, positions that hold nothing."""
    cut_samples: int = 0
    """Samples longer than a row, of which only the beginning is there."""
    distinct_tokens: int
    """Tokens placed, each document or sample counted once however often it is repeated."""
    mix: dict[str, float]
    """Class -> share of the placed tokens."""
    epochs: dict[str, float]
    """Class -> passes over what it holds: tokens placed / distinct tokens available to it, above 1 where repeated."""
    sample_ids: int
    """Number of different synthetic samples used."""
    seed: int
    held_out: HeldOutFacts | None = None
    files: dict[str, str]
    """File name -> SHA-256."""


@dataclass(frozen=True)
class HeldOutRows:
    """Rows of text that training never sees: read-only memory maps of shape [n, sequence_tokens + 1]."""

    tokens: npt.NDArray[np.uint32]
    loss_mask: npt.NDArray[np.uint8]
    segments: npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Snapshot:
    """A verified snapshot; the arrays are read-only memory maps of shape [sequences, sequence_tokens + 1]."""

    folder: Path
    manifest: Manifest
    tokens: npt.NDArray[np.uint32]
    loss_mask: npt.NDArray[np.uint8]
    segments: npt.NDArray[np.uint16]
    held_out: HeldOutRows | None = None

    @property
    def sha256(self) -> str:
        """Hash of the manifest, which holds the hashes of everything else."""
        return sha256_file(self.folder / MANIFEST)


class Rows(Protocol):
    """Arrays of rows: Packed and HeldOut of data.queue.pack are such."""

    @property
    def tokens(self) -> npt.NDArray[np.uint32]: ...
    @property
    def loss_mask(self) -> npt.NDArray[np.uint8]: ...
    @property
    def segments(self) -> npt.NDArray[np.uint16]: ...


def write_snapshot(
    folder: Path,
    rows: Rows,
    *,
    describe: Mapping[str, object],
    held_out: Rows | None = None,
    held_out_slice: int = 0,
) -> Manifest:
    """Write the arrays and then the manifest; `describe` gives the manifest's fields that the arrays do not hold.

    Raises StateError for ids outside the vocabulary (a model would read past its embedding), DiskFull for lack of room.
    """
    vocab_size = describe["vocab_size"]
    assert isinstance(vocab_size, int)
    arrays = _named(rows, "")
    if held_out is not None:
        arrays |= _named(held_out, _HELD_OUT)
    for name, array in arrays.items():
        if name.endswith(_NAMES[0]) and int(array.max(initial=0)) >= vocab_size:
            raise StateError(f"token id {int(array.max())} does not exist in a vocabulary of {vocab_size}", fix=_REDO)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    require_free(folder, sum(array.nbytes for array in arrays.values()) + 2**20, "the snapshot")
    hashes = {}
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
        write_atomic(folder / name, buffer.getvalue())
        hashes[name] = sha256_file(folder / name)
    sequences, width = rows.tokens.shape
    values: dict[str, object] = {
        **describe,
        "version": VERSION,
        "sequence_tokens": width - 1,
        "sequences": sequences,
        "input_tokens": sequences * (width - 1),
        "tokens": int(rows.loss_mask[:, 1:].sum()),
        "files": hashes,
    }
    if held_out is not None:
        values["held_out"] = {
            "sequences": held_out.tokens.shape[0],
            "tokens": int(held_out.loss_mask[:, 1:].sum()),
            "slice": held_out_slice,
        }
    manifest = msgspec.convert(values, Manifest)
    write_json(folder / MANIFEST, manifest)
    return manifest


def _named(rows: Rows, prefix: str) -> dict[str, npt.NDArray[Any]]:
    arrays: tuple[npt.NDArray[Any], ...] = (rows.tokens, rows.loss_mask, rows.segments)
    return {prefix + name: array for name, array in zip(_NAMES, arrays, strict=True)}


def read_snapshot(folder: Path) -> Snapshot:
    """Open a snapshot after verifying it; StateError names the file that is missing, damaged or does not fit."""
    if not (folder / MANIFEST).exists():
        raise StateError(f"{folder / MANIFEST} does not exist: the snapshot is not complete", fix=_REDO)
    manifest = read_json(folder / MANIFEST, Manifest)
    assert isinstance(manifest, Manifest)
    if manifest.version != VERSION:
        raise StateError(f"{folder / MANIFEST} has version {manifest.version}, this Jupiter reads {VERSION}", fix=_REDO)
    held_out = None
    if manifest.held_out is not None:
        held_out = HeldOutRows(*_read(folder, _HELD_OUT, manifest, manifest.held_out.sequences))
    tokens, mask, segments = _read(folder, "", manifest, manifest.sequences)
    return Snapshot(folder, manifest, tokens, mask, segments, held_out)


def _read(
    folder: Path, prefix: str, manifest: Manifest, sequences: int
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint8], npt.NDArray[np.uint16]]:
    paths = [folder / f"{prefix}{name}" for name in _NAMES]
    tokens = _array(paths[0], manifest, sequences, np.uint32)
    if int(tokens.max(initial=0)) >= manifest.vocab_size:
        raise StateError(f"{paths[0]} holds ids outside its vocabulary", fix=_REDO)
    return tokens, _array(paths[1], manifest, sequences, np.uint8), _array(paths[2], manifest, sequences, np.uint16)


def _array(path: Path, manifest: Manifest, sequences: int, dtype: type[_T]) -> npt.NDArray[_T]:
    if not path.exists():
        raise StateError(f"{path} is missing", fix=_REDO)
    if sha256_file(path) != manifest.files.get(path.name):
        raise StateError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}", fix=_REDO)
    try:
        array: npt.NDArray[_T] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise StateError(f"{path} cannot be read: {error}", fix=_REDO) from error
    shape = (sequences, manifest.sequence_tokens + 1)
    if array.shape != shape or array.dtype != dtype:
        raise StateError(
            f"{path} holds {array.dtype} {array.shape}, {MANIFEST} says {np.dtype(dtype)} {shape}", fix=_REDO
        )
    return array
