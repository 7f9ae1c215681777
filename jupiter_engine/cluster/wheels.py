"""Locks and wheels: chosen and fetched on this machine by its own pip, for the Python and system of a node.

.jupiter/wheels/locks/<key>.json    what was chosen for a target and its requirements; later pushes ask no index
.jupiter/wheels/files/<sha256>      wheels that were fetched here
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import msgspec

from jupiter_engine.cluster.contents import LocalFile
from jupiter_engine.cluster.progress import OnTransfer
from jupiter_engine.cluster.targets import Kind, Target, installed_versions, key_of
from jupiter_engine.errors import StageFailed
from jupiter_engine.files import disk_full, read_json, sha256_file, write_json
from jupiter_engine.protocol.fleet import Transfer
from jupiter_engine.units import plain_text

TICK_S = 0.5

# pip takes the markers of a requirement (sys_platform == "darwin") from the Python it runs on even when it is told to
# choose for another platform; without this, macOS parts would be missing and Linux parts be asked for.
_PIP_FOR = """
import json, sys
from pip._vendor.packaging import markers
there = json.loads(sys.argv.pop(1))
here = markers.default_environment
markers.default_environment = lambda: {**here(), **there}
from pip._internal.cli.main import main
sys.exit(main())
"""


class Wheel(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a lock."""

    name: str
    version: str
    filename: str
    sha256: str
    size: int = 0
    """0: not known yet (never fetched here)."""


