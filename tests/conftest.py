"""The order of the whole suite."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the longest time limits first: files run side by side, and a long one that begins last is waited for
    while the other processes have nothing left to do. (scripts/test keeps pytest-xdist from sorting files anew.)"""
    longest: dict[str, float] = {}
    for item in items:
        mark = item.get_closest_marker("timeout")
        limit = float(mark.args[0]) if mark is not None and mark.args else 0.0
        file = item.nodeid.partition("::")[0]
        longest[file] = max(limit, longest.get(file, 0.0))
    # Stable: within a file, and among files of one limit, everything stays in order.
    items.sort(key=lambda item: -longest[item.nodeid.partition("::")[0]])
