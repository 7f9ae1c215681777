"""Checks: staying awake, cool and powered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from jupiter_engine.cluster.doctor.evidence import Evidence, node_fact, tool_text
from jupiter_engine.cluster.doctor.registry import Theme, Unread, Verdict, command, each, info, person, warn
from jupiter_engine.cluster.readers.apple import mac_hardware
from jupiter_engine.protocol.fleet import NodeFacts

HOT_GPU_C: Final = 85.0
"""Consumer cards begin to slow down a few degrees above."""

_theme = Theme()


def setting(facts: NodeFacts, name: str) -> str:
    """A setting of pmset. Unread where pmset told none."""
    if not facts.sleep:
        raise Unread("pmset gave no settings")
    return facts.sleep.get(name, "")


@_theme.check("sleep", "Nodes do not go to sleep")
def sleep(e: Evidence) -> Iterator[Verdict]:
    def judge_mac(name: str, facts: NodeFacts) -> Verdict | None:
        minutes = setting(facts, "sleep").split(" ")[0]
        if minutes in ("", "0"):
            return None
        text = f"{name} goes to sleep after {minutes} idle minutes. Jupiter keeps it awake while it works,"
        fix = command(f"let {name} stay awake", "sudo", "pmset", "-a", "sleep", "0", node=name)
        return warn((name,), f"{text} but between runs it cannot be reached.", fix)

    def judge_linux(name: str, facts: NodeFacts) -> Verdict | None:
        if (tool_text(facts, "sleep_target") or "").strip() == "masked" or not has_battery(facts):
            return None
        text = f"{name} is a laptop and may suspend when its lid is closed or it is idle."
        fix = command(f"keep {name} from suspending", "sudo", "systemctl", "mask", "sleep.target", node=name)
        return warn((name,), text, fix)

    yield from each(e.macs(), judge_mac, good="Sleep is off")
    yield from each(e.linuxes(), judge_linux, good="Nothing puts the machine to sleep")


def has_battery(facts: NodeFacts) -> bool:
    supplies = node_fact(facts, "power_supply")
    return isinstance(supplies, list) and any(
        isinstance(supply, dict) and supply.get("type") == "Battery" for supply in supplies
    )


@_theme.check("battery", "Nodes run on mains power")
def battery(e: Evidence) -> Iterator[Verdict]:
    def judge(name: str, facts: NodeFacts) -> Verdict | None:
        if not facts.on_battery:
            return None
        return warn(
            (name,), f"{name} runs on its battery: it is slower, and ends when it is empty.", person("plug it in")
        )

    known = {name: facts for name, facts in e.facts.items() if facts.on_battery is not None}
    yield from each(known, judge, good="Mains power")


@_theme.check("thermal", "Nothing is too hot")
def thermal(e: Evidence) -> Iterator[Verdict]:
    def judge(name: str, facts: NodeFacts) -> Verdict | None:
        if facts.thermal not in ("", "nominal"):
            text = f"{name} is slowed down by heat: {facts.thermal}."
            return warn((name,), text, person("give it air, or a smaller share of the work"))
        hot = [gpu for gpu in facts.gpus if gpu.temperature_c is not None and gpu.temperature_c >= HOT_GPU_C]
        if hot:
            text = f"{hot[0].name} on {name} is at {hot[0].temperature_c:.0f} °C and will slow down."
            return warn((name,), text, person("give it air, or lower its power limit: nvidia-smi -pl"))
        return None

    told = {
        name: facts
        for name, facts in e.facts.items()
        if facts.thermal or any(gpu.temperature_c is not None for gpu in facts.gpus)
    }
    yield from each(told, judge, good="Nothing is slowed down by heat")


@_theme.check("fanless", "Fanless machines are known")
def fanless(e: Evidence) -> Iterator[Verdict]:
    for name, facts in e.macs().items():
        hardware = tool_text(facts, "hardware")
        if hardware is not None and "Air" in mac_hardware(hardware).name:
            text = f"{name} has no fan: after some minutes of full load it works at about half its speed."
            yield info((name,), text, person("use it for generating, or expect the group to be as slow as it is"))


@_theme.check("low-power-mode", "Low Power Mode is off")
def low_power_mode(e: Evidence) -> Iterator[Verdict]:
    def judge(name: str, facts: NodeFacts) -> Verdict | None:
        if setting(facts, "lowpowermode") != "1":
            return None
        fix = command(f"switch it off on {name}", "sudo", "pmset", "-a", "lowpowermode", "0", node=name)
        return warn((name,), f"Low Power Mode is on on {name}: it trains at a fraction of its speed.", fix)

    yield from each(e.macs(), judge, good="Low Power Mode is off")


@_theme.check("auto-restart", "Nodes come back after a power failure")
def auto_restart(e: Evidence) -> Iterator[Verdict]:
    def judge(name: str, facts: NodeFacts) -> Verdict | None:
        restarts = setting(facts, "autorestart")
        if restarts == "":
            raise Unread("it has no such setting (a laptop)")
        if restarts == "0":
            fix = command(f"let {name} start by itself", "sudo", "pmset", "-a", "autorestart", "1", node=name)
            return info((name,), f"{name} stays off after a power failure.", fix)
        if "FileVault is On" in (tool_text(facts, "filevault") or ""):
            text = f"{name} starts by itself after a power failure, but FileVault is on: somebody has to log in there"
            return info((name,), f"{text} before ssh answers.")
        return None

    yield from each(e.macs(), judge, good="The machine starts again after a power failure")


CHECKS: Final = tuple(_theme.checks)
