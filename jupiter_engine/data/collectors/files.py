"""Documents from a local file or folder: UTF-8 text and code, nothing fetched."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator
from pathlib import Path

import ftfy

from jupiter_engine.data.collectors.document import Collected, RawDocument
from jupiter_engine.data.words import words
from jupiter_engine.errors import ConfigError
from jupiter_engine.protocol.rows import Kind
from jupiter_engine.protocol.specs import SourceSpec

MAX_FILE_BYTES = 4_000_000
_MAX_LINE_CHARACTERS = 20_000
_CODE_SUFFIXES = frozenset(
    f".{name}"
    for name in words(
        "c cc cpp cs css cu cxx f90 go h hpp java jl js kt lua m mm php pl py pyi r rb rs scala sh sql swift ts tsx zig"
    )
)
_FOLDERS_NEVER_READ = frozenset({".git", ".hg", ".jupiter", ".svn", ".venv", "__pycache__", "node_modules"})
# What UTF-8 read as Windows-1252 or Latin-1 looks like: a lead byte shown as a letter, then a shown continuation byte.
_MOJIBAKE = re.compile(
    "[\u00c2-\u00f4][\u0080-\u00bf\u0152\u0153\u0160\u0161\u017d\u017e\u02c6\u02dc\u2013-\u2122\u20ac]"
)


def kind_of(path: Path) -> Kind:
    """`code` for source-code suffixes, `docs` for everything else."""
    return "code" if path.suffix.lower() in _CODE_SUFFIXES else "docs"


def find(source: SourceSpec) -> list[tuple[str, Path]]:
    """(name relative to the source, file) of every wanted file, sorted by name.

    `include` and `exclude` are globs over the file name or the relative path.
    Raises ConfigError if the path does not exist.
    """
    if source.path is None:
        raise ConfigError(f"source {source.id}: type files needs a path", fix=f"add `path:` to source {source.id}")
    root = Path(source.path).expanduser()
    if not root.exists():
        raise ConfigError(f"source {source.id}: {root} does not exist", fix="correct `path:` of this source")
    if root.is_file():
        return [(root.name, root)]
    wanted = [
        (name, path)
        for name, path in _walk(root)
        if _matches(name, source.include) and not _matches(name, source.exclude)
    ]
    return sorted(wanted)


def _walk(root: Path) -> Iterator[tuple[str, Path]]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in _FOLDERS_NEVER_READ)
        for name in names:
            path = Path(folder) / name
            if path.is_file():
                yield path.relative_to(root).as_posix(), path


def _matches(name: str, globs: tuple[str, ...]) -> bool:
    base = name.rsplit("/", 1)[-1]
    return any(fnmatch.fnmatchcase(base, glob) or fnmatch.fnmatchcase(name, glob) for glob in globs)


def collect(source: SourceSpec) -> Collected:
    """One document a readable file; the others are counted with their reason."""
    collected = Collected()
    for name, path in find(source):
        text = _read(path, name, collected)
        if text is None:
            continue
        kind = kind_of(path)
        collected.documents.append(
            RawDocument(
                source=source.id,
                uri=f"{source.id}:{name}",
                title=path.stem,
                kind=kind,
                license=source.license,
                text=repair(text) if kind == "docs" else text,
            )
        )
    return collected


def _read(path: Path, name: str, collected: Collected) -> str | None:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            collected.skip("larger than 4 MB", name)
            return None
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        collected.skip("not utf-8", name)
        return None
    except OSError as error:
        collected.skip(f"not readable ({error.strerror})", name)
        return None
    if not text.strip():
        collected.skip("empty", name)
        return None
    if "\x00" in text:
        collected.skip("binary", name)
        return None
    if max(map(len, text.splitlines())) > _MAX_LINE_CHARACTERS:
        collected.skip("lines too long (minified or generated)", name)
        return None
    return text


def repair(text: str) -> str:
    """Undo mojibake where the text shows signs of it; any other text is returned unchanged."""
    if not _MOJIBAKE.search(text):
        return text
    fixed: str = ftfy.fix_text(text, fix_latin_ligatures=False, uncurl_quotes=False, normalization=None)
    return fixed
