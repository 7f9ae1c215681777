"""The table of nodes: which columns fit, and one line a node. Everything a machine says is made one plain line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from jupiter_engine.protocol.fleet import Finding, FleetPicture, NodeFacts, NodeStatus, Severity, Transfer
from jupiter_engine.units import GIB, MIB, bytes_text, duration_text
from jupiter_tui.view.text import Line, Span, bar, cut, cut_line, mark, one_line, pad

SKEW_SHOWN_S: Final = 1.0
"""A clock that differs by more than this is worth a second look."""
LEAST_NOTE: Final = 26
"""Characters below which a column of words says nothing."""
Cell = Callable[[NodeStatus, NodeFacts], Span]


@dataclass(frozen=True)
class Column:
    """A column; `rank` says how early it is given room (0 first)."""

    title: str
    width: int
    rank: int
    cell: Cell
    right: bool = False


@dataclass(frozen=True)
class Layout:
    """What fits into a width: the name's column, the others in order, and the room for words at the end (0: none)."""

    width: int
    name: int
    columns: tuple[Column, ...]
    note: int


# -- numbers as short as they can be read --------------------------------------------------------------
def short_bytes(size_bytes: float) -> str:
    """`7.2G`, `120G`, `1.8T`, `900M`."""
    if size_bytes >= 1000 * GIB:
        return f"{size_bytes / (1024 * GIB):.1f}T"
    if size_bytes >= GIB:
        return f"{size_bytes / GIB:.0f}G" if size_bytes >= 10 * GIB else f"{size_bytes / GIB:.1f}G"
    return f"{size_bytes / MIB:.0f}M"


def used_of(used_bytes: float, total_bytes: float) -> str:
    """`7.2/16G`."""
    used = used_bytes / GIB
    return f"{used:.0f}/{total_bytes / GIB:.0f}G" if used >= 9.95 else f"{used:.1f}/{total_bytes / GIB:.0f}G"


def seconds_text(seconds: float | None, *, signed: bool = False) -> str:
    """`0.4 ms`, `12 ms`, `2.1 s`; with a sign if asked; `-` for None."""
    if seconds is None:
        return "-"
    sign = "+" if signed and seconds > 0 else ""
    size = abs(seconds)
    if size < 0.0095:
        return f"{sign}{seconds * 1000:.1f} ms"
    if size < 0.9995:
        return f"{sign}{seconds * 1000:.0f} ms"
    return (
        f"{sign}{seconds:.1f} s"
        if size < 100
        else f"{sign}{duration_text(size)}"
        if seconds > 0
        else f"-{duration_text(size)}"
    )


def transfer_text(transfer: Transfer) -> str:
    """`environment: sending 45%  12.3 of 27.0 MiB  11.2 MiB/s  ETA 3s`."""
    what = f"{one_line(transfer.what)}: {one_line(transfer.step) or 'sending'}"
    if transfer.total_bytes <= 0:
        return what
    share = min(1.0, transfer.sent_bytes / transfer.total_bytes)
    text = f"{what} {share:.0%}  {bytes_text(transfer.sent_bytes)} of {bytes_text(transfer.total_bytes)}"
    if transfer.bytes_per_s:
        text += f"  {bytes_text(transfer.bytes_per_s)}/s"
    return text + (f"  ETA {duration_text(transfer.eta_s)}" if transfer.eta_s is not None else "")


# -- states --------------------------------------------------------------------------------------------
def worst_by_node(findings: Sequence[Finding]) -> dict[str, Severity]:
    """The gravest severity of the doctor's findings about each node; findings about all nodes are nobody's."""
    order: Final[Mapping[str, int]] = {"fail": 0, "warn": 1, "info": 2, "ok": 3}
    worst: dict[str, Severity] = {}
    for finding in findings:
        for node in finding.nodes:
            if node not in worst or order[finding.severity] < order[worst[node]]:
                worst[node] = finding.severity
    return worst


