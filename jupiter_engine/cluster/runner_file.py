"""The node runner as one file: the package jupiter_engine.node packed so that the same sources give the same bytes."""

from __future__ import annotations

import hashlib
import io
import zipfile
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable

import msgspec

PACKAGE = "jupiter_node"
"""Name of the package inside the file."""

# Written so that any Python there is can read it, if only to say that it is too old.
_FIRST = b"""import sys
if sys.version_info < (3, 9):
    detail = "%s is Python %d.%d, the node runner needs 3.9" % ((sys.executable,) + sys.version_info[:2])
    sys.stdout.write('{"error": {"kind": "python", "detail": "' + detail + '", "fix": ""}}\\n')
    sys.exit(1)
from jupiter_node.__main__ import run
sys.exit(run(sys.argv[1:]))
"""


class RunnerFile(msgspec.Struct, frozen=True, kw_only=True):
    """A zip file that Python runs: `PYTHON FILE VERB ...`."""

    data: bytes
    sha: str
    """SHA-256 of `data`, hexadecimal."""

    @property
    def name(self) -> str:
        """What the file is called in `<workdir>/node/` of a machine."""
        return f"{self.sha[:16]}.pyz"

    @staticmethod
    def packed() -> RunnerFile:
        """The node runner of this Jupiter."""
        return _packed()


@cache
def _packed() -> RunnerFile:
    sources = dict(_sources(resources.files("jupiter_engine.node"), PACKAGE))
    sources["__main__.py"] = _FIRST
    target = io.BytesIO()
    # Stored, not compressed: the bytes then depend on no version of zlib, and a start unpacks nothing.
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(sources):
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, sources[name])
    data = target.getvalue()
    return RunnerFile(data=data, sha=hashlib.sha256(data).hexdigest())


def _sources(folder: Traversable, prefix: str) -> list[tuple[str, bytes]]:
    found: list[tuple[str, bytes]] = []
    for entry in folder.iterdir():
        if entry.is_dir() and entry.name != "__pycache__":
            found += _sources(entry, f"{prefix}/{entry.name}")
        elif entry.name.endswith(".py"):
            found.append((f"{prefix}/{entry.name}", entry.read_bytes()))
    return found
