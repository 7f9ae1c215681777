"""Building an environment out of wheels that the store holds, or that this machine's own package index has.

The order (one JSON line): {"hash", "base", "python", "wheels": [{"name", "version", "filename", "sha256", "size"}],
"installer": one such wheel (pip), "code": one such wheel (Jupiter), "imports": [modules that must load]}.
With "base": null the Python is the user's own: nothing is installed, "requires": {package: lowest version} is checked.

pip is carried along as a wheel and run out of it: a Debian without ensurepip can have environments as well.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import json
import os
import re
import shutil
import subprocess
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .environment import Layout, environment_name, ready_environment
from .errors import NodeError
from .files import read_json
from .store import Store
from .wire import (
    UNTOUCHED_S,
    count_of,
    hash_file,
    locked,
    read_header,
    relative,
    say,
    sha_of,
    standard_input,
    write_whole,
)

ORDER_BYTES = 4 << 20
TICK_S = 0.5
INSTALL_S = 3600.0
IMPORT_S = 600.0
"""The first import of torch on a busy machine with a slow disk takes minutes."""
STALLED_S = 30.0
"""A download that brings nothing for so long is given up: the control wing sends the wheels instead."""
SPARE_BYTES = 64 << 20
_FILENAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+!-]{0,250}\.whl")


class Wheel:
    """A wheel of the order."""

    def __init__(self, value: object) -> None:
        if not isinstance(value, dict):
            raise NodeError("protocol", "the order names a wheel that is no object")
        self.filename = str(value.get("filename"))
        if not _FILENAME.fullmatch(self.filename):
            raise NodeError("protocol", f"{self.filename[:100]!r} is no name of a wheel")
        self.sha256 = sha_of(value.get("sha256"))
        self.size = count_of(value.get("size"))
        self.name, self.version = str(value.get("name")), str(value.get("version"))

    def place(self, store: Store, folder: Path) -> Path:
        target = folder / self.filename
        store.place(self.sha256, self.size, str(target))
        return target


def read_order() -> dict[str, Any]:
    order = read_header(standard_input(), ORDER_BYTES)
    if order is None:
        raise NodeError("protocol", "the order is missing")
    return order


def progress(step: str, done: int = 0, total: int = 0) -> None:
    say({"step": step, "done": done, "total": total})


# -- building ------------------------------------------------------------------------------------------
def build_environment(layout: Layout) -> int:
    """Carry out an order. NodeError if it cannot be; then nothing of it looks ready."""
    order = read_order()
    name = environment_name(order.get("hash"))
    store, code = Store(str(layout.workdir)), Wheel(order.get("code"))
    base = layout.bases / environment_name(order["base"]) if order.get("base") else None
    if base is not None:
        with waited(layout.bases / f"{base.name}.lock"):
            if read_json(base / "ready.json") is None:
                build_base(store, base, order)
    with waited(layout.environments / f"{name}.lock"):
        files = unpack_code(store, layout, code)
        if ready_environment(layout, name) is None:
            folder = layout.environments / name
            _clear(folder)
            folder.mkdir()
            if base is not None:
                record = _join(folder, base, layout.code / code.sha256)
            else:
                record = _own(str(order.get("python")), layout.code / code.sha256, order.get("requires"))
            check_imports(record["python"], ["jupiter_engine", *_texts(order.get("imports"))], record["env"])
            record.update(hash=name, code=code.sha256, base=base.name if base else None, files=files, at=time.time())
            write_whole(folder / "ready.json", json.dumps(record).encode())
        layout.choose(name)
    ready = read_json(layout.environments / name / "ready.json") or {}
    say({"ready": {key: value for key, value in ready.items() if key != "files"}})
    return 0


@contextlib.contextmanager
def waited(path: Path) -> Iterator[None]:
    """`locked`, telling the caller meanwhile that somebody else builds the same."""
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(2.0):
            progress("waiting")

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        with locked(path):
            ended.set()
            teller.join()
            yield
    finally:
        ended.set()


def build_base(store: Store, base: Path, order: dict[str, Any]) -> None:
    """The virtualenv of a lock. What an interrupted attempt left is removed first."""
    wheels = [Wheel(value) for value in order.get("wheels") or []]
    _clear(base)
    base.mkdir()
    try:
        kept = base / "wheels"
        kept.mkdir()
        paths = [wheel.place(store, kept) for wheel in wheels]
        _require_room(base, paths)
        progress("installing", 0, len(wheels))
        python = _make_virtualenv(str(order.get("python")), base)
        _install(python, Wheel(order.get("installer")).place(store, kept), paths)
        progress("verifying", 0, len(wheels))
        _verify(base, wheels)
        progress("compiling")
        _compile(python, _site_packages(base))
        progress("importing")
        check_imports(python, _texts(order.get("imports")), {})
        shutil.rmtree(kept)
        # Thousands of files were written: they must be on the disk before the mark that says so is.
        os.sync()
        record = {"python": str(order.get("python")), "wheels": [wheel.filename for wheel in wheels], "at": time.time()}
        write_whole(base / "ready.json", json.dumps(record).encode())
    except BaseException:
        _clear(base)
        raise


def _clear(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        (folder / "ready.json").unlink()
    if folder.exists():
        shutil.rmtree(folder)


def _require_room(folder: Path, paths: list[Path]) -> None:
    needed = SPARE_BYTES
    for path in paths:
        try:
            with zipfile.ZipFile(path) as archive:
                # And about a third again for compiled modules.
                needed += sum(
                    entry.file_size * (4 if entry.filename.endswith(".py") else 3) // 3 for entry in archive.infolist()
                )
        except zipfile.BadZipFile as error:
            raise NodeError("wheel", f"{path.name} is no wheel: {error}", "push again") from error
    free = shutil.disk_usage(folder).free
    if free < needed:
        detail = f"installing the packages in {folder} needs {needed} bytes, {free} bytes are free"
        raise NodeError("DiskFull", detail, "free some space there, or give the node another workdir in cluster.yaml")


def _make_virtualenv(python: str, base: Path) -> str:
    done = _run([python, "-I", "-m", "venv", "--without-pip", str(base)], 120.0)
    if done.returncode != 0:
        fix = "on Debian and Ubuntu: sudo apt-get install python3-venv; else name another Python in cluster.yaml"
        raise NodeError("python", f"{python} makes no virtualenv: {_tail(done)}", fix)
    return str(base / "bin" / "python")


def _install(python: str, installer: Path, wheels: list[Path]) -> None:
    argv = [python, "-I", f"{installer}/pip", "install", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
    argv += ["--disable-pip-version-check", "--no-input", "--quiet", *(str(path) for path in wheels)]
    site = _site_packages(installer.parent.parent)

    def installed() -> None:
        progress("installing", len(list(site.glob("*.dist-info"))), len(wheels))

    done = _run(argv, INSTALL_S, tick=installed)
    if done.returncode != 0:
        if "No space left" in done.stderr:
            raise NodeError("DiskFull", f"installing in {site}: {_tail(done)}", "free some space there, then repeat")
        raise NodeError("install", f"the packages could not be installed: {_tail(done)}", "push again")


def _site_packages(base: Path) -> Path:
    return next(iter((base / "lib").glob("python3.*/site-packages")), base / "lib" / "site-packages")


def _compile(python: str, site: Path) -> None:
    # Its status only says that some package ships files of another Python's syntax; imports are checked below.
    _run([python, "-I", "-m", "compileall", "-q", "-q", "-j", "0", str(site)], INSTALL_S)


def _verify(base: Path, wheels: list[Wheel]) -> None:
    """Every file against the hash that its package states, and every package against the lock."""
    site, installed = _site_packages(base), set()
    for info in site.glob("*.dist-info"):
        installed.add(_key(info.name[: -len(".dist-info")]))
        with (info / "RECORD").open(encoding="utf-8", newline="") as file:
            for row in csv.reader(file):
                if len(row) >= 2 and row[1].startswith("sha256="):
                    path = site / row[0]
                    if not path.is_file() or _record_hash(path) != row[1][len("sha256=") :]:
                        raise NodeError("damaged", f"{path} is not what its package says", "push again")
    missing = [wheel.filename for wheel in wheels if _key("-".join(wheel.filename.split("-")[:2])) not in installed]
    if missing:
        raise NodeError("install", f"not installed after all: {', '.join(missing)}", "push again")


def _key(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _record_hash(path: Path) -> str:
    return base64.urlsafe_b64encode(bytes.fromhex(hash_file(path))).rstrip(b"=").decode("ascii")


def unpack_code(store: Store, layout: Layout, code: Wheel) -> dict[str, int]:
    """Put the project's wheel into code/<sha256>; returns the size of each of its files."""
    target = layout.code / code.sha256
    fresh = layout.code / f".{code.sha256[:16]}.{os.getpid()}"
    if fresh.exists():
        shutil.rmtree(fresh)
    fresh.mkdir()
    try:
        wheel = code.place(store, fresh)
        with zipfile.ZipFile(wheel) as archive:
            files = {relative(entry.filename): entry.file_size for entry in archive.infolist()}
            kept = read_json(layout.code / f"{code.sha256}.json")
            if kept == files and target.is_dir() and _as_it_came(target, archive):
                return files
            for name in files:
                path = fresh / "files" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(name))
                os.utime(path, (UNTOUCHED_S, UNTOUCHED_S))
        if target.exists():
            shutil.rmtree(target)
        os.sync()
        (fresh / "files").rename(target)
        write_whole(layout.code / f"{code.sha256}.json", json.dumps(files).encode())
        return files
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _as_it_came(target: Path, archive: zipfile.ZipFile) -> bool:
    for name in archive.namelist():
        try:
            path = target / name
            if path.stat().st_mtime != UNTOUCHED_S or path.read_bytes() != archive.read(name):
                return False
        except OSError:
            return False
    return True


