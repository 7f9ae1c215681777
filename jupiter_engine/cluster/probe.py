"""Live facts of a node: from the raw answer of its probe to typed facts.

The answer comes from a machine that is not trusted: whatever it holds, the result is well-formed, bounded and fit for
a terminal, or a RemoteError says that this is no answer of a probe. Nothing is guessed: what could not be read is
None or empty. (Only the load of a processor whose times the system does not tell is the load average's share.)
"""

from __future__ import annotations

import platform
import re
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import msgspec
import psutil

from jupiter_engine.cluster.machine import NodeTools, read_machine
from jupiter_engine.cluster.readers import apple, nvidia
from jupiter_engine.cluster.readers.reading import ToolOutput, real, rows, short, table, whole
from jupiter_engine.errors import RemoteError
from jupiter_engine.protocol.fleet import Gpu, NodeFacts
from jupiter_engine.protocol.specs import Twin
from jupiter_engine.remote.port import Connection
from jupiter_engine.units import plain_text

PROBE_VERSION: Final = 1
TOOL_LIMIT: Final = 300_000
"""Characters kept of one tool's answer."""
PROBE_TIMEOUT_S: Final = 15.0
RTT_TRIES: Final = 3
_TOP_IDLE: Final = re.compile(r"CPU usage:.*?([0-9.]{1,8})% idle")
_NODE_KEYS: Final = (
    "user",
    "home",
    "shell",
    "path",
    "environment",
    "node_python",
    "uptime_s",
    "ephemeral_ports",
    "processes",
    "resident_bytes",
    "crash_reports",
    "linger_file",
    "systemd",
    "ufw_enabled",
    "environments",
    "packages",
    "own_name",
    "shell_noise",
    "power_supply",
    "disk",
    "throttled",
)
"""What the node's own Python read and single checks look at."""

T = TypeVar("T")


class Runner(Protocol):
    """The part of cluster.runner.NodeRunner that a probe needs."""

    async def verb(self, name: str, *arguments: str, stdin: bytes = b"", timeout_s: float = 30.0) -> dict[str, Any]: ...


class Ticks(msgspec.Struct, frozen=True, kw_only=True):
    """Processor time since boot, of all cores together."""

    busy: float
    total: float


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """A probe's answer with what this side saw of it."""

    answer: dict[str, Any]
    sent_at: float
    received_at: float
    """This machine's clock, seconds since the epoch."""


# -- asking --------------------------------------------------------------------------------------------
async def ask(
    runner: Runner, *, workdir: str, python: str = "", fast: bool = False, timeout_s: float = PROBE_TIMEOUT_S
) -> Reading:
    """One round trip to the node. RemoteError if it gives no answer in time."""
    arguments = ["--workdir", workdir]
    if fast:
        arguments.append("--fast")
    elif python:
        arguments += ["--python", python]
    sent = time.time()
    answer = await runner.verb("probe", *arguments, timeout_s=timeout_s)
    return Reading(answer=answer, sent_at=sent, received_at=time.time())


async def round_trip(connection: Connection) -> float:
    """Best time of a command that does nothing, in seconds."""
    best = float("inf")
    for _ in range(RTT_TRIES):
        before = time.monotonic()
        await connection.run(("true",), timeout_s=10.0, limit_bytes=1 << 20)
        best = min(best, time.monotonic() - before)
    return best


# -- reading -------------------------------------------------------------------------------------------
def facts_of(
    name: str,
    host: str,
    reading: Reading,
    *,
    twin: Twin | None = None,
    local: bool = False,
    rtt_s: float | None = None,
    before: Ticks | None = None,
) -> NodeFacts:
    """Typed facts of a whole probe. RemoteError if the answer is none of a probe of this version."""
    answer = _checked(reading, host)
    raw = _raw(answer)
    system = short(raw.pop("uname", ""), 120) or "unknown"
    mac = system.startswith("Darwin")
    tools = NodeTools(name=name, host=host, system="Darwin" if mac else "Linux", raw=raw)
    machine = read_machine(tools)
    packages = table(answer.get("packages"))
    versions = {short(key, 40): short(value, 40) for key, value in list(table(packages.get("packages")).items())[:64]}
    gpus = tuple(card.gpu for card in _read(raw, "nvidia_smi", nvidia.cards) or ())
    hardware = _read(raw, "hardware", apple.mac_hardware) or apple.MacHardware()
    sysctl = _read(raw, "sysctl", apple.sysctl) or apple.Sysctl()
    mac_system = _read(raw, "sw_vers", apple.mac_system)
    sleep = _read(raw, "pmset", apple.sleep_settings)
    silicon = mac and "arm64" in system
    words = system.split(" ")
    booted = str(sysctl.booted_at) if sysctl.booted_at else ""
    return NodeFacts(
        name=name,
        host=host,
        system=system,
        chip=hardware.chip or sysctl.chip or short(answer.get("cpuinfo"), 80) or words[-1],
        cores=hardware.cores or whole(answer.get("cores")) or 1,
        twin=twin or ("mlx" if silicon else "torch"),
        accelerator="Metal" if silicon else ("CUDA" if gpus else "cpu"),
        python=short(packages.get("python"), 20) or short(table(answer.get("node_python")).get("version"), 20),
        os_build=mac_system.build if mac_system else (words[1] if len(words) > 1 else ""),
        model=hardware.model or short(answer.get("dmi"), 60),
        boot_id=booted if mac else short(answer.get("boot_id"), 60),
        interfaces=machine.interfaces,
        routes=tuple(dict.fromkeys(route.network for route in machine.routes)),
        versions=versions,
        clock_skew_s=None if local else clock_skew(reading),
        rtt_s=rtt_s,
        sleep=sleep.settings if sleep else {},
        wired_limit_mb=sysctl.wired_limit_mb,
        environment=short(packages.get("environment"), 64),
        raw=raw,
        **_changing(answer, raw, mac, sysctl.memory_bytes or hardware.memory_bytes, hardware.cores, before, gpus),
    )


