"""Verbs on each host of a group: rank-prepare (is everything there?), rank-go (start), rank-stop (end, by identity).

Each reads one JSON object from standard input and answers with one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import identity, program
from .ending import Ending
from .errors import NodeError
from .files import read_json, write_atomic, write_json
from .group_spec import layout
from .keep_folder import KeepFolder
from .rank_agent import end_holds, rank_members

AGENT = "agent"
_KEEP_S = 30.0
_PROBE_S = 60.0
_LEFTOVER_GRACE_S = 5.0
_RUNNER_S = 8.0
_POLL_S = 0.05

# Says which versions are installed without loading them: torch alone would take seconds.
_LOOK = """
import importlib.metadata, importlib.util, json, platform, sys
found = {"python": platform.python_version()}
for name in sys.argv[2:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
module = sys.argv[1]
try:
    found["program"] = not module or importlib.util.find_spec(module) is not None
except ImportError as error:
    found["program"], found["why"] = False, str(error)
print(json.dumps(found))
"""


def _question() -> dict[str, Any]:
    value = json.loads(sys.stdin.read())
    if not isinstance(value, dict):
        raise NodeError("protocol", "a JSON object is expected on standard input")
    return value


def _answer(value: dict[str, Any]) -> int:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()
    return 0


# -- prepare -------------------------------------------------------------------------------------------
def prepare(arguments: list[str]) -> int:
    """rank-prepare: everything a launch needs is here, nothing of an older one lives.

    Question: run_folder, generation, launcher, twin, python, program, env, addresses, spec_sha256, first_port, ports.
    Answer: hostname, boot_id, versions, ended (pids of an older launch), busy (taken ports of those asked for).
    """
    del arguments
    asked = _question()
    run_folder = Path(asked["run_folder"])
    _check_spec(run_folder, asked["spec_sha256"])
    ended = end_older(run_folder)
    return _answer(
        {
            "hostname": socket.gethostname(),
            "boot_id": identity.boot_id(),
            "versions": _check_python(asked),
            "ended": ended,
            "busy": busy_ports(asked["addresses"], range(asked["first_port"], asked["first_port"] + asked["ports"])),
        }
    )


def _check_spec(run_folder: Path, expected: str) -> None:
    path = run_folder / "spec.json"
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise NodeError("spec", f"{path}: {error.strerror}", "send the run folder to this host again") from error
    if found != expected:
        raise NodeError("spec", f"{path} is another order than the leading host's", "send the run folder again")


def _check_python(asked: dict[str, Any]) -> dict[str, str]:
    """Versions of the ranks' Python and framework."""
    packages = ["mlx"] if asked["twin"] == "mlx" else ["torch"]
    words = asked["program"]
    module = words[1] if words[:1] == ["-m"] else ""
    try:
        done = subprocess.run(
            [asked["python"], "-c", _LOOK, module, *packages],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd=asked["run_folder"],
            env={**os.environ, **asked["env"]},
            timeout=_PROBE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NodeError("python", f"{asked['python']} does not run: {error}", "build the environment again") from error
    tail = done.stderr.decode("utf-8", "replace").strip()[-1000:]
    if done.returncode != 0:
        raise NodeError(
            "python", f"{asked['python']} ended with {done.returncode}: {tail}", "build the environment again"
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    missing = [name for name in packages if found[name] is None]
    if missing:
        raise NodeError("python", f"{asked['python']} has no {missing[0]}", "build the environment again")
    if not found["program"]:
        raise NodeError("python", f"{asked['python']} finds no {module} {found.get('why', '')}".strip())
    if asked["launcher"] == "mlx.launch" and asked["leads"]:
        script = Path(asked["python"]).with_name("mlx.launch")
        if not script.exists():
            raise NodeError("python", f"{script} is missing", "install mlx there, or use launcher: direct")
    return {name: str(found[name]) for name in ("python", *packages)}


def busy_ports(addresses: Iterable[str], ports: Iterable[int]) -> list[int]:
    """Those of `ports` that cannot be listened on at some address now. NodeError for an address that is not ours."""
    found = set()
    wanted = list(ports)
    for address in addresses:
        try:
            (family, _kind, _protocol, _name, where), *_rest = socket.getaddrinfo(
                address, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.bind(where)
        except OSError as error:
            raise NodeError(
                "address", f"{address} is no address of this host ({error})", "correct the group's addresses"
            ) from error
        for port in wanted:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                try:
                    probe.bind((where[0], port, *where[2:]))
                except OSError:
                    found.add(port)
    return sorted(found)


def end_older(run_folder: Path) -> list[int]:
    """End what still lives of any launch of this run folder; returns the pids that had to be told."""
    told: list[int] = []
    for keep in sorted((run_folder / "ranks").glob("*/node")):
        told += Remains(keep.parent).end(_LEFTOVER_GRACE_S)
    return told


class Remains:
    """What lives of one launch on this host, found through the files of its folder."""

    def __init__(self, root: Path) -> None:
        self._places = layout(root)
        self._held = KeepFolder(self._places.held)
        self._keep = KeepFolder(self._places.keep)
        launch = read_json(self._places.launch) or {}
        self.ranks = [str(rank) for rank in launch.get("ranks") or {}]

    def end(self, grace_s: float) -> list[int]:
        """Agent first, which ends its ranks in good order; then whatever is left, by identity."""
        told: list[int] = []
        agent = read_json(self._keep.pid_file(AGENT)) or {}
        if identity.send(agent, signal.SIGTERM):
            told.append(int(agent["pid"]))
            # A stopped one would not hear it.
            identity.send(agent, signal.SIGCONT)
            _wait(lambda: identity.living(agent) is not None, grace_s + 2 * _RUNNER_S)
        ending = Ending("group", grace_s if not told else 0.0)
        while not ending.step(self.living()):
            time.sleep(_POLL_S)
        told += ending.ended
        end_holds(self._held, self.ranks)
        self._end_runner()
        shutil.rmtree(self._places.temporary, ignore_errors=True)
        return told

    def living(self) -> list[identity.Row]:
        """All processes of the launch, the node runner and the `hold`s apart."""
        table = identity.rows()
        found = {row.pid: row for rank in self.ranks for row in rank_members(self._held, rank, table)}
        launcher = read_json(self._places.keep / "launcher.json") or {}
        agent = read_json(self._keep.pid_file(AGENT)) or {}
        for record in (launcher, agent):
            leader = table.get(int(record.get("pid") or 0))
            if leader is not None and identity.same(leader, record):
                found.update({row.pid: row for row in table.values() if leader.pid in (row.pid, row.session)})
        return [row for row in found.values() if row.state not in identity.DEAD]

    def reports(self) -> dict[str, dict[str, Any]]:
        """Rank -> how it is or how it ended."""
        with contextlib.suppress(NodeError):
            order = self._held.order()
            return {rank: self._held.report(f"rank-{rank}", order) for rank in self.ranks}
        return {}

    def _end_runner(self) -> None:
        """The node runner ends by itself when its process has; one that does not is ended."""
        runner = read_json(self._places.keep / "runner.json") or {}
        if not _wait(lambda: identity.living(runner) is not None, _RUNNER_S):
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            identity.send(runner, number)
            if not _wait(lambda: identity.living(runner) is not None, 2.0):
                break
        # Without room on the disk it waits to write down how the agent ended.
        agent = read_json(self._keep.pid_file(AGENT)) or {}
        identity.send(agent.get("hold") or {}, signal.SIGKILL)


def _wait(pending: Any, seconds: float) -> bool:
    """Wait while `pending`; True if it still is when the time is up."""
    deadline = time.monotonic() + seconds
    while pending():
        if time.monotonic() > deadline:
            return True
        time.sleep(_POLL_S)
    return False


# -- go ------------------------------------------------------------------------------------------------
def go(arguments: list[str]) -> int:
    """rank-go: write the launch down and have it kept by a node runner.

    Question: root, run, generation, leads, lease_s, launch (see launch_lines.plan). Answer: runner (its identity).
    """
    del arguments
    asked = _question()
    root, launch = Path(asked["root"]), asked["launch"]
    places = layout(root)
    for folder in (places.held, places.temporary):
        folder.mkdir(parents=True, exist_ok=True)
    for name, content in launch["files"].items():
        write_atomic(places.keep / name, content.encode("utf-8"))
    write_json(places.launch, launch)
    write_json(places.held / "keep.json", _held_order(root, asked))
    write_json(places.keep / "keep.json", _keep_order(root, asked))
    places.lease.touch()
    if not asked["leads"]:
        # Until the node runner is there, this process is what the ranks look at.
        _write_group(root, asked["generation"], identity.of(os.getpid()))
    runner = _keep(places.keep)
    if not asked["leads"]:
        _write_group(root, asked["generation"], runner)
    return _answer({"runner": runner, "hostname": socket.gethostname()})


def _held_order(root: Path, asked: dict[str, Any]) -> dict[str, Any]:
    launch = asked["launch"]
    common = dict(launch["env"])
    if launch["launcher"] == "mlx.launch":
        # Its script is given the launch's own folder for temporary files; the ranks shall keep the host's.
        common.setdefault("TMPDIR", os.environ.get("TMPDIR", "/tmp"))  # noqa: S108 - the system's default
    processes = [
        {
            "name": f"rank-{rank}",
            "argv": launch["program"],
            "cwd": launch["cwd"],
            "env": {**common, **env},
            "log": str(root / f"rank-{rank}.log"),
        }
        for rank, env in launch["ranks"].items()
    ]
    return {"version": 1, "id": f"{asked['run']}-{asked['generation']}", "processes": processes}


def _keep_order(root: Path, asked: dict[str, Any]) -> dict[str, Any]:
    grace_s = float(asked["launch"]["grace_s"])
    agent = {
        "name": AGENT,
        "argv": program.argv("rank-run", str(root)),
        "cwd": asked["launch"]["cwd"],
        "env": {},
        "log": str(layout(root).keep / "launcher.log"),
    }
    return {
        "version": 1,
        "id": f"{asked['run']}-ranks-{asked['generation']}",
        "processes": [agent],
        # The agent needs its own grace for its ranks first.
        "grace_s": grace_s + 2 * _RUNNER_S,
        "lease_s": asked["lease_s"],
    }


def _keep(folder: Path) -> dict[str, Any]:
    """Start the node runner on a folder; returns who it is."""
    done = subprocess.run(
        program.argv("keep", str(folder)), stdin=subprocess.DEVNULL, capture_output=True, timeout=_KEEP_S, check=False
    )
    runner = read_json(folder / "runner.json")
    if done.returncode != 0 or runner is None:
        said = (done.stdout + done.stderr).decode("utf-8", "replace").strip()[-1000:]
        raise NodeError("keep", f"no node runner for {folder}: {said}", "see runner.log there")
    return {key: runner.get(key) for key in ("pid", "started_at", "mark", "boot_id")}


def _write_group(root: Path, generation: int, who: dict[str, Any]) -> None:
    """What the ranks look at to see whether they are still wanted (see training.distributed.reports.Group)."""
    known = {"pid": who["pid"], "started_at": who["started_at"]}
    write_json(root.parent / "group.json", {"generation": generation, "supervisor": known, "launcher": known})


# -- stop ----------------------------------------------------------------------------------------------
def stop(arguments: list[str]) -> int:
    """rank-stop: end a launch on this host. Question: root, grace_s, files.

    Answer: ranks (how each ended), alive (pids that do not end), sizes (of the files, which grow no more).
    """
    del arguments
    asked = _question()
    remains = Remains(Path(asked["root"]))
    remains.end(float(asked["grace_s"]))
    sizes = {str(path): _size(Path(asked["root"]) / str(path)) for path in asked["files"]}
    return _answer({"ranks": remains.reports(), "alive": [row.pid for row in remains.living()], "sizes": sizes})


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
