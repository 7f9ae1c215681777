"""The verb `probe`: what a machine says about itself, raw, in one round trip.

Nothing is interpreted here: the control side has the readers. A tool that is missing or hangs is recorded
as that; it is never an error of the probe.

    probe [--fast] [--workdir DIR] [--python PATH] [--timeout-s N]
    probe --reach HOST:PORT,... [--detached]
    probe --echo-serve [--bind ADDRESS]          probe --echo-to HOST:PORT --token TOKEN
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import machine, reach
from .tools import run_tool, run_tools

VERSION = 1
TIMEOUT_S = 2.5
FAST_TIMEOUT_S = 1.0

NVIDIA_QUERY = (
    "index,uuid,name,memory.total,memory.used,utilization.gpu,temperature.gpu,power.draw,power.limit,"
    "driver_version,mig.mode.current"
)

TOOLS: dict[str, dict[str, tuple[str, ...]]] = {
    "Darwin": {
        "sw_vers": ("sw_vers",),
        "sysctl": (
            "sysctl",
            "hw.memsize",
            "kern.boottime",
            "iogpu.wired_limit_mb",
            "machdep.cpu.brand_string",
            "hw.model",
            "hw.ncpu",
            "kern.osversion",
        ),
        "pmset": ("pmset", "-g"),
        "pmset_batt": ("pmset", "-g", "batt"),
        "hardware": ("system_profiler", "SPHardwareDataType", "-json"),
        "thunderbolt": ("system_profiler", "SPThunderboltDataType", "-json"),
        "hardware_ports": ("networksetup", "-listallhardwareports"),
        "ifconfig": ("ifconfig", "-a"),
        "netstat": ("netstat", "-rn", "-f", "inet"),
        "rdma_ctl": ("rdma_ctl", "status"),
        "ibv_devices": ("ibv_devices",),
        "ibv_devinfo": ("ibv_devinfo",),
        "firewall": ("/usr/libexec/ApplicationFirewall/socketfilterfw", "--getglobalstate"),
        "firewall_block": ("/usr/libexec/ApplicationFirewall/socketfilterfw", "--getblockall"),
        "update": (
            "defaults",
            "read",
            "/Library/Preferences/com.apple.SoftwareUpdate",
            "AutomaticallyInstallMacOSUpdates",
        ),
        "filevault": ("fdesetup", "status"),
        "launchctl_fast_synch": ("launchctl", "getenv", "MLX_METAL_FAST_SYNCH"),
    },
    "Linux": {
        "ip_addr": ("ip", "-json", "-details", "addr"),
        "ip_route": ("ip", "-json", "route"),
        "ibv_devices": ("ibv_devices",),
        "ibv_devinfo": ("ibv_devinfo",),
        "nvidia_smi": ("nvidia-smi", "--query-gpu=" + NVIDIA_QUERY, "--format=csv,noheader,nounits"),
        "nvidia_p2p": ("nvidia-smi", "topo", "-p2p", "r"),
        "nvidia_processes": (
            "nvidia-smi",
            "--query-compute-apps=pid,process_name,used_memory",
            "--format=csv,noheader,nounits",
        ),
        "kernel_log": ("journalctl", "--dmesg", "--no-pager", "--output=short-iso", "--grep=Xid"),
        "dmesg": ("dmesg", "--level", "err,warn"),
        "linger": ("loginctl", "show-user", "--property=Linger"),
        "user_manager": ("systemctl", "--user", "is-system-running"),
        "timedatectl": ("timedatectl", "show"),
        "sleep_target": ("systemctl", "is-enabled", "sleep.target"),
        "logind": ("systemd-analyze", "cat-config", "systemd/logind.conf"),
    },
}
"""Which tools are asked, by the system that `uname -s` names. Their answers have these names, too."""

FAST_TOOLS: dict[str, dict[str, tuple[str, ...]]] = {
    "Darwin": {
        "vm_stat": ("vm_stat",),
        "pmset_therm": ("pmset", "-g", "therm"),
        "top": ("top", "-l", "2", "-n", "0", "-s", "0"),
    },
    "Linux": {"nvidia_smi": TOOLS["Linux"]["nvidia_smi"]},
}
"""What changes from second to second."""


def probe(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything raw. `started_at` and `at` are this machine's clock when it began and when it was done."""
    started = time.time()
    uname = run_tool(("uname", "-srm"), FAST_TIMEOUT_S)
    system = str(uname.get("out", "")).split(" ", 1)[0].strip()
    cpu_before, cpu_before_at = machine.cpu_times(), time.monotonic()
    tools = dict(FAST_TOOLS.get(system, {}))
    if not arguments.fast:
        tools.update(TOOLS.get(system, {}))
    timeout_s = arguments.timeout_s or (FAST_TIMEOUT_S if arguments.fast else TIMEOUT_S)
    answer: dict[str, Any] = {"version": VERSION, "started_at": started, "fast": bool(arguments.fast)}
    pending = machine.Pending(timeout_s)
    if not arguments.fast:
        pending.start("packages", lambda: machine.packages(arguments.python, arguments.workdir, timeout_s))
        pending.start("own_name", machine.own_name)
        pending.start("shell_noise", lambda: machine.shell_noise(timeout_s))
    answer["tools"] = {"uname": uname, **run_tools(tools, timeout_s)}
    answer.update(machine.changing(arguments.workdir))
    if not arguments.fast:
        answer.update(machine.lasting(system, arguments.workdir))
    answer.update(pending.results())
    # A load needs two readings some time apart; the tools have usually taken longer than that.
    time.sleep(max(0.0, 0.1 - (time.monotonic() - cpu_before_at)))
    answer["cpu"] = {"before": cpu_before, "after": machine.cpu_times()}
    answer["at"] = time.time()
    return answer


def options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="probe", description="raw facts of this machine, as one line of JSON")
    parser.add_argument("--fast", action="store_true", help="only what changes from second to second")
    parser.add_argument("--workdir", default="~/.jupiter", help="where Jupiter keeps its files here")
    parser.add_argument("--python", default="", help="interpreter whose packages are listed")
    parser.add_argument("--timeout-s", type=float, default=0.0, help="time for each tool")
    parser.add_argument("--reach", default="", help="HOST:PORT,...: time to connect to each")
    parser.add_argument("--detached", action="store_true", help="connect from a process that no session owns")
    parser.add_argument("--echo-serve", action="store_true", help="take what --echo-to sends, once")
    parser.add_argument("--bind", default="", help="address of --echo-serve")
    parser.add_argument("--echo-to", default="", help="HOST:PORT of an --echo-serve")
    parser.add_argument("--token", default="")
    parser.add_argument("--echo-bytes", type=int, default=reach.ECHO_LIMIT_BYTES, help="at most so many each way")
    return parser.parse_args(list(argv))


def main(argv: list[str]) -> int:
    """One line of JSON for one call of the verb (--echo-serve: two)."""
    arguments = options(argv)
    arguments.workdir = str(Path(arguments.workdir).expanduser())
    targets = [target for target in arguments.reach.split(",") if target]
    if targets:
        answer = reach.reach_detached(targets) if arguments.detached else reach.reach(targets)
    elif arguments.echo_serve:
        answer = reach.echo_serve(arguments.bind, sys.stdout, arguments.echo_bytes)
    elif arguments.echo_to:
        answer = reach.echo_to(arguments.echo_to, arguments.token, arguments.echo_bytes)
    else:
        answer = probe(arguments)
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
    return 0