def _join(folder: Path, base: Path, code: Path) -> dict[str, Any]:
    """A virtualenv of links: the base's Python, and a .pth file that names code and packages."""
    site = _site_packages(base)
    own = folder / site.relative_to(base)
    own.mkdir(parents=True)
    (folder / "bin").mkdir()
    shutil.copyfile(base / "pyvenv.cfg", folder / "pyvenv.cfg")
    for path in (base / "bin").iterdir():
        if path.name.startswith("python"):
            (folder / "bin" / path.name).symlink_to(path.readlink())
        elif not path.name.lower().startswith(("activate", "pip")):
            (folder / "bin" / path.name).symlink_to(path)
    (own / "jupiter.pth").write_text(f"{code}\nimport site; site.addsitedir({str(site)!r})\n", encoding="utf-8")
    return {"python": str(folder / "bin" / "python"), "env": {}}


# -- a Python of the user's own ------------------------------------------------------------------------
_VERSIONS = """
import importlib.metadata as metadata, json, re, sys
found = {}
for name in json.loads(sys.argv[1]):
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""


def _own(python: str, code: Path, requires: object) -> dict[str, Any]:
    """Check a Python that is used as it is."""
    if not isinstance(requires, dict):
        raise NodeError("protocol", "the order does not say which packages are needed")
    done = _run([python, "-c", _VERSIONS, json.dumps(list(requires))], 120.0)
    try:
        found = json.loads(done.stdout)
    except ValueError as error:
        raise NodeError(
            "python", f"{python} does not run: {_tail(done)}", "correct `python` in cluster.yaml"
        ) from error
    bad = [
        f"{name} {found[name] or 'is missing'}{f' is older than {lowest}' if found[name] else ''}"
        for name, lowest in requires.items()
        if found[name] is None or _version(found[name]) < _version(str(lowest))
    ]
    if bad:
        fix = "install them there, or write `environment: push` so that Jupiter builds the environment"
        raise NodeError("packages", f"{python} cannot run Jupiter: {'; '.join(bad)}", fix)
    return {"python": python, "env": {"PYTHONPATH": str(code)}, "versions": found}


def _version(text: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:4]]


# -- the machine's own package index -------------------------------------------------------------------
def download_wheels(layout: Layout) -> int:
    """Wheels of the order into the store, from wherever this machine's pip gets packages, checked by hash."""
    order = read_order()
    store = Store(str(layout.workdir))
    wheels = order.get("wheels") or []
    folder = store.folder / f"download.{os.getpid()}"
    folder.mkdir()
    try:
        installer = Wheel(order.get("installer")).place(store, folder)
        wanted = {sha_of(wheel.get("sha256")): wheel for wheel in wheels}
        lines = [f"{_pin(wheel)} --hash=sha256:{sha}" for sha, wheel in wanted.items()]
        (folder / "lock.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        failed = _download(str(order.get("python")), installer, folder)
        found = [] if failed else [_into_store(store, path) for path in (folder / "got").glob("*.whl")]
        if not failed and {one["sha256"] for one in found} != set(wanted):
            failed = "the index has other files than the lock"
        say({"failed": failed} if failed else {"wheels": found})
    finally:
        shutil.rmtree(folder)
    return 0


def _pin(wheel: dict[str, Any]) -> str:
    name, version = str(wheel.get("name")), str(wheel.get("version"))
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,200}", name) or not re.fullmatch(r"[A-Za-z0-9._+!-]{1,100}", version):
        raise NodeError("protocol", f"{name[:80]!r} {version[:80]!r} is no package")
    return f"{name}=={version}"


