"""Verb `state`: what a keep folder's processes are doing, read from files and from the system."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .errors import NodeError
from .keep_folder import KeepFolder


def main(arguments: list[str]) -> int:
    """state FOLDER: one line with runner, round, processes, events_seq and disk_full."""
    if len(arguments) != 1:
        raise NodeError("usage", "state FOLDER")
    sys.stdout.write(json.dumps(KeepFolder(Path(arguments[0])).state()) + "\n")
    sys.stdout.flush()
    return 0
