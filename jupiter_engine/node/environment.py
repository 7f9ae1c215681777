"""Environments of a node: is one ready, which Pythons could carry one, which are no longer wanted.

    <workdir>/bases/<lock>/                      virtualenv with the packages of a lock; ready.json written last
    <workdir>/code/<sha256>/                     the project's own wheel, unpacked; renamed into place when complete
    <workdir>/environments/<hash>/bin/python     both together; ready.json written last
    <workdir>/environments/current               hash of the one that was made or chosen last

Packages are gigabytes and seldom change, the project's code is a megabyte and changes often: so many
environments share one base. An environment is a virtualenv whose only content is a .pth file that names
the code and the base; its `bin/python` needs no variable set, whoever starts it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import identity
from .errors import NodeError
from .files import read_json
from .tools import run_tool, search_path
from .wire import UNTOUCHED_S, argument, is_full, locked, no_room, relative, say, write_whole

MINIMUM = (3, 11)
"""Oldest Python that Jupiter's workers run on."""
EXAMINE_S = 20.0
LEFTOVER_S = 3600.0

_WHAT = """
import json, os, platform, sys, sysconfig
libc = ("", "")
try:
    name, _, version = os.confstr("CS_GNU_LIBC_VERSION").partition(" ")
    libc = (name, version)
except (AttributeError, OSError, ValueError):
    pass
tag = sysconfig.get_platform().rsplit("-", 1)[-1]
print(json.dumps({
    "path": sys.executable, "version": list(sys.version_info[:3]), "release": sys.version_info[3] == "final",
    "implementation": sys.implementation.name, "system": platform.system(), "libc": libc,
    "machine": platform.machine() if tag.startswith(("universal", "fat")) else tag,
    "macos": platform.mac_ver()[0], "free_threaded": bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    "venv": __import__("importlib.util").util.find_spec("venv") is not None}))
"""


class Layout:
    """Where things are below the work folder."""

    def __init__(self, workdir: str) -> None:
        self.workdir = Path(workdir).expanduser().absolute()
        self.bases = self.workdir / "bases"
        self.code = self.workdir / "code"
        self.environments = self.workdir / "environments"
        for folder in (self.bases, self.code, self.environments):
            folder.mkdir(parents=True, exist_ok=True)

    def current(self) -> str:
        try:
            return (self.environments / "current").read_text("ascii").strip()
        except FileNotFoundError:
            return ""

    def choose(self, name: str) -> None:
        """Make an environment the current one."""
        if self.current() != name:
            write_whole(self.environments / "current", name.encode("ascii") + b"\n")
        os.utime(self.environments / name / "ready.json")


def environment_name(value: object) -> str:
    """The name of an environment, a base or code: hex digits, nothing that could be a path."""
    if isinstance(value, str) and 16 <= len(value) <= 64 and not set(value) - set("0123456789abcdef"):
        return value
    raise NodeError("protocol", f"{str(value)[:100]!r} is no hash")


def ready_environment(layout: Layout, name: str) -> dict[str, Any] | None:
    """ready.json of an environment whose parts are all still there and untouched."""
    ready = read_json(layout.environments / name / "ready.json")
    if ready is None or not os.access(str(ready.get("python")), os.X_OK):
        return None
    base = ready.get("base")
    if base and read_json(layout.bases / str(base) / "ready.json") is None:
        return None
    return ready if untouched(layout.code / str(ready.get("code")), ready.get("files")) else None


def untouched(code: Path, files: object) -> bool:
    """Whether unpacked code has the files it came with, none of them written to since."""
    if not isinstance(files, dict):
        return False
    for name, size in files.items():
        try:
            at = (code / relative(name)).lstat()
        except OSError:
            return False
        if at.st_size != size or at.st_mtime != UNTOUCHED_S:
            return False
    return True