def _into_store(store: Store, path: Path) -> dict[str, Any]:
    size, sha256 = path.stat().st_size, hash_file(path)
    store.keep(path, sha256)
    return {"filename": path.name, "sha256": sha256, "size": size}


def _download(python: str, installer: Path, folder: Path) -> str:
    """Why it failed, empty if it did not."""
    argv = [python, f"{installer}/pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:", "--quiet"]
    argv += ["--disable-pip-version-check", "--no-input", "--no-cache-dir", "--retries", "1", "--timeout", "10"]
    argv += ["--dest", str(folder / "got"), "--requirement", str(folder / "lock.txt")]
    (folder / "temp").mkdir()
    seen, since = -1, time.monotonic()

    def look() -> None:
        nonlocal seen, since
        size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
        progress("downloading", size)
        if size != seen:
            seen, since = size, time.monotonic()
        elif time.monotonic() - since > STALLED_S:
            raise TimeoutError

    try:
        done = _run(argv, INSTALL_S, tick=look, own_settings=True, env={"TMPDIR": str(folder / "temp")})
    except TimeoutError:
        return f"the package index brought nothing for {STALLED_S:.0f} s"
    return _tail(done) if done.returncode else ""


# -- processes -----------------------------------------------------------------------------------------
def check_imports(python: str, modules: list[str], env: dict[str, str]) -> None:
    """Load modules in a process of their own; NodeError with what it said if one does not."""
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = _run([python, "-c", code, *modules], IMPORT_S, env=env)
    if done.returncode != 0:
        raise NodeError("import", f"{python} cannot load {', '.join(modules)}: {_tail(done)}", "push again")


