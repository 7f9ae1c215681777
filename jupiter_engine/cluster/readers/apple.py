"""A Mac about itself: hardware, system, sleep, battery, throttling, memory, firewall."""

from __future__ import annotations

import re
from typing import Final, Literal

import msgspec

from jupiter_engine.cluster.readers.reading import (
    json_of,
    lines_of,
    pairs,
    rows,
    short,
    table,
    text_of,
    unusable,
    whole,
)
from jupiter_engine.units import GIB, MIB

_MEMORY: Final = re.compile(r"([0-9]{1,6}) (GB|MB|TB)")
_CORES: Final = re.compile(r"proc ([0-9]{1,4})(?::([0-9]{1,4}):([0-9]{1,4}))?")
_BOOT: Final = re.compile(r"sec = ([0-9]{1,12})")
_PAGE: Final = re.compile(r"page size of ([0-9]{1,7}) bytes")
_PERCENT: Final = re.compile(r"([0-9]{1,3})%")


class MacHardware(msgspec.Struct, frozen=True, kw_only=True):
    """What the machine is."""

    chip: str = ""
    """Apple M4 Pro; on Intel Macs the processor's name."""
    model: str = ""
    """Mac16,11."""
    name: str = ""
    """Mac mini."""
    memory_bytes: int | None = None
    cores: int | None = None
    performance_cores: int | None = None
    efficiency_cores: int | None = None


class MacSystem(msgspec.Struct, frozen=True, kw_only=True):
    version: str
    """26.2."""
    build: str = ""
    """25C56."""


class Sysctl(msgspec.Struct, frozen=True, kw_only=True):
    memory_bytes: int | None = None
    booted_at: int | None = None
    """Seconds since the epoch at the last boot."""
    wired_limit_mb: int | None = None
    """iogpu.wired_limit_mb; 0: the system's default."""
    chip: str = ""


class Sleep(msgspec.Struct, frozen=True, kw_only=True):
    """Energy settings that are in force now."""

    settings: dict[str, str]
    """By name as pmset gives them: sleep, disksleep, displaysleep, powernap, autorestart, lowpowermode, ..."""
    sleep_minutes: int | None = None
    """Idle minutes before the system sleeps; 0: never."""
    prevented_by: tuple[str, ...] = ()
    """Programs that hold sleep off at the moment."""