# -- which Pythons there are ---------------------------------------------------------------------------
def candidates() -> Iterator[str]:
    """Paths of Pythons that may be new enough, whatever PATH the ssh command got."""
    home = Path.home()
    folders = [
        *search_path().split(":"),
        *(str(home / name) for name in (".local/bin", "miniforge3/bin", "miniconda3/bin", "mambaforge/bin")),
        *(str(path) for path in sorted(home.glob(".pyenv/versions/*/bin"))),
        *(str(path) for path in sorted(home.glob(".local/share/uv/python/cpython-*/bin"))),
        *(str(path) for path in sorted(Path("/Library/Frameworks/Python.framework/Versions").glob("3.*/bin"))),
    ]
    names = ["python3", *(f"python3.{minor}" for minor in range(20, MINIMUM[1] - 1, -1))]
    seen: set[str] = set()
    for folder in folders:
        for name in names:
            path = os.path.join(folder, name)  # noqa: PTH118 - entries of PATH are text
            # A launcher of pyenv is a script that starts whatever its settings say now.
            if folder and "/.pyenv/shims" not in folder and os.access(path, os.X_OK) and os.path.isfile(path):  # noqa: PTH113
                real = os.path.realpath(path)
                if real not in seen:
                    seen.add(real)
                    yield path


def examine(path: str) -> dict[str, Any]:
    """What a Python is, and `why` it cannot be used where it cannot."""
    answer = run_tool((path, "-I", "-c", _WHAT), EXAMINE_S)
    try:
        found: dict[str, Any] = json.loads(answer["out"].strip().splitlines()[-1])
        version = tuple(found["version"])
    except (ValueError, KeyError, IndexError, TypeError):
        return {"path": path, "why": f"does not run: {str(answer.get('err', ''))[-200:].strip() or 'no answer'}"}
    found["path"] = path
    if version < MINIMUM:
        found["why"] = f"is Python {version[0]}.{version[1]}, older than {MINIMUM[0]}.{MINIMUM[1]}"
    elif not found["release"]:
        found["why"] = "is a preview of a Python to come"
    elif found["implementation"] != "cpython" or found["free_threaded"]:
        found["why"] = "is not the usual CPython, for which packages are built"
    elif not found["venv"]:
        found["why"] = "lacks the module venv"
    return found


def pythons(wanted: str) -> list[dict[str, Any]]:
    """All Pythons of this machine, or only the one that is wanted; newest first."""
    if wanted:
        path = str(Path(wanted).expanduser())
        return [examine(path) if os.access(path, os.X_OK) else {"path": path, "why": "is not there"}]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(examine, candidates()))
    return sorted(found, key=lambda one: ("why" in one, [-part for part in one.get("version", [])]))


def facts(layout: Layout, wanted: str) -> dict[str, Any]:
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "pythons": pythons(wanted),
        "nvidia": Path("/proc/driver/nvidia/version").exists()
        or shutil.which("nvidia-smi", path=search_path()) is not None,
        "free_bytes": shutil.disk_usage(layout.workdir).free,
        "bases": [path.parent.name for path in layout.bases.glob("*/ready.json")],
        "at": time.time(),
    }


# -- verbs ---------------------------------------------------------------------------------------------
def state(arguments: list[str]) -> int:
    """WORKDIR HASH [PYTHON] -> {"ready": {"python", "env", ...}} or {"ready": null, "facts"}; HASH `-`: facts only."""
    layout = Layout(argument(arguments, 0, "WORKDIR"))
    asked = argument(arguments, 1, "HASH")
    if asked != "-":
        ready = ready_environment(layout, environment_name(asked))
        if ready is not None:
            layout.choose(asked)
            say({"ready": {key: value for key, value in ready.items() if key != "files"}})
            return 0
    say({"ready": None, "facts": facts(layout, arguments[2] if len(arguments) > 2 else "")})
    return 0


def build(arguments: list[str]) -> int:
    """WORKDIR; stdin the order: see jupiter_engine.node.building. Lines {"step", "done", "total"}, then {"ready"}."""
    from .building import build_environment

    return _in_words(build_environment, Layout(argument(arguments, 0, "WORKDIR")))


def download(arguments: list[str]) -> int:
    """WORKDIR; stdin the order: get wheels from the package index of this machine. Lines {"step", "done"}, then
    {"wheels": [{"filename", "sha256", "size"}]} or {"failed": why}."""
    from .building import download_wheels

    return _in_words(download_wheels, Layout(argument(arguments, 0, "WORKDIR")))


