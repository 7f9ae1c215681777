"""Everything that is known of one node."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jupiter_engine.protocol.fleet import Finding, Gpu, Interface, NodeFacts, NodeStatus
from jupiter_engine.units import bytes_text
from jupiter_tui.view.findings import finding_lines
from jupiter_tui.view.nodes import node_mark, seconds_text, state_words, transfer_text
from jupiter_tui.view.text import Line, bar, cut_line, one_line, pad, rule, wrap

LABEL = 12
PACKAGES_FIRST = ("jupiter", "mlx", "mlx-lm", "torch")


def detail_lines(status: NodeStatus, findings: Sequence[Finding], abilities: str, now: float, width: int) -> list[Line]:
    """State and problem first, then the machine, its load, software, network and power."""
    mine = [one for one in findings if status.name in one.nodes and one.severity in ("fail", "warn")]
    worst = min((one.severity for one in mine), key=("fail", "warn").index, default=None)
    lines: list[Line] = [
        [node_mark(status, worst), (f" {one_line(status.name)}", "bold"), (f"  {state_words(status, now)}", "")]
    ]
    if status.problem:
        lines += wrap(one_line(status.problem), width, "bad", indent="   ")
    if status.fix:
        lines += wrap(f"-> {one_line(status.fix)}", width, "", indent="   ")
    if status.transfer is not None:
        transfer = status.transfer
        share = transfer.sent_bytes / transfer.total_bytes if transfer.total_bytes > 0 else 0.0
        lines.append([("   ", ""), (bar(share, max(8, min(24, width - 60))), "accent"), ("  ", "")])
        lines[-1] += wrap(transfer_text(transfer), 400)[0]
    role = f"{one_line(status.role)}: {abilities}" if abilities else one_line(status.role)
    lines += _pairs([("host", "this machine" if status.local else status.host), ("role", role)], width)
    if status.facts is not None:
        lines += _facts(status, status.facts, width)
    if mine:
        lines += [[], rule("The doctor says", width)]
        lines += [line for one in mine for line in finding_lines(one, width)]
    return [cut_line(line, width) for line in lines]


def _facts(status: NodeStatus, facts: NodeFacts, width: int) -> list[Line]:
    lines: list[Line] = [[], rule("Now", width), *_load(facts, width)]
    lines += [line for gpu in facts.gpus for line in _gpu(gpu, width)]
    since_boot = "" if status.local else f"clock {seconds_text(facts.clock_skew_s, signed=True)} against ours"
    trip = "" if status.local else f"round trip {seconds_text(facts.rtt_s)}"
    lines += _pairs([("connection", ", ".join(filter(None, (trip, since_boot))))], width)
    lines += [[], rule("Machine", width), *_pairs(_machine(facts), width)]
    lines += [[], rule("Software", width), *_pairs(_software(status, facts), width)]
    if facts.interfaces or facts.routes:
        lines += [[], rule("Network", width)]
        lines += [line for one in facts.interfaces for line in _interface(one, width)]
        lines += _pairs([("routes", ", ".join(facts.routes))], width)
    power = _power(facts)
    if power:
        lines += [[], rule("Power", width), *_pairs(power, width)]
    return lines


def _load(facts: NodeFacts, width: int) -> list[Line]:
    gauge = max(8, min(24, width - 50))
    share = facts.memory_used_bytes / facts.memory_total_bytes if facts.memory_total_bytes > 0 else 0.0
    memory = f"  {bytes_text(facts.memory_used_bytes)} of {bytes_text(facts.memory_total_bytes)}"
    return [
        [
            (pad("cpu", LABEL), "dim"),
            (bar(facts.cpu_percent / 100, gauge), "accent"),
            (f" {facts.cpu_percent:3.0f}%", "bold"),
            (f"  load {facts.load_1m:.2f} on {facts.cores} cores", ""),
        ],
        [(pad("memory", LABEL), "dim"), (bar(share, gauge), "accent"), (f" {share:4.0%}", "bold"), (memory, "")],
        *_pairs([("disk", f"{bytes_text(facts.disk_free_bytes)} free where Jupiter keeps its files")], width),
    ]


def _gpu(gpu: Gpu, width: int) -> list[Line]:
    parts = [one_line(gpu.name)]
    if gpu.utilisation_percent is not None:
        parts.append(f"{gpu.utilisation_percent:.0f}% busy")
    if gpu.memory_total_bytes is not None:
        used = "?" if gpu.memory_used_bytes is None else bytes_text(gpu.memory_used_bytes)
        parts.append(f"{used} of {bytes_text(gpu.memory_total_bytes)}")
    if gpu.temperature_c is not None:
        parts.append(f"{gpu.temperature_c:.0f} °C")
    if gpu.power_w is not None:
        limit = f" of {gpu.power_limit_w:.0f}" if gpu.power_limit_w is not None else ""
        parts.append(f"{gpu.power_w:.0f}{limit} W")
    if gpu.driver:
        parts.append(f"driver {one_line(gpu.driver)}")
    return _pairs([("card", ", ".join(parts))], width)


def _machine(facts: NodeFacts) -> list[tuple[str, str]]:
    return [
        ("chip", facts.chip),
        ("model", facts.model),
        # Where the build is the kernel's release, the system's own line holds it.
        ("system", facts.system + (f", build {facts.os_build}" if facts.os_build not in facts.system else "")),
        ("started", f"boot {facts.boot_id}" if facts.boot_id else ""),
    ]


def _software(status: NodeStatus, facts: NodeFacts) -> list[tuple[str, str]]:
    order = [name for name in PACKAGES_FIRST if name in facts.versions]
    order += sorted(name for name in facts.versions if name not in order)
    packages = ", ".join(f"{name} {facts.versions[name]}" for name in order)
    return [
        ("trains with", f"{facts.twin} on {facts.accelerator}"),
        ("python", facts.python),
        ("environment", "its own" if status.local else facts.environment or "none that Jupiter put there"),
        ("packages", packages or "none of those that training needs"),
    ]


def _interface(one: Interface, width: int) -> list[Line]:
    parts = [one.kind, *one.addresses]
    if one.speed_bits_per_s:
        speed = one.speed_bits_per_s
        parts.append(f"{speed / 1e9:g} Gb/s" if speed >= 1e9 else f"{speed / 1e6:g} Mb/s")
    if not one.up:
        parts.append("down")
    return _pairs([(one.name, " ".join(parts))], width)


def _power(facts: NodeFacts) -> list[tuple[str, str]]:
    battery = {True: "battery", False: "mains", None: ""}[facts.on_battery]
    sleep = ", ".join(f"{key} {value}" for key, value in sorted(facts.sleep.items()))
    limit = facts.wired_limit_mb
    wired = "" if limit is None else "the system's own" if limit == 0 else f"{limit} MB"
    found = [("power", battery), ("thermal", facts.thermal), ("sleep", sleep), ("wired limit", wired)]
    return [(label, value) for label, value in found if value]


def _pairs(items: Iterable[tuple[str, str]], width: int) -> list[Line]:
    """`label  value` with the value wrapped under itself; nothing for an empty value."""
    lines: list[Line] = []
    for label, value in items:
        shown = one_line(value)
        for number, piece in enumerate(wrap(shown, max(8, width - LABEL)) if shown else []):
            lines.append([(pad(one_line(label) if number == 0 else "", LABEL), "dim"), *piece])
    return lines
