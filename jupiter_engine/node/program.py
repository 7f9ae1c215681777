"""How this node runner is started again for another verb, and which version it is."""

from __future__ import annotations

import hashlib
import sys
from functools import lru_cache
from pathlib import Path

PYTHON_FLAGS = ("-I", "-S", "-X", "utf8")
"""Only the standard library, whatever PYTHON* variables and site packages say; text is UTF-8 in every locale."""


@lru_cache(maxsize=1)
def file() -> Path | None:
    """The packed file we run from; None when run from a source tree."""
    here = Path(__file__).resolve()
    return next((above for above in here.parents if above.is_file()), None)


@lru_cache(maxsize=1)
def version() -> str:
    """SHA-256 of the packed file (the first 16 digits are its name); `source` when run from a source tree."""
    packed = file()
    return hashlib.sha256(packed.read_bytes()).hexdigest() if packed else "source"


def argv(verb: str, *arguments: str) -> list[str]:
    """Command that runs a verb of this same node runner with this same Python."""
    packed = file()
    if packed is not None:
        return [sys.executable, *PYTHON_FLAGS, str(packed), verb, *arguments]
    package = __package__ or "jupiter_engine.node"
    root = Path(__file__).resolve().parents[package.count(".") + 1]
    start = f"import sys; sys.path.insert(0, {str(root)!r}); from {package} import __main__ as it; "
    return [sys.executable, *PYTHON_FLAGS, "-c", start + "sys.exit(it.run(sys.argv[1:]))", verb, *arguments]
