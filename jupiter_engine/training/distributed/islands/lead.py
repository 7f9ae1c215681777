"""The hub's hold on the lead, while it is busy with something else."""

from __future__ import annotations

import threading
from pathlib import Path

from jupiter_engine.training.distributed.islands.ledger import Deposed, Ledger


class Lead:
    """Renews the lead beside whatever takes long."""

    def __init__(self, path: Path, fence: int, ttl_s: float) -> None:
        """`path`: of the ledger; `ttl_s`: so long the lead lasts from each renewal on."""
        self._path, self._fence, self._ttl_s = path, fence, ttl_s
        self._stop = threading.Event()
        self._deposed: Deposed | None = None
        self._thread = threading.Thread(target=self._work, name="lead", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        ledger = Ledger(self._path)
        try:
            while not self._stop.wait(self._ttl_s / 4):
                ledger.renew(self._fence, self._ttl_s)
        except Deposed as error:
            self._deposed = error
        finally:
            ledger.close()

    def check(self) -> None:
        if self._deposed is not None:
            raise self._deposed

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=10.0)