def node_mark(status: NodeStatus, worst: Severity | None = None) -> Span:
    """ok usable, .. being called, !! cannot be used or the doctor says it fails, ** a warning, -- nothing known."""
    if status.state in ("lost", "refused") or (status.problem and status.state == "online"):
        return mark("bad")
    if status.state == "unknown":
        return mark("none")
    if status.state == "connecting" or status.facts is None:
        return mark("run")
    return mark("bad") if worst == "fail" else ("**", "warn") if worst == "warn" else mark("ok")


def state_words(status: NodeStatus, now: float) -> str:
    """`lost 3m12s ago`, `refused`, `being called`."""
    age = duration_text(now - status.since) if status.since else ""
    match status.state:
        case "online":
            return "answers" if status.facts is not None else "connected, being asked"
        case "lost":
            return f"lost {age} ago" if age else "lost"
        case "refused":
            return "cannot be used"
        case "connecting":
            return "being called"
    return "not called yet"


def note(status: NodeStatus, now: float) -> Span | None:
    """What is to be said of a node in words: a transfer, or why its numbers are missing; None: the numbers speak."""
    if status.transfer is not None:
        return (transfer_text(status.transfer), "accent")
    if status.state == "online" and status.facts is not None and not status.problem:
        return None
    problem = one_line(status.problem)
    text = state_words(status, now) + (f": {problem}" if problem else "")
    return (text, "bad" if status.state in ("lost", "refused") or status.problem else "dim")


# -- columns -------------------------------------------------------------------------------------------
def _host(status: NodeStatus, _: NodeFacts) -> Span:
    here = status.local and status.name != "this machine"
    return ("this machine", "dim") if here else (one_line(status.host), "")


def _role(status: NodeStatus, _: NodeFacts) -> Span:
    return (one_line(status.role), "")


def _chip(_: NodeStatus, facts: NodeFacts) -> Span:
    card = next((gpu.name for gpu in facts.gpus if gpu.name), "")
    return (one_line(card or facts.chip), "")


def _memory(_: NodeStatus, facts: NodeFacts) -> Span:
    if facts.memory_total_bytes <= 0:
        return ("-", "dim")
    share = facts.memory_used_bytes / facts.memory_total_bytes
    style = "warn" if share > 0.92 else "accent"
    return (f"{bar(share, 6)} {used_of(facts.memory_used_bytes, facts.memory_total_bytes)}", style)


def _gpu(_: NodeStatus, facts: NodeFacts) -> Span:
    known = [gpu.utilisation_percent for gpu in facts.gpus if gpu.utilisation_percent is not None]
    return (f"{sum(known) / len(known):.0f}%", "bold") if known else ("-", "dim")


def _gpu_memory(_: NodeStatus, facts: NodeFacts) -> Span:
    used = [gpu.memory_used_bytes for gpu in facts.gpus if gpu.memory_used_bytes is not None]
    total = [gpu.memory_total_bytes for gpu in facts.gpus if gpu.memory_total_bytes is not None]
    return (used_of(sum(used), sum(total)), "") if used and total else ("-", "dim")


def _cpu(_: NodeStatus, facts: NodeFacts) -> Span:
    return (f"{facts.cpu_percent:.0f}%", "")


def _load(_: NodeStatus, facts: NodeFacts) -> Span:
    return (f"{facts.load_1m:.1f}", "warn" if facts.load_1m > 2 * facts.cores else "")


def _disk(_: NodeStatus, facts: NodeFacts) -> Span:
    free = facts.disk_free_bytes
    return (short_bytes(free), "warn" if free < 10 * GIB else "")


def _rtt(status: NodeStatus, facts: NodeFacts) -> Span:
    return ("-", "dim") if status.local else (seconds_text(facts.rtt_s), "")


