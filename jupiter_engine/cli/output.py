"""Text and JSON on stdout."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from jupiter_engine.api import Workspace, find_workspace
from jupiter_engine.units import plain_text


def open_workspace(options: argparse.Namespace) -> Workspace:
    """The workspace that --workspace, $JUPITER_HOME or the current folder names; closed when the command ends."""
    root = find_workspace(options.workspace, os.environ, Path.cwd())
    workspace: Workspace = options.resources.enter_context(Workspace(root))
    return workspace


def print_json(value: object) -> None:
    print(msgspec.json.encode(value).decode())


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns as wide as their content; nothing but the two-space gap between them."""
    cells = [[plain_text(str(cell)).replace("\n", " ") for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(head), *cells]) for i in range(len(head))]
    for line in [list(head), *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