def _in_words(work: Callable[[Layout], int], layout: Layout) -> int:
    """Do it; a disk that fills meanwhile is NodeError `DiskFull` with what is free."""
    try:
        return work(layout)
    except OSError as error:
        if is_full(error):
            raise no_room(layout.workdir, 0) from error
        raise


def prune(arguments: list[str]) -> int:
    """WORKDIR KEEP: remove environments but the newest KEEP and those in use, and what only they needed
    -> {"removed": [...], "kept": [...], "in_use": [...], "freed_bytes"}."""
    layout = Layout(argument(arguments, 0, "WORKDIR"))
    keep = int(argument(arguments, 1, "KEEP"))
    with locked(layout.environments / "prune.lock"):
        found = sorted(
            (path.parent for path in layout.environments.glob("*/ready.json")),
            key=lambda folder: -(folder / "ready.json").stat().st_mtime,
        )
        ready = {folder.name: read_json(folder / "ready.json") or {} for folder in found}
        used = _in_use()
        busy = [name for name, record in ready.items() if _is_used(layout, name, record, used)]
        chosen = [name for name in ready if name == layout.current()]
        kept = list(dict.fromkeys([*list(ready)[:keep], *busy, *chosen]))
        removed = list(_unfinished(layout.environments, ready))
        removed += [layout.environments / name for name in ready if name not in kept]
        for folder, part in ((layout.bases, "base"), (layout.code, "code")):
            wanted = {str(ready[name].get(part)) for name in kept}
            removed += [path for path in folder.iterdir() if path.is_dir() and path.name not in wanted and _old(path)]
        freed = sum(_remove(layout, path) for path in removed)
    names = [str(path.relative_to(layout.workdir)) for path in removed]
    say({"removed": names, "kept": kept, "in_use": busy, "freed_bytes": freed})
    return 0


def _unfinished(folder: Path, ready: dict[str, Any]) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir() and path.name not in ready and _old(path):
            yield path


def _old(path: Path) -> bool:
    """Whether nobody can still be building it. A finished part that no environment names yet is as young as that."""
    marker = path / "ready.json"
    at = marker if marker.exists() else path
    return time.time() - at.stat().st_ctime > LEFTOVER_S


def _remove(layout: Layout, path: Path) -> int:
    """Remove a folder so that at no time it looks ready; returns the bytes of its files."""
    for marker in (path / "ready.json", path.with_name(f"{path.name}.json")):
        with contextlib.suppress(FileNotFoundError):
            marker.unlink()
    size = sum(entry.lstat().st_size for entry in path.rglob("*") if not entry.is_dir())
    away = layout.workdir / f".removed.{os.getpid()}"
    path.rename(away)
    shutil.rmtree(away)
    return size


def _in_use() -> str:
    """Command lines of all processes, one a line."""
    proc = Path("/proc")
    if not (proc / "self" / "cmdline").exists():
        done = subprocess.run(["/bin/ps", "-axww", "-o", "command="], capture_output=True, check=True, timeout=30)
        return done.stdout.decode("utf-8", "replace")
    lines: list[str] = []
    for path in proc.glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace"))
    return "\n".join(lines)


def _is_used(layout: Layout, name: str, record: dict[str, Any], processes: str) -> bool:
    own = {str(layout.environments / name) + "/"}
    if record.get("base"):
        own.add(str(layout.bases / str(record["base"])) + "/")
    else:
        own.add(str(layout.code / str(record.get("code"))))
    if any(part in processes for part in own):
        return True
    return any(part in kept for kept in _kept_runs(layout) for part in own)


def _kept_runs(layout: Layout) -> Iterator[str]:
    """keep.json of every run whose runner lives: between two restarts no process of it may be there."""
    for pattern in (
        "runs/*/keep.json",
        "workspaces/*/runs/*/node/keep.json",
        "workspaces/*/runs/*/ranks/*/node/keep.json",
    ):
        for path in layout.workdir.glob(pattern):
            runner = read_json(path.with_name("runner.json"))
            if runner is not None and identity.living(runner) is not None:
                with contextlib.suppress(OSError):
                    yield path.read_text("utf-8", "replace")
