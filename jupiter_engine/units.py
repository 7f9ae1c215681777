"""Sizes, durations and rates as people read them."""

from __future__ import annotations

import re

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b.|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def bytes_text(size_bytes: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit, step in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(size_bytes) >= step:
            return f"{size_bytes / step:.1f} {unit}"
    return f"{size_bytes:.0f} B"


def duration_text(seconds: float | None) -> str:
    """3725 -> '1h02m'; 65 -> '1m05s'; None (unknown) -> '-'."""
    if seconds is None or seconds != seconds or seconds < 0:
        return "-"
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def count_text(count: float) -> str:
    """12345 -> '12.3k'."""
    for unit, step in (("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if abs(count) >= step:
            return f"{count / (1e3 if unit == 'k' else step):.1f}{unit}"
    return f"{count:.0f}"


def plain_text(text: str) -> str:
    """Text that came from another process, made safe for a terminal.

    Escape sequences and control characters (C0, C1, DEL; tab and newline stay)
    are removed at ingest, so nothing a worker prints can drive the terminal.
    """
    return _CONTROL.sub("", text)
