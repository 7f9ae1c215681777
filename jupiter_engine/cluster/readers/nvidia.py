"""NVIDIA cards of a node: what they are and how they are, which reach each other, what the driver complained of."""

from __future__ import annotations

import csv
import re
from typing import Final

import msgspec

from jupiter_engine.cluster.readers.reading import lines_of, real, short, unusable, whole
from jupiter_engine.protocol.fleet import Gpu
from jupiter_engine.units import MIB

_XID: Final = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]{1,24})\): ([0-9]{1,4}),?(.*)")
_FIELDS: Final = 11


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """One card."""

    index: int
    uuid: str
    gpu: Gpu
    mig: bool = False
    """Whether it is divided into MIG instances: its utilisation is then not told."""


class PeerAccess(msgspec.Struct, frozen=True, kw_only=True):
    """Whether one card can read another's memory directly."""

    a: int
    b: int
    state: str
    """OK, or why not: CNS (chipset), GNS (card), TNS (topology), NS (not supported), DR (disabled), U (unknown)."""

    @property
    def ok(self) -> bool:
        return self.state == "OK"


class Xid(msgspec.Struct, frozen=True, kw_only=True):
    """An error report of the driver in the kernel's log."""

    bus: str
    """PCI address of the card."""
    number: int
    """Meaning: NVIDIA's list of Xid errors."""
    text: str
    at: str = ""
    """As it stands before the message."""


def cards(raw: object) -> tuple[Card, ...]:
    """`nvidia-smi --query-gpu=index,uuid,name,memory.total,memory.used,utilization.gpu,temperature.gpu,power.draw,
    power.limit,driver_version,mig.mode.current --format=csv,noheader,nounits`.

    Shape: a line of those eleven fields for each card, MiB, percent, degrees Celsius and watts; what a card does
    not tell stands as [N/A] or [Not Supported] (`nvidia-smi --help-query-gpu`). A sentence instead of a table
    (no driver, no card) is a ToolOutput.
    """
    tool = "nvidia-smi --query-gpu"
    found: list[Card] = []
    # nvidia-smi joins with ", " and quotes nothing: a name with a comma in it would only shift its own line.
    for line in lines_of(tool, raw):
        if not line.strip() or len(found) >= 256:
            continue
        if len(line) > 2000:
            raise unusable(tool, "printed a line too long for a card")
        fields = next(csv.reader([line.replace("\0", "")], quoting=csv.QUOTE_NONE, skipinitialspace=True))
        if len(fields) != _FIELDS:
            raise unusable(tool, f"printed {short(line, 80)!r} in place of {_FIELDS} fields")
        index = whole(fields[0])
        if index is None:
            raise unusable(tool, f"gave {short(fields[0], 20)!r} as a card's number")
        found.append(_card(index, fields))
    return tuple(found)


def _card(index: int, fields: list[str]) -> Card:
    total, used = real(fields[3]), real(fields[4])
    return Card(
        index=index,
        uuid=short(fields[1], 60),
        mig=fields[10].strip() == "Enabled",
        gpu=Gpu(
            name=short(fields[2], 60),
            memory_total_bytes=_mib(total),
            memory_used_bytes=_mib(used),
            utilisation_percent=real(fields[5]),
            temperature_c=real(fields[6]),
            power_w=real(fields[7]),
            power_limit_w=real(fields[8]),
            driver=short(fields[9], 20) if real(fields[9][:3]) is not None else "",
        ),
    )


def _mib(value: float | None) -> int | None:
    return int(value * MIB) if value is not None and 0 <= value < 2**30 else None


def peer_access(raw: object) -> tuple[PeerAccess, ...]:
    """`nvidia-smi topo -p2p r`: pairs of cards and whether they may read from each other.

    Shape: a head line of GPU0, GPU1, ...; a line for each card with its name and a state for each column, X for
    itself; then a legend (published captures; the head and names may carry terminal escapes).
    """
    columns: list[int] = []
    found: list[PeerAccess] = []
    for line in lines_of("nvidia-smi topo -p2p r", raw):
        words = short(line, 4000).split()
        numbers = [_number(word) for word in words]
        if words and not columns and all(number is not None for number in numbers):
            columns = [number for number in numbers if number is not None][:256]
        elif len(words) == len(columns) + 1 and columns and numbers[0] is not None:
            found += [
                PeerAccess(a=numbers[0], b=b, state=short(state, 8))
                for b, state in zip(columns, words[1:], strict=True)
                if b != numbers[0]
            ]
        if len(found) > 65_536:
            break
    return tuple(found)


def _number(word: str) -> int | None:
    return whole(word[3:]) if re.fullmatch(r"GPU[0-9]{1,3}", word) else None


def xids(raw: object) -> tuple[Xid, ...]:
    """Xid lines of `journalctl --dmesg` or `dmesg`, oldest first; the last 200.

    Shape: `... NVRM: Xid (PCI:0000:01:00): 79, pid=1234, GPU has fallen off the bus.` (NVIDIA's Xid manual).
    """
    found: list[Xid] = []
    for line in lines_of("journalctl --dmesg", raw):
        match = _XID.search(line[:2000])
        if match:
            before = short(line[: match.start()], 60)
            found.append(Xid(bus=match[1], number=int(match[2]), text=short(match[3], 200), at=before))
    return tuple(found[-200:])