class Lock(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that an environment is made of, except Jupiter itself."""

    target: Target
    requirements: tuple[str, ...]
    wheels: tuple[Wheel, ...]
    installer: Wheel
    """pip, which installs the others on the node."""

    def digest(self) -> str:
        """Equal for equal environments, whoever chose them when."""
        parts = [self.target.short_python(), *sorted(wheel.sha256 for wheel in self.wheels)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


class NothingFits(StageFailed):
    """The index has no set of wheels for a target."""

    title = "No packages for this machine"


class Wheelhouse:
    """Locks and wheels of a workspace."""

    def __init__(self, folder: Path) -> None:
        self.locks = folder / "locks"
        self.files = folder / "files"
        for made in (self.locks, self.files):
            made.mkdir(parents=True, exist_ok=True)

    # -- locks -----------------------------------------------------------------------------------------
    async def lock(self, target: Target, wanted: tuple[str, ...], constraints: tuple[str, ...]) -> Lock:
        """The lock for a target: as chosen before, or chosen now. NothingFits without wheels for it, StageFailed if
        pip or the index fails."""
        path = self.locks / f"{key_of(target, wanted, constraints)}.json"
        async with _alone(path.with_suffix(".flock")):
            if path.exists():
                kept = read_json(path, Lock)
                assert isinstance(kept, Lock)
                return kept
            found = await self._choose(target, wanted, constraints)
            write_json(path, found)
            return found

    async def _choose(self, target: Target, wanted: tuple[str, ...], constraints: tuple[str, ...]) -> Lock:
        with tempfile.TemporaryDirectory(dir=self.locks) as name:
            folder = Path(name)
            (folder / "constraints.txt").write_text("\n".join(constraints) + "\n", encoding="utf-8")
            wheels = await self._report(target, folder, ["--constraint", str(folder / "constraints.txt"), *wanted])
            installer = await self._report(target, folder, ["--no-deps", "pip"])
        return Lock(target=target, requirements=wanted, wheels=wheels, installer=installer[0])

    async def _report(self, target: Target, folder: Path, arguments: list[str]) -> tuple[Wheel, ...]:
        report = folder / "report.json"
        argv = [
            "install",
            "--dry-run",
            "--ignore-installed",
            "--target",
            str(folder / "nowhere"),
            "--report",
            str(report),
        ]
        await self._pip(target, [*argv, *_platform(target), *arguments], folder)
        answer = json.loads(report.read_bytes())
        seen = {key: answer["environment"].get(key) for key in ("sys_platform", "platform_machine", "python_version")}
        if seen != {key: target.markers()[key] for key in seen}:
            raise StageFailed(
                "this pip chose packages for this machine instead of the node's",
                fix=f"update it: {sys.executable} -m pip install --upgrade pip",
            )
        return tuple(sorted((_wheel(item) for item in answer["install"]), key=lambda wheel: wheel.name.lower()))

    # -- wheels ----------------------------------------------------------------------------------------
    def local(self, wheel: Wheel) -> LocalFile | None:
        """The file of a wheel, if it is here."""
        path = self.files / wheel.sha256
        with suppress(FileNotFoundError):
            return LocalFile(str(path), wheel.sha256, path.stat().st_size, executable=False)
        return None

    def drop(self, file: LocalFile) -> None:
        """Remove a wheel that is not what its name says."""
        Path(file.path).unlink(missing_ok=True)

    def complete(self, lock: Lock) -> bool:
        """Whether all of a lock's wheels are here."""
        return all(self.local(wheel) is not None for wheel in lock.wheels)

    async def fetch(
        self, target: Target, wheels: Sequence[Wheel], on_transfer: OnTransfer | None = None
    ) -> list[LocalFile]:
        """The files of wheels, fetched if need be and checked against their hashes. StageFailed if the index fails."""
        async with _alone(self.files / ".flock"):
            missing = [wheel for wheel in wheels if self.local(wheel) is None]
            if missing:
                await self._download(target, missing, on_transfer)
        return [found for wheel in wheels if (found := self.local(wheel)) is not None]

    async def _download(self, target: Target, missing: list[Wheel], on_transfer: OnTransfer | None) -> None:
        with tempfile.TemporaryDirectory(dir=self.files) as name:
            folder = Path(name)
            lines = [f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}" for wheel in missing]
            (folder / "lock.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            argv = ["download", "--no-deps", "--require-hashes", "--no-cache-dir", "--dest", str(folder / "got")]
            argv += [*_platform(target), "--requirement", str(folder / "lock.txt")]
            await self._pip(target, argv, folder, on_transfer)
            got = {await asyncio.to_thread(sha256_file, path): path for path in (folder / "got").glob("*.whl")}
            for wheel in missing:
                if wheel.sha256 not in got:
                    raise StageFailed(
                        f"the package index no longer has {wheel.filename} as it was chosen",
                        fix=f"remove {self.locks} and push again: newer packages are chosen then",
                    )
                got[wheel.sha256].replace(self.files / wheel.sha256)

    # -- pip -------------------------------------------------------------------------------------------
    async def _pip(
        self, target: Target, arguments: list[str], folder: Path, on_transfer: OnTransfer | None = None
    ) -> None:
        argv = [sys.executable, "-c", _PIP_FOR, json.dumps(target.markers()), *arguments, "--quiet", "--no-input"]
        temp = folder / "temp"
        temp.mkdir(exist_ok=True)
        environment = {**os.environ, "TMPDIR": str(temp), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
        )
        try:
            talk = asyncio.ensure_future(process.communicate())
            while not (await asyncio.wait({talk}, timeout=TICK_S))[0]:
                if on_transfer is not None:
                    size = await asyncio.to_thread(_size, folder)
                    on_transfer(_downloading(size))
            _, errors = talk.result()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            raise _pip_error(target, plain_text(errors.decode("utf-8", "replace")))


def _downloading(size: int) -> Transfer:
    return Transfer(
        what="environment", sent_bytes=size, total_bytes=0, bytes_per_s=None, eta_s=None, step="downloading packages"
    )


def _size(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            size += path.lstat().st_size if path.is_file() else 0
    return size


def constraints(kind: Kind, wanted: tuple[str, ...]) -> list[tuple[str, ...]]:
    """What to ask for, best first: the very builds of this machine, their versions, whatever there is.

    A build is told by the part after `+`: torch 2.13.0+cpu is a tenth of the one with CUDA, of which only a
    machine with an NVIDIA card has any use, and which alone is of use there.
    """
    exact: list[str] = []
    public: list[str] = []
    never: list[str] = []
    for name, version in sorted(installed_versions(wanted).items()):
        plain, _, build = version.partition("+")
        public.append(f"{name}=={plain}")
        exact.append(f"{name}=={version if kind == 'cpu' else plain}")
        if build.startswith("cpu") and kind == "nvidia":
            never.append(f"{name}!={version}")
    return list(dict.fromkeys((tuple(exact + never), tuple(public + never), tuple(never))))


def _platform(target: Target) -> list[str]:
    argv = ["--only-binary=:all:", "--implementation", "cp", "--python-version", target.short_python()]
    return [*argv, *(word for tag in target.tags() for word in ("--platform", tag))]


def _wheel(item: dict[str, Any]) -> Wheel:
    found, url = item["download_info"], item["download_info"]["url"]
    filename = unquote(urlparse(url).path).rpartition("/")[2]
    archive = found.get("archive_info", {})
    sha256 = archive.get("hashes", {}).get("sha256") or archive.get("hash", "").removeprefix("sha256=")
    if not sha256 and url.startswith("file:"):
        sha256 = sha256_file(Path(unquote(urlparse(url).path)))
    if not sha256 or not filename.endswith(".whl"):
        raise StageFailed(
            f"the package index gives no SHA-256 for {filename}", fix="use an index that states hashes of its files"
        )
    described = item["metadata"]
    return Wheel(name=described["name"], version=described["version"], filename=filename, sha256=sha256)


def _pip_error(target: Target, said: str) -> StageFailed:
    lines = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.startswith(("ERROR", "Error"))]
    tail = " / ".join(lines[-3:])[-600:] or said.strip()[-600:]
    if "No module named" in said and "pip" in said:
        fix = f"{sys.executable} -m ensurepip, then push again"
        return StageFailed("this Python has no pip, which chooses and fetches packages for nodes", fix=fix)
    if "No matching distribution" in said or "ResolutionImpossible" in said or "conflicting dependencies" in said:
        fix = "another Python on that node may do (`python:` in cluster.yaml); or use `environment: own`"
        return NothingFits(f"for {target.text()}: {tail}", fix=fix)
    if "No space left" in said:
        return StageFailed(f"this machine's disk is full: {tail}", fix="free some space, then push again")
    fix = "packages are chosen and fetched once, with network; look at pip's own settings if there is one"
    return StageFailed(f"pip failed: {tail}", title="Packages could not be fetched", fix=fix)


@asynccontextmanager
async def _alone(path: Path) -> AsyncIterator[None]:
    """Alone among tasks and processes of this machine."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise disk_full(error, path) from error
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(0.2)
        yield
    finally:
        os.close(descriptor)