def renewed(facts: NodeFacts, reading: Reading, *, local: bool = False, before: Ticks | None = None) -> NodeFacts:
    """The same facts with the numbers of a fast probe. RemoteError if the answer is none of a probe."""
    answer = _checked(reading, facts.host)
    raw = _raw(answer)
    raw.pop("uname", None)
    cards = tuple(card.gpu for card in _read(raw, "nvidia_smi", nvidia.cards) or ())
    mac = facts.system.startswith("Darwin")
    changing = _changing(answer, raw, mac, facts.memory_total_bytes, facts.cores, before, cards or facts.gpus)
    kept = {key: value for key, value in raw.items() if key not in ("node", "missing", "timed_out", "failed")}
    node = {**table(facts.raw.get("node")), **table(raw.get("node"))}
    skew = None if local else clock_skew(reading)
    return msgspec.structs.replace(facts, **changing, clock_skew_s=skew, raw={**facts.raw, **kept, "node": node})


def ticks_of(reading: Reading) -> Ticks | None:
    """Processor times at the end of a probe, to compare the next one with; None where the system tells none."""
    return _ticks(table(reading.answer.get("cpu")).get("after"))


def clock_skew(reading: Reading) -> float | None:
    """The node's clock minus this one's, in seconds, if both ways take equally long (half of it is the error)."""
    began, ended = real(reading.answer.get("started_at")), real(reading.answer.get("at"))
    if began is None or ended is None:
        return None
    return ((began - reading.sent_at) + (ended - reading.received_at)) / 2


def _checked(reading: Reading, host: str) -> dict[str, Any]:
    answer = reading.answer
    if answer.get("version") != PROBE_VERSION or not isinstance(answer.get("tools"), dict):
        raise RemoteError(
            f"{host} answered a probe with something else",
            host=host,
            fix="see that nothing on the node changes what commands print",
        )
    return answer


def _raw(answer: Mapping[str, Any]) -> dict[str, Any]:
    """Texts of tools by name; then `node`, and the names of tools that are missing, were late or failed."""
    raw: dict[str, Any] = {}
    missing, late, failed = [], [], {}
    for key, value in list(table(answer.get("tools")).items())[:64]:
        tool, result = short(key, 40), table(value)
        text = plain_text(str(result.get("out") or "")[:TOOL_LIMIT])
        if result.get("missing"):
            missing.append(tool)
        elif result.get("timed_out"):
            late.append(tool)
        elif text or result.get("status") == 0:
            raw[tool] = text
        if result.get("status") not in (0, None):
            failed[tool] = short(result.get("err"), 200)
    speeds = [
        f"{short(one.get('name'), 32)} {one['speed_mbit']}"
        for one in map(table, rows(answer.get("interfaces"), 128))
        if whole(one.get("speed_mbit")) is not None
    ]
    if speeds:
        raw["net_speeds"] = "\n".join(speeds)
    raw["node"] = {key: _plain(answer[key]) for key in _NODE_KEYS if key in answer}
    return {**raw, "missing": missing, "timed_out": late, "failed": failed}


def _plain(value: object, depth: int = 0) -> Any:
    """JSON of the node with every text made fit for a terminal; what is too deep or too much is left out."""
    if isinstance(value, str):
        return plain_text(value[:4000])
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        return real(value) if isinstance(value, float) else whole(value)
    if isinstance(value, dict) and depth < 4:
        return {short(key, 60): _plain(one, depth + 1) for key, one in list(value.items())[:128]}
    if isinstance(value, list) and depth < 4:
        return [_plain(one, depth + 1) for one in value[:256]]
    return None


