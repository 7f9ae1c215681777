"""A Linux machine about itself: files of /proc, the clock's source, whether its user's processes may linger."""

from __future__ import annotations

from typing import Literal

import msgspec

from jupiter_engine.cluster.readers.reading import lines_of, pairs, real, short, text_of, unusable, whole


class Processor(msgspec.Struct, frozen=True, kw_only=True):
    name: str = ""
    threads: int = 0


class Times(msgspec.Struct, frozen=True, kw_only=True):
    """Processor time since boot, in clock ticks over all processors; two readings give a load."""

    total: int
    idle: int
    """Waiting for a disk included."""


class Clock(msgspec.Struct, frozen=True, kw_only=True):
    ntp: bool | None = None
    """Whether a time service is switched on."""
    synchronised: bool | None = None
    """Whether it has set the clock."""
    zone: str = ""


def memory(raw: object) -> tuple[int, int]:
    """/proc/meminfo: (total, available) in bytes; both stand there in kB, which are KiB (proc(5))."""
    found = pairs(lines_of("/proc/meminfo", raw), ":")
    values = []
    for name in ("MemTotal", "MemAvailable"):
        words = found.get(name, "").split()
        value = whole(words[0]) if words else None
        if value is None or not 0 <= value < 2**50:
            raise unusable("/proc/meminfo", f"has no number for {name}")
        values.append(value * 1024)
    return values[0], values[1]


def processor(raw: object) -> Processor:
    """/proc/cpuinfo: `model name` (x86) or `Model` (ARM boards), and one line `processor` for each thread."""
    lines = lines_of("/proc/cpuinfo", raw)
    threads = sum(1 for line in lines if line.partition(":")[0].strip() == "processor")
    found = pairs(lines, ":")
    return Processor(name=short(found.get("model name", found.get("Model", "")), 80), threads=threads)


def load(raw: object) -> float:
    """/proc/loadavg: its first number, processes that run or wait, over one minute."""
    words = text_of("/proc/loadavg", raw).split()
    value = real(words[0]) if words else None
    if value is None:
        raise unusable("/proc/loadavg", "does not begin with a number")
    return value


def times(raw: object) -> Times:
    """/proc/stat: the line `cpu  user nice system idle iowait ...` (proc(5))."""
    for line in lines_of("/proc/stat", raw):
        words = line.split()
        if words and words[0] == "cpu":
            numbers = [whole(word) for word in words[1:9]]
            ticks = [number for number in numbers if number is not None]
            if len(ticks) >= 5 and len(ticks) == len(numbers):
                return Times(total=sum(ticks), idle=ticks[3] + ticks[4])
    raise unusable("/proc/stat", "has no line for all processors")


def uptime_s(raw: object) -> float:
    """/proc/uptime: its first number, seconds since boot."""
    words = text_of("/proc/uptime", raw).split()
    value = real(words[0]) if words else None
    if value is None:
        raise unusable("/proc/uptime", "does not begin with a number")
    return value


def linger(raw: object) -> Literal["yes", "no", "unknown"]:
    """`loginctl show-user --property=Linger`: whether the user's processes outlive the last login.

    Shape: `Linger=yes` (loginctl's manual page); nothing where the user has no session and no manager.
    """
    value = pairs(lines_of("loginctl show-user", raw), "=").get("Linger")
    if value == "yes":
        return "yes"
    return "no" if value == "no" else "unknown"


def clock(raw: object) -> Clock:
    """`timedatectl show`: lines `NTP=yes`, `NTPSynchronized=yes`, `Timezone=Etc/UTC` (its manual page)."""
    found = pairs(lines_of("timedatectl show", raw), "=")
    known = {"yes": True, "no": False}
    return Clock(
        ntp=known.get(found.get("NTP", "")),
        synchronised=known.get(found.get("NTPSynchronized", "")),
        zone=short(found.get("Timezone", ""), 60),
    )
