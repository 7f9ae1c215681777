"""What all readers share: the one error they raise, bounded text, bounded numbers, strings fit for people."""

from __future__ import annotations

import json
import math
import re
from typing import Any, Final

from jupiter_engine.errors import JupiterError
from jupiter_engine.units import plain_text

LIMIT_BYTES: Final = 4 << 20
"""A tool that prints more than this is not believed; the longest real answers are below 300 KB."""
LINES_READ: Final = 20_000
_LARGEST: Final = 2**63 - 1
_WHOLE: Final = re.compile(r"[+-]?[0-9]{1,19}")
_REAL: Final = re.compile(r"[+-]?[0-9]{1,19}(\.[0-9]{1,19})?([eE][+-]?[0-9]{1,3})?")


class ToolOutput(JupiterError):
    """A tool of a node printed something that its reader cannot use; `tool` names it as it was called."""

    title = "A system tool's answer could not be read"

    def __init__(self, detail: str, *, title: str | None = None, fix: str = "", tool: str = "") -> None:
        super().__init__(detail, title=title, fix=fix)
        self.tool = tool


def unusable(tool: str, why: str) -> ToolOutput:
    """The error for an answer of `tool` (as it is called) that `why` says cannot be used."""
    return ToolOutput(f"`{tool}` {why}", tool=tool, fix=f"run `{tool}` on the node and see what it says")


def text_of(tool: str, raw: object) -> str:
    """The answer as text; ToolOutput for anything but text or bytes of a believable size."""
    if isinstance(raw, bytes | bytearray):
        if len(raw) > LIMIT_BYTES:
            raise unusable(tool, f"printed {len(raw)} bytes, more than the {LIMIT_BYTES} that are read")
        return bytes(raw).decode("utf-8", "replace")
    if not isinstance(raw, str):
        raise unusable(tool, f"gave {type(raw).__name__}, not text")
    if len(raw) > LIMIT_BYTES:
        raise unusable(tool, f"printed {len(raw)} characters, more than the {LIMIT_BYTES} that are read")
    return raw


def lines_of(tool: str, raw: object) -> list[str]:
    """Its lines without their ends, split at line feeds only."""
    lines = [line.rstrip("\r") for line in text_of(tool, raw).split("\n")]
    if len(lines) > LINES_READ:
        raise unusable(tool, f"printed {len(lines)} lines, more than the {LINES_READ} that are read")
    return lines


def json_of(tool: str, raw: object) -> Any:
    """The decoded JSON of the answer; what has been decoded already is taken as it is."""
    if isinstance(raw, dict | list):
        return raw
    text = text_of(tool, raw)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise unusable(tool, f"printed no JSON: {short(error)}") from None


def short(value: object, limit: int = 120) -> str:
    """A string for people: one line, no control characters, no broken Unicode, cut at `limit` characters."""
    text = str(value)[: limit * 8] if isinstance(value, str | int | float | Exception) else ""
    text = " ".join(plain_text(text).split())
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def whole(value: object) -> int | None:
    """A whole number of at most 63 bits, or None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value if abs(value) <= _LARGEST else None
    if not isinstance(value, str) or not _WHOLE.fullmatch(value.strip()):
        return None
    number = int(value)
    return number if abs(number) <= _LARGEST else None


def real(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        try:
            number = float(value)
        except OverflowError:
            return None
    elif isinstance(value, str) and _REAL.fullmatch(value.strip()):
        number = float(value)
    else:
        return None
    return number if math.isfinite(number) else None


def table(value: object) -> dict[str, Any]:
    """A JSON object, or an empty one."""
    return {key: entry for key, entry in value.items() if isinstance(key, str)} if isinstance(value, dict) else {}


def rows(value: object, limit: int = 4096) -> list[Any]:
    """A JSON list (at most `limit` of it), or an empty one."""
    return value[:limit] if isinstance(value, list) else []


def pairs(lines: list[str], mark: str) -> dict[str, str]:
    """Lines `key<mark>value` by key; the first of a key counts."""
    found: dict[str, str] = {}
    for line in lines:
        key, separator, value = line.partition(mark)
        if separator and key.strip():
            found.setdefault(key.strip(), value.strip())
    return found