def _texts(value: object) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) and re.fullmatch(r"[\w.]+", one) for one in value):
        raise NodeError("protocol", "the order does not say which modules must load")
    return value


def _tail(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in (done.stderr or done.stdout).strip().splitlines() if line.strip()]
    return " / ".join(lines[-4:])[-800:] or f"exit status {done.returncode}"


def _run(
    argv: list[str],
    timeout_s: float,
    *,
    tick: Callable[[], None] | None = None,
    env: dict[str, str] | None = None,
    own_settings: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run to the end, calling `tick` now and then. Settings of Python and (unless wanted) of pip stay outside."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("PYTHON") and key != "VIRTUAL_ENV" and (own_settings or not key.startswith("PIP_"))
    }
    if not own_settings:
        kept["PIP_CONFIG_FILE"] = os.devnull
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**kept, **(env or {})},
            # Nothing of the folder we happen to be in may be imported.
            cwd=os.sep,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise NodeError("python", f"{argv[0]} does not start: {error.strerror}", "look at that file") from error
    deadline = time.monotonic() + timeout_s
    try:
        while True:
            try:
                out, err = process.communicate(timeout=TICK_S)
                return subprocess.CompletedProcess(argv, process.returncode, out, err)
            except subprocess.TimeoutExpired:
                if tick is not None:
                    tick()
                if time.monotonic() > deadline:
                    detail = f"{' '.join(argv[:4])} did not end within {timeout_s:.0f} s"
                    raise NodeError("timeout", detail, "look at that machine's load and disk") from None
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
