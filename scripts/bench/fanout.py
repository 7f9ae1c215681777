"""One probe-like command on 64 machines at once: Jupiter's connections, clush and parallel-ssh, same run.

    .venv/bin/python scripts/bench/fanout.py [--machines 64] [--rounds 5] [--pssh-python /path/to/python]

The machines are asyncssh servers in one process of their own; each answers with 8 KiB of JSON. Contestants take
turns (ours, theirs, ours, ...); printed are medians and the median of the ratios, pair by pair. `cold` is a whole
program: start, connect, run, end. `first` is connecting and running in a program that runs already, as a console
does, `warm` one more round over connections that stand (clush has neither). Memory is
the highest proportional set size of the program and its children, sampled in a round of its own. clush comes with
Debian's clustershell; parallel-ssh is taken from the Python named by --pssh-python and left out without one. It
checks no host keys; Jupiter and clush (through ssh) do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import asyncssh
import psutil

from jupiter_engine.remote.host_keys import KnownHosts
from jupiter_engine.remote.ssh import connect
from jupiter_engine.settings.cluster import ConnectionSettings, NodeSpec

ANSWER = json.dumps({"probe": ["x" * 60] * 128}).encode()
COMMAND = ("jupiter-probe", "--all")
PSSH = """
import json, sys, time
from pssh.clients import ParallelSSHClient
from pssh.config import HostConfig
spec = json.load(open(sys.argv[1]))
hosts = ["127.0.0.1"] * len(spec["ports"])
config = [HostConfig(port=port, user="bench", private_key=spec["identity"]) for port in spec["ports"]]
client = ParallelSSHClient(hosts, host_config=config, pool_size=len(hosts), allow_agent=False, num_retries=1)
times = []
for _ in range(2):
    began = time.perf_counter()
    output = client.run_command(spec["command"])
    client.join(output)
    size = sum(len(line) for host in output for line in host.stdout)
    assert size == spec["bytes"] * len(hosts), size
    times.append(time.perf_counter() - began)
print(json.dumps(times))
"""


# -- the machines --------------------------------------------------------------------------------------
async def serve(folder: Path, count: int) -> None:
    """Listen on `count` ports, say which, and answer until standard input ends."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    identity = folder / "id"
    key.write_private_key(identity)
    identity.chmod(0o600)
    key.write_public_key(folder / "id.pub")
    host_keys = [asyncssh.generate_private_key("ssh-ed25519") for _ in range(count)]

    async def answer(process: asyncssh.SSHServerProcess[bytes]) -> None:
        line = process.command or ""
        if line.startswith("exec /bin/sh -c"):
            # What Jupiter's frame prints on a real machine; see remote/quoting.py.
            mark = next(word for word in line.split() if word.startswith("jupiter-begin-"))
            process.stdout.write(f"{mark} 4000001\n".encode())
            process.stderr.write(f"{mark} 4000001\n".encode())
        process.stdout.write(ANSWER)
        process.exit(0)

    ports = []
    for host_key in host_keys:
        server = await asyncssh.listen(
            "127.0.0.1",
            0,
            server_host_keys=[host_key],
            authorized_client_keys=str(folder / "id.pub"),
            process_factory=answer,
            encoding=None,
            backlog=count,
        )
        ports.append(server.get_port())
    known = [
        f"[127.0.0.1]:{port} {' '.join(key.export_public_key('openssh').decode().split()[:2])}"
        for port, key in zip(ports, host_keys, strict=True)
    ]
    (folder / "known_hosts").write_text("\n".join(known) + "\n")
    blocks = [f"Host m{i:03d}\n  Port {port}\n" for i, port in enumerate(ports)]
    every = f"Host m*\n  HostName 127.0.0.1\n  User bench\n  IdentityFile {identity}\n  IdentitiesOnly yes\n"
    every += f"  UserKnownHostsFile {folder / 'known_hosts'}\n  BatchMode yes\n"
    (folder / "config").write_text("".join(blocks) + every)
    spec = {"ports": ports, "identity": str(identity), "command": " ".join(COMMAND), "bytes": len(ANSWER)}
    (folder / "spec.json").write_text(json.dumps(spec))
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.read)