def _skew(status: NodeStatus, facts: NodeFacts) -> Span:
    if status.local or facts.clock_skew_s is None:
        return ("-", "dim")
    far = abs(facts.clock_skew_s) > SKEW_SHOWN_S
    return (seconds_text(facts.clock_skew_s, signed=True), "warn" if far else "")


def _twin(_: NodeStatus, facts: NodeFacts) -> Span:
    return (facts.twin, "")


def _environment(status: NodeStatus, facts: NodeFacts) -> Span:
    if facts.environment:
        return (one_line(facts.environment)[:8], "")
    return ("own" if status.local else "none", "dim")


_COLUMNS: Final = (
    Column("HOST", 16, 4, _host),
    Column("ROLE", 9, 1, _role),
    Column("CHIP", 14, 5, _chip),
    Column("MEMORY", 15, 0, _memory),
    Column("GPU", 4, 0, _gpu, right=True),
    Column("GPU MEM", 9, 6, _gpu_memory, right=True),
    Column("CPU", 4, 3, _cpu, right=True),
    Column("LOAD", 5, 1, _load, right=True),
    Column("DISK", 5, 2, _disk, right=True),
    Column("RTT", 7, 2, _rtt, right=True),
    Column("CLOCK", 8, 5, _skew, right=True),
    Column("TWIN", 5, 7, _twin),
    Column("ENV", 8, 6, _environment),
)


def layout(nodes: Sequence[NodeStatus], width: int) -> Layout:
    """Columns in the order of their rank as long as there is room; what is left goes to names, then to words."""
    longest = max((len(one_line(node.name)) for node in nodes), default=4)
    name = min(max(longest, 4), 12)
    room = width - 5 - name
    chosen: list[Column] = []
    for column in sorted(_COLUMNS, key=lambda c: c.rank):
        if column.width + 1 <= room:
            chosen.append(column)
            room -= column.width + 1
    more = min(room, max(0, min(longest, 24) - name))
    name, room = name + more, room - more
    columns = tuple(column for column in _COLUMNS if column in chosen)
    return Layout(width=width, name=name, columns=columns, note=room - 1 if room > LEAST_NOTE else 0)


def head_line(form: Layout) -> Line:
    """The titles of the columns."""
    text = "   " + "  " + pad("NODE", form.name)
    for column in form.columns:
        text += " " + pad(column.title, column.width, right=column.right)
    return [(cut(text, form.width), "dim")]


def node_line(status: NodeStatus, form: Layout, now: float, *, chosen: bool, worst: Severity | None = None) -> Line:
    """One node; what is to be said in words takes the place of the columns where it has none of its own."""
    line: Line = [
        ("> " if chosen else "  ", "title"),
        node_mark(status, worst),
        (" " + pad(one_line(status.name), form.name), "bold" if chosen else ""),
    ]
    said = note(status, now)
    facts = status.facts
    if facts is None or (said is not None and (not form.note or status.state != "online")):
        role = pad(one_line(status.role), 9)
        words = said or ("", "")
        return cut_line([*line, (f" {role} ", "dim"), words], form.width)
    for column in form.columns:
        text, style = column.cell(status, facts)
        line += [(" ", ""), (pad(text, column.width, right=column.right), style)]
    if said is not None:
        line += [(" ", ""), (cut(said[0], form.note), said[1])]
    return cut_line(line, form.width)


def nodes_title(fleet: FleetPicture) -> str:
    """`Nodes  5 of 6 answer  environment 7f3c9a1 on 4`."""
    if not fleet.nodes:
        return "Nodes"
    usable = [node for node in fleet.nodes if node.state == "online" and not node.problem]
    text = f"Nodes  {len(usable)} of {len(fleet.nodes)} answer"
    hashes = [node.facts.environment for node in usable if node.facts is not None and node.facts.environment]
    if hashes:
        common = max(set(hashes), key=hashes.count)
        text += f"  environment {one_line(common)[:8]} on {hashes.count(common)}"
    return text
