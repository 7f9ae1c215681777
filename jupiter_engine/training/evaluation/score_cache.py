"""Finished scores by content: the same model on the same unit, asked in the same way, is never measured twice.

One JSON-lines file for each model, `<model sha256>.jsonl` in the cache folder. A line is found by the hash of
everything that fixed the value (text, wording version, precision, sampling parameters), never by a name.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import msgspec

from jupiter_engine.errors import StateError
from jupiter_engine.files import disk_full, drop_torn_tail, sha256_text, whole_lines


class CachedScore(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    key: str
    value: float
    answer: str = ""


def content_key(*parts: object) -> str:
    """sha256 over the JSON of `parts`: numbers, texts, structs, lists."""
    return sha256_text(msgspec.json.encode(parts).decode())


class ScoreCache:
    """The finished scores of one model. Several processes may use one cache folder at the same time."""

    def __init__(self, folder: Path, model_sha256: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{model_sha256}.jsonl"
        self._found = self._read()

    def __len__(self) -> int:
        return len(self._found)

    def get(self, key: str) -> CachedScore | None:
        return self._found.get(key)

    def add(self, scores: Iterable[CachedScore]) -> None:
        """Append durably; returns once the lines are on disk."""
        batch = list(scores)
        data = b"".join(msgspec.json.encode(score) + b"\n" for score in batch)
        try:
            with self._locked() as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise disk_full(error, self._path) from error
        self._found.update((score.key, score) for score in batch)

    @contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        """The file open for appending, ours alone, cut back to whole lines (a writer may have been killed)."""
        with self._path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            drop_torn_tail(self._path)
            yield file

    def _read(self) -> dict[str, CachedScore]:
        with self._locked():
            lines = [line for line, _ in whole_lines(self._path)]
        decoder = msgspec.json.Decoder(CachedScore)
        found: dict[str, CachedScore] = {}
        for number, line in enumerate(lines, 1):
            try:
                score = decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise StateError(
                    f"{self._path}, line {number}: {error}", fix="remove this file; the model will be scored again"
                ) from error
            found[score.key] = score
        return found
