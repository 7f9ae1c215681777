"""What Python can read about a machine by itself: no tool is started here but `ps` and the environment's Python."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import platform
import pwd
import re
import shutil
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .tools import run_tool

PACKAGES = (
    "jupiter",
    "mlx",
    "mlx-lm",
    "torch",
    "numpy",
    "safetensors",
    "transformers",
    "tokenizers",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)

ENVIRONMENT_NAMES = (
    "MLX_METAL_FAST_SYNCH",
    "NCCL_P2P_DISABLE",
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
    "CUDA_VISIBLE_DEVICES",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
)
"""Variables that change how ranks behave. Values of no others leave the machine."""

_PACKAGES_CODE = """
import importlib.metadata as m, importlib.util as u, json, platform, re, pathlib
found = {}
for name in %r:
    try: found[name] = m.version(name)
    except m.PackageNotFoundError: pass
cuda = ""
spec = u.find_spec("torch")
if spec is not None and spec.origin:
    text = pathlib.Path(spec.origin).with_name("version.py")
    hit = re.search(r"^cuda[^=]*= *'([^']+)'", text.read_text(), re.M) if text.exists() else None
    cuda = hit.group(1) if hit else ""
print(json.dumps({"python": platform.python_version(), "machine": platform.machine(), "packages": found, "cuda": cuda}))
"""

_OURS = re.compile(r"jupiter_engine\.worker|/node/[0-9a-f]{8,64}\.pyz")
COMMAND_LIMIT = 400
REPORTS = Path("/Library/Logs/DiagnosticReports")
REPORT_PATTERNS = ("*.panic", "JetsamEvent-*.ips", "Retired/*.panic")


class Pending:
    """Questions answered in threads meanwhile; one that takes too long is left out."""

    def __init__(self, timeout_s: float) -> None:
        self._deadline = time.monotonic() + timeout_s
        self._answers: dict[str, Any] = {}
        self._threads: list[tuple[str, threading.Thread]] = []

    def start(self, name: str, question: Callable[[], Any]) -> None:
        def work() -> None:
            try:
                self._answers[name] = question()
            except (OSError, ValueError, KeyError) as error:
                self._answers[name] = {"error": f"{type(error).__name__}: {error}"}

        thread = threading.Thread(target=work, daemon=True)
        self._threads.append((name, thread))
        thread.start()

    def results(self) -> dict[str, Any]:
        for _, thread in self._threads:
            thread.join(max(0.0, self._deadline - time.monotonic()))
        return {name: self._answers.get(name, {"error": "took too long"}) for name, _ in self._threads}


def text_of(path: str | Path, limit_bytes: int = 65536) -> str:
    """Content of a file, empty where there is none or it may not be read."""
    try:
        with Path(path).open("rb") as file:
            return file.read(limit_bytes).decode("utf-8", "replace")
    except OSError:
        return ""


def cpu_times() -> dict[str, float] | None:
    """Ticks since boot of all cores together: busy and total; None where there is no /proc."""
    for line in text_of("/proc/stat", 4096).splitlines():
        if line.startswith("cpu "):
            ticks = [float(tick) for tick in line.split()[1:9]]
            total = sum(ticks)
            return {"busy": total - ticks[3] - ticks[4], "total": total}
    return None


def changing(workdir: str) -> dict[str, Any]:
    """What may differ from second to second."""
    answer: dict[str, Any] = {"load": list(os.getloadavg()), "disk": disk(workdir), "boot_id": boot_id()}
    meminfo = text_of("/proc/meminfo")
    if meminfo:
        answer["meminfo"] = {
            name: int(value) * 1024
            for name, value in re.findall(r"^(MemTotal|MemAvailable|SwapTotal|SwapFree):\s+(\d+) kB", meminfo, re.M)
        }
    answer["power_supply"] = power_supplies()
    answer["throttled"] = throttle_counts()
    return answer


def lasting(system: str, workdir: str) -> dict[str, Any]:
    """What stays while the machine is up, or nearly."""
    shell = ""
    with contextlib.suppress(KeyError):
        shell = pwd.getpwuid(os.getuid()).pw_shell
    processes, resident_bytes = own_processes(system)
    return {
        "user": getpass.getuser(),
        "home": str(Path.home()),
        "shell": shell,
        "path": os.environ.get("PATH", ""),
        "environment": {name: os.environ[name] for name in ENVIRONMENT_NAMES if name in os.environ},
        "node_python": {"version": platform.python_version(), "executable": sys.executable},
        "cores": os.cpu_count(),
        "cpuinfo": processor(),
        "uptime_s": uptime_s(),
        "interfaces": linux_interfaces(),
        "ephemeral_ports": text_of("/proc/sys/net/ipv4/ip_local_port_range").split(),
        "processes": processes,
        "resident_bytes": resident_bytes,
        "crash_reports": crash_reports(),
        "linger_file": Path("/var/lib/systemd/linger", getpass.getuser()).exists(),
        "systemd": Path("/run/systemd/system").is_dir(),
        "ufw_enabled": "ENABLED=yes" in text_of("/etc/ufw/ufw.conf"),
        "dmi": text_of("/sys/class/dmi/id/product_name", 200).strip(),
        "nvidia_version": text_of("/proc/driver/nvidia/version", 2000),
        "environments": ready_environments(workdir),
    }


def disk(workdir: str) -> dict[str, Any]:
    """Room where `workdir` is or will be: the nearest folder above it that exists is asked."""
    folder = Path(workdir).absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    return {"free_bytes": usage.free, "total_bytes": usage.total, "writable": os.access(folder, os.W_OK)}


def boot_id() -> str:
    """Linux's boot id; empty elsewhere (a Mac's boot time is in the answer of `sysctl`)."""
    return text_of("/proc/sys/kernel/random/boot_id", 100).strip()


def uptime_s() -> float | None:
    words = text_of("/proc/uptime", 100).split()
    return float(words[0]) if words else None


def processor() -> str:
    """The processor's name as /proc gives it."""
    hit = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", text_of("/proc/cpuinfo"), re.M)
    return hit.group(1).strip() if hit else ""