class Battery(msgspec.Struct, frozen=True, kw_only=True):
    on_battery: bool
    percent: int | None = None
    """None: there is no battery."""


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes by use."""

    free_bytes: int
    active_bytes: int
    inactive_bytes: int
    wired_bytes: int
    compressed_bytes: int


def mac_hardware(raw: object) -> MacHardware:
    """`system_profiler SPHardwareDataType -json`.

    Shape: one object with `chip_type` (Apple silicon) or `cpu_type`, `machine_model`, `machine_name`,
    `physical_memory` ("64 GB") and `number_processors` ("proc 14:10:4": all, performance, efficiency), from
    published captures.
    """
    tool = "system_profiler SPHardwareDataType -json"
    found = rows(table(json_of(tool, raw)).get("SPHardwareDataType"), 4)
    if not found:
        raise unusable(tool, "has no entry under SPHardwareDataType")
    entry = table(found[0])
    memory = _MEMORY.search(short(entry.get("physical_memory", "")))
    unit = {"MB": MIB, "GB": GIB, "TB": 1024 * GIB}
    processors = entry.get("number_processors")
    cores = _CORES.search(processors[:80]) if isinstance(processors, str) else None
    return MacHardware(
        chip=short(entry.get("chip_type", entry.get("cpu_type", "")), 60),
        model=short(entry.get("machine_model", ""), 40),
        name=short(entry.get("machine_name", ""), 60),
        memory_bytes=int(memory[1]) * unit[memory[2]] if memory else None,
        cores=int(cores[1]) if cores else whole(processors),
        performance_cores=int(cores[2]) if cores and cores[2] else None,
        efficiency_cores=int(cores[3]) if cores and cores[3] else None,
    )


def mac_system(raw: object) -> MacSystem:
    """`sw_vers`: lines `ProductName:`, `ProductVersion:`, `BuildVersion:` (its manual page)."""
    found = pairs(lines_of("sw_vers", raw), ":")
    version = short(found.get("ProductVersion", ""), 20)
    if not version:
        raise unusable("sw_vers", "has no ProductVersion")
    return MacSystem(version=version, build=short(found.get("BuildVersion", ""), 20))


def sysctl(raw: object) -> Sysctl:
    """`sysctl hw.memsize kern.boottime iogpu.wired_limit_mb machdep.cpu.brand_string`.

    Shape: lines `name: value`; kern.boottime is `{ sec = 1732000000, usec = 0 } Tue Nov ...` (sysctl's manual
    page). Names that the system does not have are missing.
    """
    found = pairs(lines_of("sysctl", raw), ":")
    boot = _BOOT.search(found.get("kern.boottime", "")[:200])
    return Sysctl(
        memory_bytes=whole(found.get("hw.memsize")),
        booted_at=int(boot[1]) if boot else None,
        wired_limit_mb=whole(found.get("iogpu.wired_limit_mb")),
        chip=short(found.get("machdep.cpu.brand_string", ""), 60),
    )


def sleep_settings(raw: object) -> Sleep:
    """`pmset -g`: the settings in use.

    Shape: head lines ending in a colon, then indented ` name  value`, where `sleep` may carry
    `(sleep prevented by sharingd, caffeinate)` (pmset's manual page; published captures).
    """
    settings: dict[str, str] = {}
    prevented: tuple[str, ...] = ()
    for line in lines_of("pmset -g", raw):
        words = line.split()
        if line[:1] not in (" ", "\t") or len(words) < 2 or len(settings) >= 128:
            continue
        text, _, note = line.strip().partition("(")
        # Names may have several words (Sleep On Power Button); the value is the last one.
        name, _, value = text.strip().rpartition(" ")
        settings.setdefault(short(name, 40), short(value, 40))
        if words[0] == "sleep" and "prevented by" in note:
            names = note.partition("prevented by")[2].rstrip(") ")
            prevented = tuple(short(one, 40) for one in names.split(",")[:16])
    return Sleep(settings=settings, sleep_minutes=whole(settings.get("sleep")), prevented_by=prevented)


def battery(raw: object) -> Battery:
    """`pmset -g batt`: `Now drawing from 'AC Power'`, then a line for each battery with `95%;` (its manual page)."""
    text = text_of("pmset -g batt", raw)
    if "Now drawing from" not in text:
        raise unusable("pmset -g batt", "does not say what power is drawn from")
    percent = _PERCENT.search(text)
    return Battery(on_battery="'Battery Power'" in text, percent=int(percent[1]) if percent else None)


def thermal(raw: object) -> str:
    """`pmset -g therm`: `nominal`, or what limits the machine now.

    Shape: notes that nothing has been recorded, or lines `CPU_Speed_Limit = 80`, where 100 is no limit, and on
    Apple silicon `Thermal warning level 1` style lines (pmset's manual page).
    """
    limits: list[str] = []
    for line in lines_of("pmset -g therm", raw):
        name, separator, value = line.strip().partition("=")
        number = whole(value)
        if separator and number is not None:
            name = name.strip()
            full = 100 if name.endswith("_Limit") else None
            if (full is not None and number < full) or (name.endswith("Warning_Level") and number > 0):
                limits.append(f"{short(name, 40)} {number}")
        elif re.match(r"\s*(Thermal|Performance|CPU Power) .*level\W+[1-9]", line[:200], re.IGNORECASE):
            limits.append(short(line, 60))
    return ", ".join(limits[:8]) or "nominal"


def memory_use(raw: object) -> Memory:
    """`vm_stat`: `Mach Virtual Memory Statistics: (page size of 16384 bytes)`, then lines `Pages free: 12.`."""
    lines = lines_of("vm_stat", raw)
    page = _PAGE.search(lines[0][:200])
    if page is None:
        raise unusable("vm_stat", "does not tell its page size")
    found = pairs(lines[1:], ":")

    def size(name: str) -> int:
        pages = whole(found.get(name, "").rstrip("."))
        if pages is None or not 0 <= pages < 2**40:
            raise unusable("vm_stat", f"has no number for `{name}`")
        return pages * int(page[1])

    return Memory(
        free_bytes=size("Pages free"),
        active_bytes=size("Pages active"),
        inactive_bytes=size("Pages inactive"),
        wired_bytes=size("Pages wired down"),
        compressed_bytes=size("Pages occupied by compressor"),
    )


def firewall(raw: object) -> Literal["on", "block_all", "off"]:
    """`/usr/libexec/ApplicationFirewall/socketfilterfw --getglobalstate`.

    Shape: `Firewall is enabled. (State = 1)`; 0 is off, 1 on with exceptions, 2 blocks all incoming connections.
    """
    tool = "socketfilterfw --getglobalstate"
    text = text_of(tool, raw)
    state = re.search(r"State = ([0-9])", text)
    if state is None:
        raise unusable(tool, "tells no state")
    return "off" if state[1] == "0" else "block_all" if state[1] == "2" else "on"