# -- the contestants -----------------------------------------------------------------------------------
async def call_all(folder: Path) -> list[float]:
    """Ours: seconds of the first round, calling included, and of a second one."""
    ports = json.loads((folder / "spec.json").read_text())["ports"]
    settings = ConnectionSettings(connect_timeout_s=60)
    known = KnownHosts(folder / "known_hosts", user=(), system=())
    nodes = [NodeSpec(name=f"m{i:03d}", host=f"m{i:03d}") for i in range(len(ports))]
    began = time.perf_counter()
    connections = await asyncio.gather(
        *(connect(node, settings, known_hosts=known, ssh_config=folder / "config") for node in nodes)
    )
    times = []
    for _ in range(2):
        done = await asyncio.gather(*(connection.run(COMMAND) for connection in connections))
        assert all(one.stdout == ANSWER for one in done)
        times.append(time.perf_counter() - began)
        began = time.perf_counter()
    await asyncio.gather(*(connection.close() for connection in connections))
    return times


def measured(argv: list[str], check: Callable[[str], None]) -> dict[str, float]:
    """Wall and processor seconds of a program with its children, and what it says about itself."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    done = subprocess.run(argv, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    wall_s = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    check(done.stdout)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = {"cold": wall_s, "cpu": cpu_s}
    last = done.stdout.strip().splitlines()[-1]
    if last.startswith("["):
        found["first"], found["warm"] = json.loads(last)
    return found


def memory_bytes(argv: list[str]) -> float:
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    highest = 0
    stop = threading.Event()

    def sample() -> None:
        nonlocal highest
        while not stop.is_set():
            total = 0
            try:
                root = psutil.Process(process.pid)
                for one in (root, *root.children(recursive=True)):
                    try:
                        total += one.memory_full_info().pss
                    except psutil.Error:
                        continue
            except psutil.Error:
                pass
            highest = max(highest, total)
            time.sleep(0.05)

    sampler = threading.Thread(target=sample)
    sampler.start()
    process.wait()
    stop.set()
    sampler.join()
    return float(highest)


def contestants(folder: Path, machines: int, pssh_python: str | None) -> dict[str, list[str]]:
    names = f"m[000-{machines - 1:03d}]"
    found = {"jupiter": [sys.executable, __file__, "--call", str(folder)]}
    if shutil.which("clush"):
        options = f"-F {folder / 'config'}"
        found["clush"] = ["clush", "-f", str(machines), "-q", "-o", options, "-w", names, " ".join(COMMAND)]
    if pssh_python is not None:
        (folder / "pssh_round.py").write_text(PSSH)
        found["parallel-ssh"] = [pssh_python, str(folder / "pssh_round.py"), str(folder / "spec.json")]
    return found


def checker(name: str, machines: int) -> Callable[[str], None]:
    def check(text: str) -> None:
        if name == "clush":
            assert text.count('"probe"') == machines, f"clush got {text.count('probe')} answers"

    return check


def compare(folder: Path, options: argparse.Namespace) -> None:
    programs = contestants(folder, options.machines, options.pssh_python)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    for name, argv in programs.items():
        measured(argv, checker(name, options.machines))
    for _ in range(options.rounds):
        for name, argv in programs.items():
            results[name].append(measured(argv, checker(name, options.machines)))
    memory = {name: memory_bytes(argv) for name, argv in programs.items()}
    print(
        f"{options.machines} machines, {options.rounds} rounds, {os.cpu_count()} cores, asyncssh {asyncssh.__version__}"
    )
    for name in programs:
        parts = []
        for what, unit in (("cold", "wall"), ("cpu", "processor"), ("first", "wall"), ("warm", "wall")):
            mine = [row[what] for row in results[name] if what in row]
            if mine:
                text = f"{what} {statistics.median(mine):6.2f} s {unit}"
                ours = [row[what] for row in results["jupiter"]]
                if name != "jupiter":
                    ratio = statistics.median(theirs / our for our, theirs in zip(ours, mine, strict=True))
                    text += f" ({ratio:.2f} x ours)"
                parts.append(text)
        text = f"memory {memory[name] / 2**20:6.1f} MiB"
        if name != "jupiter":
            text += f" ({memory[name] / memory['jupiter']:.2f} x ours)"
        print(f"{name:<13}" + "   ".join([*parts, text]))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--machines", type=int, default=64)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--pssh-python", help="a Python that has parallel-ssh")
    options.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--call", type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.serve is not None:
        asyncio.run(serve(chosen.serve, chosen.machines))
    elif chosen.call is not None:
        print(json.dumps(asyncio.run(call_all(chosen.call))))
    else:
        with tempfile.TemporaryDirectory() as name:
            argv = [sys.executable, __file__, "--serve", name, "--machines", str(chosen.machines)]
            with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as machines:
                assert machines.stdout is not None
                assert machines.stdin is not None
                machines.stdout.readline()
                try:
                    compare(Path(name), chosen)
                finally:
                    machines.stdin.close()


if __name__ == "__main__":
    main()
