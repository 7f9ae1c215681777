"""Starting and keeping a ring of MLX ranks: Jupiter's two launchers against stock mlx.launch, on the same hosts.

    .venv/bin/python scripts/bench/launch.py [--hosts 2] [--rounds 3] [--seconds 10] [--here]

As root on Linux the hosts are namespaces with their own network, processes and sshd (tests/rig.py), one rank on each;
otherwise all ranks run on this machine. Launchers take turns (stock, ours, ours, stock, ...), and ratios are medians
of the rounds, so that a machine whose speed drifts favours none.

start        from the start of the launcher's process to the end of rank 0's first all_sum
launcher CPU of all processes on all hosts that are no ranks (ssh and sshd included), per 10 s of training
latency      median of 200 sums of one number
steps        a small matrix product and a sum of 1 MiB
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from jupiter_engine.cluster.runner_file import RunnerFile  # noqa: E402 - found only with the line above
from tests.rig import Rig, why_no_rig  # noqa: E402

RANK = Path(__file__).with_name("launch_rank.py")
LAUNCHERS = ("stock mlx.launch", "Jupiter mlx.launch", "Jupiter direct")
MEASURES = ("start s", "launcher CPU s/10 s", "latency ms", "steps/s")


class Field:
    """Where launches happen: the hosts, and a folder on each."""

    def __init__(self, rig: Rig | None, hosts: int, folder: Path, seconds: float) -> None:
        self.rig, self.count, self.seconds = rig, hosts, seconds
        self.folders = [host.disk / "run" for host in rig.hosts] if rig else [folder / "run"]
        self.generation = 0
        for run_folder in self.folders:
            run_folder.mkdir(parents=True)
            (run_folder / "spec.json").write_text("{}")
            (run_folder / "runner.pyz").write_bytes(RunnerFile.packed().data)
        self._before = self._pids()

    def start(self, argv: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
        words = ["env", *(f"{name}={value}" for name, value in environment.items()), *argv]
        if self.rig is not None:
            return self.rig.hosts[0].start(*words)
        pipe = subprocess.PIPE
        return subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, start_new_session=True)

    def addresses(self) -> list[str]:
        return [host.address for host in self.rig.hosts] if self.rig else ["127.0.0.1"]

    def _pids(self) -> set[int]:
        if self.rig is not None:
            return {pid for host in self.rig.hosts for pid in host.pids()}
        return set(psutil.pids())

    def launcher_processes(self, started: int, rank_pids: set[int]) -> list[psutil.Process]:
        """All that was not there before and is no rank; on one machine only what the launcher started or is ours."""
        new = self._pids() - self._before - rank_pids
        fresh = [process for process in psutil.process_iter() if process.pid in new]
        if self.rig is not None:
            return fresh
        root = psutil.Process(started)
        family = {process.pid for process in (root, *root.children(recursive=True))}
        here = str(self.folders[0])
        return [process for process in fresh if process.pid in family or any(here in w for w in command(process))]

    def ranks(self) -> set[int]:
        """The ranks' processes, by this machine's numbers."""
        found = set()
        for rank in range(self.count):
            folder = self.folders[rank if self.rig else 0]
            pid = json.loads((folder / f"pid-{self.generation}-{rank}.json").read_text())["pid"]
            outer = self.rig.hosts[rank].outer_pid(pid) if self.rig else pid
            assert outer is not None
            found.add(outer)
        return found

    def result(self) -> dict[str, float]:
        path = self.folders[0] / f"result-{self.generation}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return {key: value for line in lines for key, value in json.loads(line).items()}


def stock(field: Field) -> tuple[list[str], dict[str, str]]:
    """mlx.launch as its users call it, with an ssh that reads the rig's configuration."""
    leader = field.folders[0]
    names = ["127.0.0.1", *(host.name for host in field.rig.hosts[1:])] if field.rig else ["127.0.0.1"] * field.count
    addresses = field.addresses() * (1 if field.rig else field.count)
    hosts = [{"ssh": name, "ips": [address]} for name, address in zip(names, addresses, strict=True)]
    hostfile = leader / f"hosts-{field.generation}.json"
    hostfile.write_text(json.dumps({"backend": "ring", "hosts": hosts}))
    shim = leader / "shim"
    shim.mkdir(exist_ok=True)
    config = f"-F {field.rig.ssh_config}" if field.rig else ""
    (shim / "ssh").write_text(f'#!/bin/sh\nexec /usr/bin/ssh {config} "$@"\n')
    (shim / "ssh").chmod(0o755)
    port = str(21000 + field.generation * 20)
    script = str(Path(sys.executable).with_name("mlx.launch"))
    # Every host has its run folder at another place: one shell line finds it.
    find = " ".join(f'"{folder}"' for folder in field.folders)
    line = f'for d in {find}; do [ -d "$d" ] && cd "$d"; done; exec {sys.executable} {RANK} "$PWD" "$@"'
    program = ["/bin/sh", "-c", line, "rank", str(field.generation), str(field.seconds)]
    argv = [sys.executable, script, "--hostfile", str(hostfile), "--starting-port", port, "--env", "OMP_NUM_THREADS=1"]
    return [*argv, "--", *program], {"PATH": f"{shim}:{os.environ['PATH']}"}