def _read(raw: Mapping[str, Any], key: str, reader: Callable[[object], T]) -> T | None:
    """What a reader makes of an answer; None if there is none or it cannot be read (the doctor says so)."""
    if key not in raw:
        return None
    try:
        return reader(raw[key])
    except ToolOutput:
        return None


def _changing(
    answer: Mapping[str, Any],
    raw: Mapping[str, Any],
    mac: bool,  # noqa: FBT001 - one call site each, by position with its neighbours
    memory_bytes: int | None,
    cores: int | None,
    before: Ticks | None,
    gpus: Sequence[Gpu],
) -> dict[str, Any]:
    """Fields of NodeFacts that a fast probe renews."""
    meminfo = table(answer.get("meminfo"))
    total = memory_bytes or whole(meminfo.get("MemTotal")) or 0
    available = whole(meminfo.get("MemAvailable"))
    statistics = _read(raw, "vm_stat", apple.memory_use) if mac else None
    if statistics is not None:
        used = statistics.active_bytes + statistics.wired_bytes + statistics.compressed_bytes
    else:
        used = total - available if available is not None and total >= available else 0
    load = real(next(iter(rows(answer.get("load"), 3)), None)) or 0.0
    power = _read(raw, "pmset_batt", apple.battery) if mac else None
    return {
        "cpu_percent": _cpu_percent(answer, raw, before, load, cores or whole(answer.get("cores")) or 1),
        "memory_total_bytes": total,
        "memory_used_bytes": used,
        "disk_free_bytes": whole(table(answer.get("disk")).get("free_bytes")) or 0,
        "load_1m": load,
        "gpus": tuple(gpus),
        "on_battery": power.on_battery if power is not None else _on_battery(answer.get("power_supply")),
        "thermal": (_read(raw, "pmset_therm", apple.thermal) or "") if mac else "",
    }


def _ticks(value: object) -> Ticks | None:
    found = table(value)
    busy, total = real(found.get("busy")), real(found.get("total"))
    return None if busy is None or total is None else Ticks(busy=busy, total=total)


def _cpu_percent(
    answer: Mapping[str, Any], raw: Mapping[str, Any], before: Ticks | None, load: float, cores: int
) -> float:
    idle = _TOP_IDLE.findall(str(raw.get("top", ""))[:TOOL_LIMIT])
    if idle:
        # The first of top's two readings is since boot, the last one since the first.
        return min(100.0, max(0.0, 100.0 - (real(idle[-1]) or 0.0)))
    cpu = table(answer.get("cpu"))
    last = _ticks(cpu.get("after"))
    for first in (before, _ticks(cpu.get("before"))):
        if last is not None and first is not None and last.total > first.total:
            return min(100.0, max(0.0, 100.0 * (last.busy - first.busy) / (last.total - first.total)))
    return min(100.0, max(0.0, 100.0 * load / cores))


def _on_battery(value: object) -> bool | None:
    """From Linux's power supplies; None for a machine without a battery."""
    supplies = [table(one) for one in rows(value, 16)]
    if not any(one.get("type") == "Battery" for one in supplies):
        return None
    return not any(one.get("type") in ("Mains", "USB") and one.get("online") == "1" for one in supplies)


# -- this machine, without a round trip ----------------------------------------------------------------
def choose_twin() -> Twin:
    """MLX on Apple silicon, torch everywhere else (MLX's Linux CPU wheel is many times slower there)."""
    return "mlx" if platform.system() == "Darwin" and platform.machine() == "arm64" else "torch"


def chip_name() -> str:
    """The processor's name as the system gives it, its architecture where it gives none."""
    if platform.system() == "Linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def probe_local(workspace: Path) -> NodeFacts:
    """This machine now. The first call's cpu_percent is 0: it needs an earlier reading to compare with."""
    memory = psutil.virtual_memory()
    twin = choose_twin()
    accelerator = "Metal" if twin == "mlx" else ("CUDA" if shutil.which("nvidia-smi") else "cpu")
    return NodeFacts(
        name="this machine",
        host=socket.gethostname(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        chip=chip_name(),
        cores=psutil.cpu_count() or 1,
        cpu_percent=psutil.cpu_percent(None),
        memory_total_bytes=memory.total,
        memory_used_bytes=memory.total - memory.available,
        disk_free_bytes=shutil.disk_usage(workspace).free,
        load_1m=psutil.getloadavg()[0],
        python=platform.python_version(),
        twin=twin,
        accelerator=accelerator,
    )
