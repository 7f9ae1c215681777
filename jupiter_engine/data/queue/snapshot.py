"""A snapshot: the packed training rows of one cycle, immutable once its manifest stands.

manifest.json is written last; a folder without it is no snapshot. Reading verifies
the hash of every file against it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from jupiter_engine.errors import StateError
from jupiter_engine.files import read_json, require_free, sha256_file, write_atomic, write_json

VERSION = 1
MANIFEST = "manifest.json"
_NAMES = ("tokens.npy", "loss_mask.npy", "segments.npy")
_T = TypeVar("_T", bound=np.unsignedinteger[Any])
_REDO = "remove the folder and run the queue stage again"


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
    distinct_tokens: int
    """Tokens placed, each document or sample counted once however often it is repeated."""
    mix: dict[str, float]
    """Class -> share of the placed tokens."""
    epochs: dict[str, float]
    """Class -> passes over what it holds: tokens placed / distinct tokens available to it, above 1 where repeated."""
    sample_ids: int
    """Number of different synthetic samples used."""
    seed: int
    files: dict[str, str]
    """File name -> SHA-256."""


@dataclass(frozen=True)
class Snapshot:
    """A verified snapshot; the arrays are read-only memory maps of shape [sequences, sequence_tokens + 1]."""

    folder: Path
    manifest: Manifest
    tokens: npt.NDArray[np.uint32]
    loss_mask: npt.NDArray[np.uint8]
    segments: npt.NDArray[np.uint16]

    @property
    def sha256(self) -> str:
        """Hash of the manifest, which holds the hashes of everything else."""
        return sha256_file(self.folder / MANIFEST)


def write_snapshot(
    folder: Path,
    tokens: npt.NDArray[np.uint32],
    loss_mask: npt.NDArray[np.uint8],
    segments: npt.NDArray[np.uint16],
    *,
    describe: Mapping[str, object],
) -> Manifest:
    """Write the arrays and then the manifest; `describe` gives the manifest's fields that the arrays do not hold.

    Raises StateError for ids outside the vocabulary (a model would read past its embedding), DiskFull for lack of room.
    """
    vocab_size = describe["vocab_size"]
    assert isinstance(vocab_size, int)
    if int(tokens.max(initial=0)) >= vocab_size:
        raise StateError(f"token id {int(tokens.max())} does not exist in a vocabulary of {vocab_size}", fix=_REDO)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    require_free(folder, tokens.nbytes + loss_mask.nbytes + segments.nbytes + 2**20, "the snapshot")
    hashes = {}
    arrays: tuple[npt.NDArray[Any], ...] = (tokens, loss_mask, segments)
    for name, array in zip(_NAMES, arrays, strict=True):
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
        write_atomic(folder / name, buffer.getvalue())
        hashes[name] = sha256_file(folder / name)
    manifest = msgspec.convert(
        {
            **describe,
            "version": VERSION,
            "sequence_tokens": tokens.shape[1] - 1,
            "sequences": tokens.shape[0],
            "tokens": int(loss_mask[:, 1:].sum()),
            "files": hashes,
        },
        Manifest,
    )
    write_json(folder / MANIFEST, manifest)
    return manifest


def read_snapshot(folder: Path) -> Snapshot:
    """Open a snapshot after verifying it; StateError names the file that is missing, damaged or does not fit."""
    if not (folder / MANIFEST).exists():
        raise StateError(f"{folder / MANIFEST} does not exist: the snapshot is not complete", fix=_REDO)
    manifest = read_json(folder / MANIFEST, Manifest)
    assert isinstance(manifest, Manifest)
    if manifest.version != VERSION:
        raise StateError(f"{folder / MANIFEST} has version {manifest.version}, this Jupiter reads {VERSION}", fix=_REDO)
    tokens = _array(folder / _NAMES[0], manifest, np.uint32)
    if int(tokens.max(initial=0)) >= manifest.vocab_size:
        raise StateError(f"{folder / _NAMES[0]} holds ids outside its vocabulary", fix=_REDO)
    mask = _array(folder / _NAMES[1], manifest, np.uint8)
    return Snapshot(folder, manifest, tokens, mask, _array(folder / _NAMES[2], manifest, np.uint16))


def _array(path: Path, manifest: Manifest, dtype: type[_T]) -> npt.NDArray[_T]:
    if not path.exists():
        raise StateError(f"{path} is missing", fix=_REDO)
    if sha256_file(path) != manifest.files.get(path.name):
        raise StateError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}", fix=_REDO)
    try:
        array: npt.NDArray[_T] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise StateError(f"{path} cannot be read: {error}", fix=_REDO) from error
    shape = (manifest.sequences, manifest.sequence_tokens + 1)
    if array.shape != shape or array.dtype != dtype:
        raise StateError(
            f"{path} holds {array.dtype} {array.shape}, {MANIFEST} says {np.dtype(dtype)} {shape}", fix=_REDO
        )
    return array