def ours(field: Field, launcher: str) -> tuple[list[str], dict[str, str]]:
    """The node runner's `group`."""
    leader = field.folders[0] / "ranks" / str(field.generation)
    leader.mkdir(parents=True)
    names = [host.name for host in field.rig.hosts] if field.rig else ["here"]
    hosts = [
        {
            "name": name,
            "ssh": name if index else "",
            "ranks": 1 if field.rig else field.count,
            "runner": [sys.executable, str(folder / "runner.pyz")],
            "python": sys.executable,
            "run_folder": str(folder),
            "addresses": [address],
        }
        for index, (name, folder, address) in enumerate(zip(names, field.folders, field.addresses(), strict=True))
    ]
    spec: dict[str, Any] = {
        "version": 1,
        "run": "bench",
        "generation": field.generation,
        "twin": "mlx",
        "launcher": launcher,
        "backend": "ring",
        "folder": str(leader),
        "program": [str(RANK), "{run_folder}", "{generation}", str(field.seconds)],
        "env": {"OMP_NUM_THREADS": "1"},
        "ssh_config": str(field.rig.ssh_config) if field.rig else "",
        "init_deadline_s": 60,
        "grace_s": 5,
        "lease_s": 60,
        "hosts": hosts,
    }
    path = leader / "group-spec.json"
    path.write_text(json.dumps(spec))
    return [sys.executable, str(field.folders[0] / "runner.pyz"), "group", str(path)], {}


def measure(field: Field, launcher: str) -> dict[str, float]:
    """One launch from beginning to end."""
    field.generation += 1
    argv, environment = stock(field) if launcher == LAUNCHERS[0] else ours(field, launcher.split()[1])
    began = time.time()
    process = field.start(argv, environment)
    try:
        while "window_begins_at" not in field.result():
            if process.poll() is not None or time.time() - began > 120:
                raise SystemExit(f"{launcher} did not start its ranks")
            time.sleep(0.1)
        family = field.launcher_processes(process.pid, field.ranks())
        first, first_at = cpu_seconds(family), time.monotonic()
        time.sleep(max(1.0, field.seconds - 1.5))
        spent_s, took_s = cpu_seconds(family) - first, time.monotonic() - first_at
        process.communicate(timeout=60)
    finally:
        if process.poll() is None and field.rig is None:
            # On a rig everything ends with its hosts.
            os.killpg(process.pid, signal.SIGTERM)
    result = field.result()
    values = (
        result["first_sum_at"] - began,
        spent_s / took_s * 10,
        result["latency_ms"],
        result["steps_per_s"],
    )
    return dict(zip(MEASURES, values, strict=True))


def command(process: psutil.Process) -> list[str]:
    """Its command line; empty for one that has just ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """User and system time so far, of those that still live and their ended children."""
    total = 0.0
    for process in processes:
        try:
            total += sum(process.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2, help="hosts of one rank each; without a rig: ranks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="how long the ranks train")
    parser.add_argument("--here", action="store_true", help="all ranks on this machine, even where a rig is possible")
    args = parser.parse_args()
    with ExitStack() as stack:
        reason = "--here" if args.here else why_no_rig()
        rig = stack.enter_context(Rig(args.hosts)) if reason is None else None
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        field = Field(rig, args.hosts, folder, args.seconds)
        where = f"{args.hosts} hosts of one rank, each a namespace with its own sshd" if rig else "this machine alone"
        print(f"{where}{f' ({reason})' if reason else ''}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        found: dict[str, list[dict[str, float]]] = {launcher: [] for launcher in LAUNCHERS}
        for turn in range(args.rounds):
            for launcher in LAUNCHERS if turn % 2 == 0 else reversed(LAUNCHERS):
                found[launcher].append(measure(field, launcher))
    report(found)


def report(found: dict[str, list[dict[str, float]]]) -> None:
    """Medians, and how each launcher compares with stock in the same round."""
    print(
        f"{'median of ' + str(len(found[LAUNCHERS[0]])) + ' rounds':24}" + "".join(f"{name:>24}" for name in MEASURES)
    )
    for launcher, rows in found.items():
        cells = []
        for name in MEASURES:
            ratios = [row[name] / base[name] for row, base in zip(rows, found[LAUNCHERS[0]], strict=True) if base[name]]
            ratio = f"(x{statistics.median(ratios):.2f})" if ratios else ""
            cells.append(f"{statistics.median(row[name] for row in rows):.2f} {ratio:>9}")
        print(f"{launcher:24}" + "".join(f"{cell:>24}" for cell in cells))


if __name__ == "__main__":
    main()