def power_supplies() -> list[dict[str, str]]:
    """Linux's power supplies: {"type": "Mains|Battery", "online": "0|1", "status": ...}."""
    found = []
    for folder in sorted(Path("/sys/class/power_supply").glob("*"))[:16]:
        facts = {name: text_of(folder / name, 100).strip() for name in ("type", "online", "status")}
        if facts["type"] in ("Mains", "Battery", "USB") and text_of(folder / "scope", 20).strip() != "Device":
            found.append(facts)
    return found


def throttle_counts() -> int | None:
    """How often Intel's cores have throttled since boot, summed; None where the kernel does not count."""
    paths = Path("/sys/devices/system/cpu").glob("cpu*/thermal_throttle/core_throttle_count")
    counts = [text_of(path, 30).strip() for path in paths]
    numbers = [int(count) for count in counts if count.isdigit()]
    return sum(numbers) if numbers else None


def linux_interfaces() -> list[dict[str, Any]]:
    """Interfaces as /sys shows them: what `ip` does not say (wireless, speed, real device or not)."""
    found = []
    for folder in sorted(Path("/sys/class/net").glob("*"))[:128]:
        speed = text_of(folder / "speed", 20).strip()
        driver = folder / "device" / "driver"
        found.append(
            {
                "name": folder.name,
                "state": text_of(folder / "operstate", 20).strip(),
                "speed_mbit": int(speed) if speed.isdigit() else None,
                "wireless": (folder / "wireless").is_dir(),
                "bridge": (folder / "bridge").is_dir(),
                "device": (folder / "device").exists(),
                "driver": driver.resolve().name if driver.exists() else "",
            }
        )
    return found


def own_processes(system: str) -> tuple[list[dict[str, Any]], int | None]:
    """(Jupiter's processes here, this one left out; resident bytes of all processes together)."""
    if Path("/proc/self").is_dir():
        return _processes_of_proc(), None
    answer = run_tool(("ps", "-axo", "pid=,ppid=,stat=,rss=,command="), 2.0, limit_bytes=1 << 20)
    found, resident = [], 0
    for line in str(answer.get("out", "")).splitlines():
        words = line.split(None, 4)
        if len(words) < 5 or not (words[0].isdigit() and words[1].isdigit() and words[3].isdigit()):
            continue
        resident += int(words[3]) * 1024
        if _OURS.search(words[4]) and int(words[0]) != os.getpid():
            found.append(_process(int(words[0]), int(words[1]), words[2][:1], words[4]))
    return found, (resident if system == "Darwin" and resident else None)


