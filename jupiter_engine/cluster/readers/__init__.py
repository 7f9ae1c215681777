"""Readers: the text that a system's own tool printed, into typed records.

Every reader is a pure function of what one tool printed. What it does not know it leaves out; what it needs and
does not find raises `ToolOutput`, which names the tool. The text comes from machines that are not trusted:
sizes are bounded, strings that reach people are plain, and no input raises anything else.

`TOOLS` says how each answer is got; its keys are the keys of `NodeTools.raw` and `NodeFacts.raw`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

MAC_TOOLS: Final[Mapping[str, tuple[str, ...]]] = {
    "thunderbolt": ("system_profiler", "SPThunderboltDataType", "-json"),
    "hardware": ("system_profiler", "SPHardwareDataType", "-json"),
    "hardware_ports": ("networksetup", "-listallhardwareports"),
    "ifconfig": ("ifconfig", "-a"),
    "netstat": ("netstat", "-rn", "-f", "inet"),
    "ibv_devices": ("ibv_devices",),
    "ibv_devinfo": ("ibv_devinfo",),
    "rdma_ctl": ("rdma_ctl", "status"),
    "pmset": ("pmset", "-g"),
    "pmset_batt": ("pmset", "-g", "batt"),
    "pmset_therm": ("pmset", "-g", "therm"),
    "sw_vers": ("sw_vers",),
    "sysctl": ("sysctl", "hw.memsize", "kern.boottime", "iogpu.wired_limit_mb", "machdep.cpu.brand_string"),
    "vm_stat": ("vm_stat",),
    "firewall": ("/usr/libexec/ApplicationFirewall/socketfilterfw", "--getglobalstate"),
}
"""macOS, by key: the command line whose standard output the reader takes. None of them needs sudo."""

LINUX_TOOLS: Final[Mapping[str, tuple[str, ...]]] = {
    "ip_addr": ("ip", "-json", "-details", "addr"),
    "ip_route": ("ip", "-json", "route"),
    "linger": ("loginctl", "show-user", "--property=Linger"),
    "timedatectl": ("timedatectl", "show"),
}
"""Linux, by key. `net_speeds` (lines `NAME VALUE` from /sys/class/net/NAME/speed), `meminfo`, `cpuinfo`,
`loadavg`, `proc_stat` and `uptime` (files of /proc) are read as files and have no command line here."""

NVIDIA_TOOLS: Final[Mapping[str, tuple[str, ...]]] = {
    "nvidia_smi": (
        "nvidia-smi",
        "--query-gpu=index,uuid,name,memory.total,memory.used,utilization.gpu,temperature.gpu,power.draw,"
        "power.limit,driver_version,mig.mode.current",
        "--format=csv,noheader,nounits",
    ),
    "nvidia_p2p": ("nvidia-smi", "topo", "-p2p", "r"),
    "kernel_log": ("journalctl", "--dmesg", "--no-pager", "--output=short-iso", "--grep=Xid"),
}
"""Machines with an NVIDIA card, by key."""
