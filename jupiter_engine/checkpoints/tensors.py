"""Named arrays as a safetensors file, hashed while they are written.

The safetensors library needs a second pass over the data to hash a file; with
gigabytes at every checkpoint that pass costs seconds. The format is a length,
a JSON header and raw little-endian bytes, so writing it is done here and
reading it back is left to the library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from jupiter_engine.errors import StateError
from jupiter_engine.files import sha256_file, sync_file

Array = npt.NDArray[Any]

_DTYPES = {"float32": "F32", "float64": "F64", "uint8": "U8", "uint32": "U32", "int64": "I64"}
_BLOCK_BYTES = 16 << 20
_ALIGN = 8


class FileRecord(msgspec.Struct, frozen=True, kw_only=True):
    sha256: str
    bytes: int


def _header(arrays: Mapping[str, Array]) -> bytes:
    entries: dict[str, Any] = {}
    offset = 0
    for name, array in arrays.items():
        dtype = _DTYPES.get(str(array.dtype))
        if dtype is None:
            raise TypeError(f"{name} has dtype {array.dtype}; stored are {', '.join(_DTYPES)}")
        entries[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    raw = msgspec.json.encode(entries)
    raw += b" " * (-len(raw) % _ALIGN)
    return len(raw).to_bytes(8, "little") + raw


def file_bytes(arrays: Mapping[str, Array]) -> int:
    """Size in bytes of the file that `write_arrays` would write."""
    return len(_header(arrays)) + sum(array.nbytes for array in arrays.values())


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> FileRecord:
    """Write and sync `arrays` (float32/64, uint8/32, int64; any shape) and return size and SHA-256.

    Hashing runs beside writing (both release the interpreter lock). Raises
    OSError as the file system gives it; a partial file may then remain.
    """
    header = _header(arrays)
    views = [memoryview(header)]
    for array in arrays.values():
        flat = np.ascontiguousarray(array).reshape(-1)
        if flat.nbytes:
            views.append(flat.view(np.uint8).data)

    def digest() -> str:
        hasher = hashlib.sha256()
        for view in views:
            for start in range(0, len(view), _BLOCK_BYTES):
                hasher.update(view[start : start + _BLOCK_BYTES])
        return hasher.hexdigest()

    with ThreadPoolExecutor(1) as pool:
        hashed = pool.submit(digest)
        with path.open("wb", buffering=0) as file:
            for view in views:
                done = 0
                while done < len(view):
                    done += file.write(view[done : done + _BLOCK_BYTES])
            sync_file(file.fileno())
        return FileRecord(sha256=hashed.result(), bytes=sum(len(view) for view in views))


def read_arrays(path: Path, record: FileRecord) -> dict[str, Array]:
    """Read a file back after checking its size and hash; a file that differs is a StateError naming it."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise StateError(f"{path} is missing") from None
    if size != record.bytes:
        raise StateError(f"{path} has {size} bytes, {record.bytes} were written")
    if sha256_file(path) != record.sha256:
        raise StateError(f"{path} does not hold the bytes that were written (SHA-256 differs)")
    arrays: dict[str, Array] = load_file(path)
    return arrays
