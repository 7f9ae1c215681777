"""Launches for tests: on this machine alone, or led by the first host of a rig."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from jupiter_engine.cluster.runner_file import RunnerFile
from tests.rig import Rig, RigHost

PROGRAM = Path(__file__).with_name("tiny_rank.py")
KINDS = {
    "direct-mlx": ("direct", "mlx", "ring"),
    "mlx.launch": ("mlx.launch", "mlx", "ring"),
    "direct-torch": ("direct", "torch", "gloo"),
    "torchrun": ("torchrun", "torch", "gloo"),
}
"""Name -> (launcher, twin, backend)."""


class Launch:
    """One launch: folders, specification, the group's process and what it said.

    `order` goes to the ranks (see tiny_rank). `rig` None: all ranks on this machine.
    """

    def __init__(
        self,
        kind: str,
        folder: Path,
        order: dict[str, Any],
        *,
        rig: Rig | None = None,
        ranks: tuple[int, ...] = (2,),
        **spec: Any,
    ) -> None:
        launcher, twin, backend = KINDS[kind]
        self.rig = rig
        names = [host.name for host in rig.hosts[: len(ranks)]] if rig else ["here"]
        self.run_folders = {name: (rig[name].disk / folder.name if rig else folder) for name in names}
        runner = folder / "runner.pyz"
        content = json.dumps({"twin": twin, "acts": {}, "seconds": 0.0, **order})
        for run_folder in self.run_folders.values():
            (run_folder / "ranks").mkdir(parents=True, exist_ok=True)
            (run_folder / "spec.json").write_text(content)
            runner = run_folder / "runner.pyz"
            runner.write_bytes(RunnerFile.packed().data)
        leader = self.run_folders[names[0]]
        generation = 1 + max(
            (int(path.name) for path in (leader / "ranks").iterdir() if path.name.isdigit()), default=0
        )
        self.folder = leader / "ranks" / str(generation)
        self.folder.mkdir()
        hosts = [
            {
                "name": name,
                "ssh": name if index else "",
                "ranks": count,
                "runner": [sys.executable, str(self.run_folders[name] / "runner.pyz")],
                "python": sys.executable,
                "run_folder": str(self.run_folders[name]),
                "addresses": [rig[name].address if rig else "127.0.0.1"],
                "rdma": [],
            }
            for index, (name, count) in enumerate(zip(names, ranks, strict=True))
        ]
        self.generation = generation
        self.spec: dict[str, Any] = {
            "version": 1,
            "run": folder.name,
            "generation": generation,
            "twin": twin,
            "launcher": launcher,
            "backend": backend,
            "folder": str(self.folder),
            "program": [str(PROGRAM), "{run_folder}", "{generation}"],
            "env": {"OMP_NUM_THREADS": "1", "JUPITER_TEST": str(folder)},
            "ssh_config": str(rig.ssh_config) if rig else "",
            "init_deadline_s": 60,
            "grace_s": 2,
            "lease_s": 30,
            "hosts": hosts,
            **spec,
        }
        self.process: subprocess.Popen[str] | None = None
        self.output = ""

    # -- the process -----------------------------------------------------------------------------
    @property
    def leader(self) -> RigHost:
        assert self.rig is not None
        return self.rig.hosts[0]

    def start(self) -> None:
        path = self.folder / "group-spec.json"
        path.write_text(json.dumps(self.spec))
        argv = [*self.spec["hosts"][0]["runner"], "group", str(path)]
        if self.rig is not None:
            self.process = self.leader.start(*argv)
        else:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, start_new_session=True)

    def wait(self, timeout_s: float = 60.0) -> int:
        """Exit status of the group."""
        assert self.process is not None
        try:
            self.output, _ = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.close()
            raise AssertionError(f"the group goes on: {self.events()}") from None
        return self.process.returncode

    def run(self, timeout_s: float = 60.0) -> int:
        self.start()
        return self.wait(timeout_s)

    def close(self) -> None:
        """End whatever a failed test leaves."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.communicate(timeout=90.0)
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)

    def pid(self) -> int:
        """The group's own process (nsenter stands before it on a rig)."""
        assert self.process is not None
        if self.rig is None:
            return self.process.pid
        for pid in self.leader.pids():
            if " group " in " ".join(_command(pid)) and _command(pid)[0] == sys.executable:
                return pid
        raise AssertionError("the group's process is not there")

    # -- what it said ----------------------------------------------------------------------------
    def events(self, *names: str) -> list[dict[str, Any]]:
        path = self.folder / "group.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        events = [json.loads(line) for line in lines]
        return [event for event in events if not names or event["event"] in names]

    def last_line(self) -> dict[str, Any]:
        last: dict[str, Any] = json.loads(self.output.splitlines()[-1])
        return last

    def reports(self, rank: int) -> list[dict[str, Any]]:
        path = self.folder / f"rank-{rank}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def log(self, rank: int) -> str:
        return (self.folder / f"rank-{rank}.log").read_text()

    def until(self, happened: Callable[[], Any], what: str, timeout_s: float = 30.0) -> Any:
        """Wait for something; its value."""
        deadline = time.monotonic() + timeout_s
        while not (value := happened()):
            if time.monotonic() > deadline:
                raise AssertionError(f"{what} did not happen: {self.events()}")
            time.sleep(0.05)
        return value

    def until_event(self, name: str, timeout_s: float = 30.0, **facts: Any) -> dict[str, Any]:
        def found() -> dict[str, Any] | None:
            events = self.events(name)
            return next((event for event in events if all(event.get(k) == v for k, v in facts.items())), None)

        event: dict[str, Any] = self.until(found, f"{name} {facts}", timeout_s)
        return event

    def until_joined(self) -> None:
        count = sum(host["ranks"] for host in self.spec["hosts"])
        self.until(lambda: all(len(self.reports(rank)) > 1 for rank in range(count)), "joining")

    # -- what is there ---------------------------------------------------------------------------
    def rank_pid(self, rank: int) -> int:
        """A rank's process, by this machine's numbers."""
        first = 0
        for host in self.spec["hosts"]:
            if rank < first + host["ranks"]:
                root = self.run_folders[host["name"]] / "ranks" / str(self.generation)
                record = json.loads((root / "node" / "ranks" / f"rank-{rank}.pid.json").read_text())
                pid: int = record["pid"]
                if self.rig is None:
                    return pid
                outer = self.rig[host["name"]].outer_pid(pid)
                assert outer is not None
                return outer
            first += host["ranks"]
        raise AssertionError(f"no rank {rank}")

    def processes(self) -> list[int]:
        """Living processes of the launch on all its hosts."""
        if self.rig is None:
            mine = str(self.run_folders["here"])
            listed = psutil.process_iter()
            return [p.pid for p in listed if p.pid != os.getpid() and any(mine in word for word in _command(p.pid))]
        found = [pid for host in self.rig.hosts if host.up for pid in host.pids()]
        return [pid for pid in found if "sshd" not in " ".join(_command(pid)[:1])]

    def temporary_files(self) -> list[Path]:
        """What lies in the temporary folders of a rig's hosts that are up, and of the launch itself."""
        up = [name for name in self.run_folders if self.rig is None or self.rig[name].up]
        roots = [self.run_folders[name] / "ranks" / str(self.generation) / "tmp" for name in up]
        of_hosts = [path for name in up for path in self.rig[name].temporary_files()] if self.rig else []
        return [root for root in roots if root.exists()] + of_hosts

    def assert_nothing_left(self, timeout_s: float = 5.0) -> None:
        self.until(lambda: not self.processes(), "the end of all processes", timeout_s)
        assert self.temporary_files() == []


def _command(pid: int) -> list[str]:
    try:
        return psutil.Process(pid).cmdline()
    except psutil.NoSuchProcess:
        return []