def _processes_of_proc() -> list[dict[str, Any]]:
    found = []
    for folder in Path("/proc").iterdir():
        name = folder.name
        if not name.isdigit() or int(name) == os.getpid():
            continue
        command = text_of(folder / "cmdline", 4096).replace("\0", " ").strip()
        if not _OURS.search(command):
            continue
        fields = text_of(folder / "stat", 4096).rpartition(")")[2].split()
        if len(fields) > 1:
            found.append(_process(int(name), int(fields[1]), fields[0], command))
    return found


def _process(pid: int, parent: int, state: str, command: str) -> dict[str, Any]:
    return {"pid": pid, "parent": parent, "state": state, "command": command[:COMMAND_LIMIT]}


def crash_reports() -> list[dict[str, Any]]:
    """macOS' reports of kernel panics and of memory running out, newest first, at most 20."""
    found: list[dict[str, Any]] = []
    for pattern in REPORT_PATTERNS:
        for path in REPORTS.glob(pattern):
            with contextlib.suppress(OSError):
                found.append({"name": path.name[:200], "at": path.stat().st_mtime})
    return sorted(found, key=lambda report: -report["at"])[:20]


def own_name() -> dict[str, Any]:
    """What this machine's own name resolves to, here."""
    name = socket.gethostname()
    try:
        entries = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
        return {"hostname": name, "addresses": sorted({str(entry[4][0]) for entry in entries})}
    except (OSError, UnicodeError) as error:
        return {"hostname": name, "addresses": [], "error": str(error)}


def shell_noise(timeout_s: float) -> str:
    """What the login shell's start-up files print for a command that prints nothing, as sshd would start it."""
    try:
        shell = pwd.getpwuid(os.getuid()).pw_shell
    except KeyError:
        return ""
    # bash reads ~/.bashrc for a command of sshd only where it is the first shell.
    done = run_tool((shell, "-c", "exit 0"), timeout_s, 65536, env={"SHLVL": "0"})
    return (str(done.get("out", "")) + str(done.get("err", "")))[:2000]


def ready_environments(workdir: str) -> list[dict[str, Any]]:
    """Environments that Jupiter has built here and finished, newest first."""
    found: list[dict[str, Any]] = []
    for path in Path(workdir).glob("environments/*/ready.json"):
        with contextlib.suppress(OSError):
            found.append({"hash": path.parent.name, "ready_at": path.stat().st_mtime})
    return sorted(found, key=lambda environment: -environment["ready_at"])[:20]


def packages(python: str, workdir: str, timeout_s: float) -> dict[str, Any]:
    """Versions in the given interpreter; else in the newest environment here; else in this interpreter."""
    environment = ""
    if not python:
        ready = ready_environments(workdir)
        if ready:
            environment = str(ready[0]["hash"])
            python = str(Path(workdir, "environments", environment, "bin", "python"))
    python = str(Path(python).expanduser()) if python else sys.executable
    if not environment:
        hit = re.search(r"/environments/([^/]+)/bin/", python)
        environment = hit.group(1) if hit else ""
    answer: dict[str, Any] = {"interpreter": python, "environment": environment, "executable": _executable(python)}
    done = run_tool((python, "-I", "-c", _PACKAGES_CODE % (PACKAGES,)), timeout_s, 65536)
    if done.get("status") != 0:
        answer["error"] = (
            "took too long" if done.get("timed_out") else (str(done.get("err", "")).strip() or "not found")
        )
        return answer
    answer.update(json.loads(str(done["out"])))
    return answer


def _executable(path: str) -> bool:
    try:
        return stat.S_ISREG(Path(path).stat().st_mode) and os.access(path, os.X_OK)
    except OSError:
        return False
