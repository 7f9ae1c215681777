"""The console with played machines, as a program for a pseudo-terminal: WORKSPACE several|hostile|many."""

from __future__ import annotations

import itertools
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TEXTUAL_ANIMATIONS", "none")
os.environ.setdefault("TEXTUAL_FPS", "30")

from jupiter_engine.api import OfferedKey
from jupiter_engine.protocol.fleet import FleetPicture
from jupiter_tui.app import ConsoleApp
from tests.tui import played_fleet
from tests.tui.recorded import RecordedWorkspace


class Restless(played_fleet.PlayedMachines):
    """Sixty-four nodes of which some change at every look, as they do when all of them work."""

    def __init__(self) -> None:
        super().__init__(played_fleet.many())
        self._turn = itertools.count()

    def picture(self) -> FleetPicture:
        return played_fleet.many(at=float(next(self._turn) % 50))


def main(workspace: str, kind: str) -> None:
    machines = {
        "several": lambda: played_fleet.PlayedMachines(
            played_fleet.several(findings=played_fleet.FINDINGS, findings_at=time.time())
        ),
        "hostile": lambda: played_fleet.PlayedMachines(played_fleet.hostile()),
        "many": Restless,
    }[kind]()
    evil = f"k[b]{played_fleet.ESCAPES}"
    machines.key = OfferedKey(host=evil, port=22, algorithm=evil, fingerprint=evil, line=evil)
    ConsoleApp(opener=lambda _: RecordedWorkspace(Path(workspace), [], machines=machines)).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
