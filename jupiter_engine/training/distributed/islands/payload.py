"""Named arrays as they travel between islands and hub: safetensors files, written and read in chunks.

A tensor's values are cut, flattened, into chunks of `CHUNK` numbers; nothing here ever holds more than a few
of them, so a hub merges a model of any size in a few hundred MB. Encodings:

float32   F32, as it is
bfloat16  BF16, rounded to nearest even
int8      I8 [n], flattened, and `<name>.scale` F32 [ceil(n / 256)]: value = number * scale of its block of 256,
          scale = largest magnitude of the block / 127. 1.016 bytes a value; relative L2 error about 0.7 %.

The safetensors package needs whole tensors and a second pass to hash; the format is a length, a JSON header and raw
little-endian bytes (see checkpoints.tensors), so writing and partial reading are done here.
"""

from __future__ import annotations

import hashlib
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from jupiter_engine.checkpoints.tensors import FileRecord
from jupiter_engine.errors import StateError
from jupiter_engine.files import sha256_file, sync_file

Encoding = Literal["float32", "bfloat16", "int8"]
Floats = npt.NDArray[np.float32]
Shapes = Mapping[str, tuple[int, ...]]
Source = Callable[[str, int, int], Floats]
"""(name, first, end) -> the flattened tensor's values first..end, float32 [end - first]."""

BLOCK = 256
"""Values that share a scale."""
CHUNK = 4 << 20
"""Values held at once, a multiple of BLOCK."""
SCALE = ".scale"

_TYPES: dict[str, tuple[str, int]] = {"float32": ("F32", 4), "bfloat16": ("BF16", 2), "int8": ("I8", 1)}
_SIZES = {"F32": 4, "BF16": 2, "F16": 2, "I8": 1}
_ALIGN = 8
_HEADER_LIMIT = 100_000_000


def to_bfloat16(values: Floats) -> npt.NDArray[np.uint16]:
    """float32 -> bfloat16 bits, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    # The rounding would carry some NaNs over into infinity or zero.
    kept = np.where(np.isnan(values), (bits >> np.uint32(16)) | np.uint32(0x40), rounded)
    return kept.astype(np.uint16)


def from_bfloat16(bits: npt.NDArray[np.uint16]) -> Floats:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def quantise(values: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """float32 [n] -> (int8 [n], scales float32 [ceil(n / BLOCK)]). Values that are not finite are a ValueError."""
    if not np.isfinite(values).all():
        raise ValueError("only finite values can be quantised")
    blocks = -(-len(values) // BLOCK)
    padded = np.zeros(blocks * BLOCK, dtype=np.float32)
    padded[: len(values)] = values
    table = padded.reshape(blocks, BLOCK)
    scales = np.abs(table).max(axis=1) / np.float32(127.0)
    # A scale below float32's normal range would be divided by with no precision left: such a block is zero.
    scales[scales < np.finfo(np.float32).tiny] = 0.0
    divisors = np.where(scales > 0.0, scales, np.float32(1.0))
    numbers = np.rint(table / divisors[:, None]) * (scales > 0.0)[:, None]
    return np.clip(numbers, -127, 127).astype(np.int8).reshape(-1)[: len(values)], scales.astype(np.float32)


def dequantise(numbers: npt.NDArray[np.int8], scales: Floats) -> Floats:
    return numbers.astype(np.float32) * np.repeat(scales, BLOCK)[: len(numbers)]


def chunks(size: int) -> Iterator[tuple[int, int]]:
    """(first, end) of a flattened tensor's chunks."""
    for first in range(0, size, CHUNK):
        yield first, min(first + CHUNK, size)


def of_arrays(arrays: Mapping[str, npt.NDArray[Any]]) -> Source:
    """Chunks of arrays that are in memory."""
    return lambda name, first, end: np.asarray(arrays[name], dtype=np.float32).reshape(-1)[first:end]


def shapes_of(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in arrays.items()}


