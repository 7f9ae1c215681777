"""Checks: room, memory, and what an earlier run left behind."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

from jupiter_engine.cluster.doctor.evidence import Evidence, node_fact, node_table
from jupiter_engine.cluster.doctor.registry import Theme, Unread, Verdict, each, fail, info, person, warn
from jupiter_engine.protocol.fleet import NodeFacts
from jupiter_engine.units import GIB, bytes_text

CHECKPOINTS_KEPT: Final = 3
BILLION_CHECKPOINT_BYTES: Final = 12_500_000_000
"""fp32 weights and two optimizer states of 1.04 G parameters: 12 bytes each."""
CLAIM_SHARE: Final = 0.9
"""A card of 24 GB shows about 22.5 GiB free for programs: less than a tenth below the claim is the claim."""
BUSY_SHARE: Final = 0.5

_OF_RUNNER: Final = re.compile(r"\.pyz (hold|keep-run|rank-run) (\S+)")
"""A process of the node runner and the folder that it is there for."""

_theme = Theme()


@_theme.check("disk", "Room on the disks")
def disk(e: Evidence) -> Iterator[Verdict]:
    needed = CHECKPOINTS_KEPT * e.checkpoint_bytes
    large = CHECKPOINTS_KEPT * BILLION_CHECKPOINT_BYTES

    def judge(name: str, facts: NodeFacts) -> Verdict | None:
        free, fix = facts.disk_free_bytes, person(f"free some space on {name}, or put `workdir` on another disk")
        if node_table(facts, "disk").get("writable") is False:
            return fail(
                (name,),
                f"Jupiter may not write its files on {name}.",
                person("set `workdir` to a folder that is yours"),
            )
        if free < needed:
            return fail(
                (name,),
                f"{bytes_text(free)} are free on {name}; {CHECKPOINTS_KEPT} checkpoints need {bytes_text(needed)}.",
                fix,
            )
        if free < large:
            text = f"{bytes_text(free)} are free on {name}: enough for the default model, not for three checkpoints"
            return info((name,), f"{text} of a model with a billion parameters ({bytes_text(large)}).")
        return None

    yield from each(e.facts, judge, good=f"More than {bytes_text(large)} are free")


@_theme.check("memory-claim", "Memory as the cluster file says")
def memory_claim(e: Evidence) -> Iterator[Verdict]:
    claimed = {
        name: facts
        for name, facts in e.facts.items()
        if (spec := e.spec(name)) is not None and spec.memory_gb is not None
    }

    def judge(name: str, facts: NodeFacts) -> Verdict | None:
        spec = e.spec(name)
        assert spec is not None
        assert spec.memory_gb is not None
        on_card = spec.device_type == "nvidia"
        if on_card:
            sizes = [gpu.memory_total_bytes for gpu in facts.gpus if gpu.memory_total_bytes is not None]
            if not sizes:
                raise Unread("no card told its memory")
            has = max(sizes)
        else:
            has = facts.memory_total_bytes
        if has >= spec.memory_gb * 1e9 * CLAIM_SHARE:
            return None
        text = f"{name} has {bytes_text(has)} {'on its card' if on_card else 'memory'}, config/cluster.yaml"
        return warn(
            (name,), f"{text} says {spec.memory_gb:g} GB.", person(f"write memory_gb: {has / 1e9:.0f} for {name}")
        )

    yield from each(claimed, judge, good="There is as much memory as config/cluster.yaml says")


@_theme.check("leftover", "Nothing is left of earlier runs")
def leftover(e: Evidence) -> Iterator[Verdict]:
    def judge(name: str, facts: NodeFacts) -> Verdict | None:
        lost = orphans(facts)
        if not lost:
            return None
        pids = ", ".join(str(process["pid"]) for process in lost[:6])
        text = f"{len(lost)} process(es) of an earlier run still live on {name} and nothing watches them: {pids}."
        fix = person(f"look at them with `ps -fp {pids.replace(' ', '')}` on {name}; end them with `kill -TERM PID`")
        return warn((name,), text, fix)

    yield from each(e.facts, judge, good="No process of an earlier run is left")


def orphans(facts: NodeFacts) -> list[dict[str, Any]]:
    """Jupiter's processes whose parent is init although it should be one of ours, and that no node runner looks after.

    Runners and workers live detached on purpose. A rank always has a parent; the holder of a process may lose it, and
    is then adopted by the next node runner of its folder: it is lost only while there is none.
    """
    found = node_fact(facts, "processes")
    processes = [process for process in found if isinstance(process, dict)] if isinstance(found, list) else []
    commands = [str(process.get("command", "")) for process in processes]
    watched = {
        match[2] for command in commands for match in [_OF_RUNNER.search(command)] if match and match[1] != "hold"
    }

    def lost(process: dict[str, Any]) -> bool:
        command = str(process.get("command", ""))
        if process.get("parent") != 1 or process.get("state") == "Z":
            return False
        held = _OF_RUNNER.search(command)
        if held and held[1] == "hold":
            return not any(held[2] == folder or held[2].startswith(f"{folder}/") for folder in watched)
        return held is None and "jupiter_engine.worker.rank" in command

    return [process for process in processes if lost(process)]


@_theme.check("busy", "Nodes have nothing else to do")
def busy(e: Evidence) -> Iterator[Verdict]:
    def judge(name: str, facts: NodeFacts) -> Verdict | None:
        if node_fact(facts, "processes"):
            # Our own work is what the machine is for.
            return None
        if facts.cores and facts.load_1m > facts.cores * BUSY_SHARE and facts.cpu_percent > 100 * BUSY_SHARE:
            text = f"Something else works on {name}: load {facts.load_1m:.1f} on {facts.cores} cores,"
            return info((name,), f"{text} {facts.cpu_percent:.0f} % of the processor in use.")
        if facts.memory_used_bytes > facts.memory_total_bytes * 0.85:
            free = facts.memory_total_bytes - facts.memory_used_bytes
            return warn(
                (name,), f"Only {bytes_text(free)} of {bytes_text(facts.memory_total_bytes)} memory are free on {name}."
            )
        return None

    yield from each(e.facts, judge, good="Nothing else takes much of the machine")


@_theme.check("small-memory", "Memory for a model")
def small_memory(e: Evidence) -> Iterator[Verdict]:
    def judge(name: str, facts: NodeFacts) -> Verdict | None:
        if facts.memory_total_bytes >= 7 * GIB:
            return None
        text = f"{name} has {bytes_text(facts.memory_total_bytes)} memory; the default model trains in about 6 GiB."
        return warn((name,), text, person(f"let {name} generate only: `role: generator`"))

    yield from each(e.facts, judge, good="Memory is enough for the default model")


CHECKS: Final = tuple(_theme.checks)
