"""Jupiter's own code as a wheel: made from the installed files, byte for byte the same as long as they are."""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from jupiter_engine import __version__
from jupiter_engine.cluster.contents import LocalFile
from jupiter_engine.files import write_atomic

_DATE = (1980, 1, 1, 0, 0, 0)


def project_wheel(folder: Path) -> LocalFile:
    """The wheel in `folder`, written there if it is not yet: it is named by its hash."""
    data = pack(package())
    sha256 = hashlib.sha256(data).hexdigest()
    path = folder / sha256
    if not path.is_file() or path.read_bytes() != data:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)
    return LocalFile(str(path), sha256, len(data), executable=False)


def package() -> Traversable:
    """The files of the Jupiter that runs."""
    return resources.files("jupiter_engine")


def wheel_name() -> str:
    return f"jupiter-{__version__}-py3-none-any.whl"


def pack(source: Traversable) -> bytes:
    """A wheel of a package. Stored, not compressed: no version of zlib has a say in its bytes."""
    info = f"jupiter-{__version__}.dist-info"
    files = dict(sorted(_files(source, "jupiter_engine")))
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: jupiter\nVersion: {__version__}\n".encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: jupiter\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = "".join(f"{name},sha256={_record_hash(data)},{len(data)}\n" for name, data in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, date_time=_DATE)
            entry.create_system = 3
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, data)
    return target.getvalue()


def _record_hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode("ascii")


def _files(folder: Traversable, prefix: str) -> Iterator[tuple[str, bytes]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            if entry.name != "__pycache__":
                yield from _files(entry, f"{prefix}/{entry.name}")
        elif not entry.name.endswith((".pyc", ".pyo")) and not entry.name.startswith("."):
            yield f"{prefix}/{entry.name}", entry.read_bytes()