# -- writing ---------------------------------------------------------------------------------------


def _header(shapes: Shapes, encoding: Encoding, metadata: Mapping[str, str]) -> bytes:
    kind, width = _TYPES[encoding]
    # The shape of a flattened tensor goes into the metadata: whoever reads the file alone can restore it.
    extra = {f"shape.{name}": ",".join(map(str, shape)) for name, shape in shapes.items()} if encoding == "int8" else {}
    entries: dict[str, Any] = {"__metadata__": {"encoding": encoding, **metadata, **extra}}
    offset = 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        stored = [size] if encoding == "int8" else list(shape)
        entries[name] = {"dtype": kind, "shape": stored, "data_offsets": [offset, offset + size * width]}
        offset += size * width
        if encoding == "int8":
            blocks = -(-size // BLOCK)
            ends = [offset, offset + 4 * blocks]
            entries[name + SCALE] = {"dtype": "F32", "shape": [blocks], "data_offsets": ends}
            offset = ends[1]
    raw = msgspec.json.encode(entries)
    raw += b" " * (-len(raw) % _ALIGN)
    return len(raw).to_bytes(8, "little") + raw


def payload_bytes(shapes: Shapes, encoding: Encoding) -> int:
    """Bytes of the tensors in such a file, without its header (some kB)."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    if encoding == "int8":
        return sum(size + 4 * -(-size // BLOCK) for size in sizes)
    return sum(sizes) * _TYPES[encoding][1]


def _encoded(name: str, size: int, encoding: Encoding, source: Source) -> Iterator[bytes | memoryview]:
    """A tensor's bytes in the order of the file: its chunks, then (int8) its scales."""
    scales: list[Floats] = []
    for first, end in chunks(size):
        values = source(name, first, end)
        if len(values) != end - first:
            raise ValueError(f"{name}: {len(values)} values for {first}..{end}")
        if encoding == "float32":
            yield np.ascontiguousarray(values, dtype="<f4").view(np.uint8).data
        elif encoding == "bfloat16":
            yield to_bfloat16(values).view(np.uint8).data
        else:
            numbers, scale = quantise(values)
            scales.append(scale)
            yield numbers.view(np.uint8).data
    for scale in scales:
        yield scale.view(np.uint8).data


def write_payload(
    path: Path, shapes: Shapes, encoding: Encoding, source: Source, *, metadata: Mapping[str, str] | None = None
) -> FileRecord:
    """Write and sync the tensors that `source` gives, in the order of `shapes`; returns size and SHA-256.

    Raises OSError as the file system gives it (a partial file may then remain), ValueError for values that are not
    finite where the encoding is int8.
    """
    hasher = hashlib.sha256()
    total = 0
    with path.open("wb", buffering=0) as file:

        def put(data: bytes | memoryview) -> None:
            nonlocal total
            hasher.update(data)
            view, done = memoryview(data), 0
            while done < len(view):
                done += file.write(view[done:])
            total += len(view)

        put(_header(shapes, encoding, metadata or {}))
        for name, shape in shapes.items():
            for part in _encoded(name, math.prod(shape), encoding, source):
                put(part)
        sync_file(file.fileno())
    return FileRecord(sha256=hasher.hexdigest(), bytes=total)


# -- reading ---------------------------------------------------------------------------------------


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class Payload:
    """An open safetensors file (F32, BF16, F16 or I8 with scales), read in chunks as float32."""

    def __init__(self, path: Path) -> None:
        """Reads and checks the header only. StateError for a file that is missing, cut short or not of this kind."""
        self.path = path
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise StateError(f"{path} is missing") from None
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise StateError(f"{path} is cut short, or no safetensors file")
            try:
                raw = msgspec.json.decode(file.read(length), type=dict[str, msgspec.Raw])
                self.metadata = msgspec.json.decode(raw.pop("__metadata__", b"{}"), type=dict[str, str])
                entries = {name: msgspec.json.decode(value, type=_Entry) for name, value in raw.items()}
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise StateError(f"{path}: its header cannot be read ({error})") from error
            end = max((entry.data_offsets[1] for entry in entries.values()), default=0)
            if size != 8 + length + end:
                raise StateError(f"{path} has {size} bytes, its header asks for {8 + length + end}")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._entries, self._start = entries, 8 + length
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of each tensor, in the file's order; scales are no tensors of their own."""
        for name, entry in entries.items():
            self._check(name, entry)
            if not (name.endswith(SCALE) and name[: -len(SCALE)] in entries):
                self.shapes[name] = self._shape(name, entry)

    def _check(self, name: str, entry: _Entry) -> None:
        width = _SIZES.get(entry.dtype)
        if width is None:
            raise StateError(f"{self.path}: {name} is stored as {entry.dtype}")
        size = math.prod(entry.shape)
        if entry.data_offsets[1] - entry.data_offsets[0] != width * size or entry.data_offsets[0] < 0:
            raise StateError(f"{self.path}: {name} has other bytes than its shape {list(entry.shape)} asks for")
        if entry.dtype == "I8":
            scale = self._entries.get(name + SCALE)
            if scale is None or scale.dtype != "F32" or scale.shape != (-(-size // BLOCK),):
                raise StateError(f"{self.path}: {name} has no fitting scales")

    def _shape(self, name: str, entry: _Entry) -> tuple[int, ...]:
        told = self.metadata.get(f"shape.{name}")
        if told is None:
            return entry.shape
        try:
            shape = tuple(int(part) for part in told.split(",") if part)
        except ValueError:
            raise StateError(f"{self.path}: the shape of {name} is given as {told!r}") from None
        if math.prod(shape) != math.prod(entry.shape):
            raise StateError(f"{self.path}: {name} holds {math.prod(entry.shape)} values, its shape is {list(shape)}")
        return shape

    def read(self, name: str, first: int, end: int) -> Floats:
        """Values first..end of the flattened tensor, float32 [end - first]. `first` is a multiple of BLOCK."""
        entry = self._entries[name]
        width = _SIZES[entry.dtype]
        begin = self._start + entry.data_offsets[0]
        raw = self._map[begin + first * width : begin + end * width]
        if entry.dtype == "F32":
            return np.frombuffer(raw, dtype="<f4")
        if entry.dtype == "BF16":
            return from_bfloat16(np.frombuffer(raw, dtype="<u2"))
        if entry.dtype == "F16":
            return np.frombuffer(raw, dtype="<f2").astype(np.float32)
        if first % BLOCK:
            raise ValueError(f"{first} is no multiple of {BLOCK}")
        scale = self._start + self._entries[name + SCALE].data_offsets[0]
        scales = self._map[scale + 4 * (first // BLOCK) : scale + 4 * -(-end // BLOCK)]
        return dequantise(np.frombuffer(raw, dtype=np.int8), np.frombuffer(scales, dtype="<f4"))

    def array(self, name: str) -> Floats:
        """A whole tensor in its shape."""
        shape = self.shapes[name]
        found = np.empty(math.prod(shape), dtype=np.float32)
        for first, end in chunks(found.size):
            found[first:end] = self.read(name, first, end)
        return found.reshape(shape)

    def arrays(self) -> dict[str, Floats]:
        """All tensors whole: as much memory as the model has in float32."""
        return {name: self.array(name) for name in self.shapes}

    def close(self) -> None:
        self._map.close()

    def __enter__(self) -> Payload:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def verified(path: Path, record: FileRecord) -> Payload:
    """Open a file that must be what was written; StateError where its size or hash differs."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise StateError(f"{path} is missing") from None
    if size != record.bytes:
        raise StateError(f"{path} has {size} bytes, {record.bytes} were written")
    if sha256_file(path) != record.sha256:
        raise StateError(f"{path} does not hold the bytes that were written (SHA-256 differs)")
    return Payload(path)
