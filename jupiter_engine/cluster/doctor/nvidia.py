"""Checks: machines with NVIDIA cards."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from jupiter_engine.cluster.doctor.evidence import Evidence, node_fact, node_table, tool_refusal, tool_text
from jupiter_engine.cluster.doctor.registry import (
    Theme,
    Unread,
    Verdict,
    by_value,
    each,
    fail,
    info,
    person,
    spread,
    warn,
)
from jupiter_engine.cluster.doctor.software import version
from jupiter_engine.cluster.readers.nvidia import peer_access, xids
from jupiter_engine.protocol.fleet import NodeFacts
from jupiter_engine.units import bytes_text

LEAST_DRIVER: Final = {11: 450, 12: 525, 13: 580}
"""Oldest driver branch for each major CUDA version (NVIDIA's table of minor version compatibility)."""
BROKEN_CARD: Final = frozenset({48, 63, 64, 74, 79, 94, 95, 119, 120})
"""Xids of the card itself: uncorrectable memory, a dead link, fallen off the bus, a firmware that stopped."""
NO_PEERS: Final = re.compile(r"RTX 40\d\d|RTX A6000|RTX 6000 Ada|RTX 50\d\d")
"""Cards without peer access, on which NCCL was seen to hang when it believes otherwise."""
BUSY_SHARE: Final = 0.2

_theme = Theme()


@_theme.check("nvidia-driver", "Driver, CUDA and torch fit together")
def nvidia_driver(e: Evidence) -> Iterator[Verdict]:
    def judge(name: str, facts: NodeFacts) -> Verdict | None:
        if not facts.gpus:
            text = f"{name} should have an NVIDIA card, but nvidia-smi shows none there."
            return fail((name,), text, person(f"install the driver on {name} and see that `nvidia-smi` lists the card"))
        if "torch" not in facts.versions:
            raise Unread("torch is not installed there yet")
        cuda = str(node_table(facts, "packages").get("cuda") or "")
        if not cuda:
            text = f"torch {facts.versions['torch']} on {name} is built without CUDA"
            text += f" and would not use {facts.gpus[0].name}."
            return fail((name,), text, person("install torch from its CUDA index, or write `environment: push`"))
        major, driver = version(cuda)[:1], version(facts.gpus[0].driver)[:1]
        needed = LEAST_DRIVER.get(major[0]) if major else None
        if needed is None or not driver:
            raise Unread(f"no rule for CUDA {cuda} and driver {facts.gpus[0].driver or 'unknown'}")
        if driver[0] < needed:
            text = f"Driver {facts.gpus[0].driver} on {name} is too old for torch {facts.versions['torch']}"
            return fail(
                (name,), f"{text} with CUDA {cuda}: it needs {needed} or later.", person(f"update the driver on {name}")
            )
        return None

    yield from each(e.with_gpus(), judge, good="Driver, CUDA and torch fit together")
    for plan, facts_of in e.groups():
        found = by_value(facts_of, lambda facts: facts.gpus[0].driver if facts.gpus else None)
        if len(found) > 1:
            text = f"The nodes of group {plan.name} have different drivers: {spread(found)}."
            yield info([name for nodes in found.values() for name in nodes], text)


@_theme.check("nvidia-xid", "The driver reports no errors")
def nvidia_xid(e: Evidence) -> Iterator[Verdict]:
    def judge(name: str, facts: NodeFacts) -> Verdict | None:
        journal, dmesg = tool_text(facts, "kernel_log"), tool_text(facts, "dmesg")
        if tool_refusal(facts, "kernel_log") and not (journal and "Xid" in journal):
            # Somebody who may not read the journal is told that it has no entries.
            journal = None
        log = journal if journal and "Xid" in journal else (dmesg or journal)
        if log is None:
            raise Unread("the kernel's log may not be read there")
        found = xids(log)
        if not found:
            return None
        last = found[-1]
        text = f"The driver on {name} reported {len(found)} error(s),"
        text += f" the last of them Xid {last.number} of {last.bus}: {last.text}."
        if any(xid.number in BROKEN_CARD for xid in found):
            return fail(
                (name,), text, person(f"restart {name}; if it comes again, check power and seating of the card")
            )
        return warn((name,), text, person("look the number up in NVIDIA's list of Xid errors"))

    yield from each({n: f for n, f in e.with_gpus().items() if f.gpus}, judge, good="The driver reports no errors")


@_theme.check("nvidia-p2p", "NCCL will not wait for peer access")
def nvidia_p2p(e: Evidence) -> Iterator[Verdict]:
    def judge(name: str, facts: NodeFacts) -> Verdict | None:
        if node_table(facts, "environment").get("NCCL_P2P_DISABLE") == "1":
            return None
        told = tool_text(facts, "nvidia_p2p")
        if told is None:
            raise Unread("nvidia-smi topo gave no answer")
        without = sorted({access.state for access in peer_access(told) if not access.ok})
        known = sorted({gpu.name for gpu in facts.gpus if NO_PEERS.search(gpu.name)})
        if not known and not without:
            return None
        why = f"{known[0]} has no peer access" if known else f"Not all cards reach each other ({', '.join(without)})"
        fix = person(f"put `export NCCL_P2P_DISABLE=1` into the shell's start-up file on {name}")
        return warn((name,), f"{why} on {name}, and NCCL was seen to hang on such machines.", fix)

    several = {name: facts for name, facts in e.with_gpus().items() if len(facts.gpus) > 1}
    yield from each(several, judge, good="NCCL can talk between the cards")


@_theme.check("nvidia-busy", "Nothing else uses the cards")
def nvidia_busy(e: Evidence) -> Iterator[Verdict]:
    def judge(name: str, facts: NodeFacts) -> Verdict | None:
        if node_fact(facts, "processes"):
            return None
        for gpu in facts.gpus:
            if gpu.memory_used_bytes is None or gpu.memory_total_bytes is None:
                raise Unread("the card does not tell its memory")
            if gpu.memory_used_bytes > gpu.memory_total_bytes * BUSY_SHARE:
                used = f"{bytes_text(gpu.memory_used_bytes)} of {bytes_text(gpu.memory_total_bytes)}"
                text = f"{used} of {gpu.name} on {name} are in use, and not by Jupiter."
                return warn((name,), text, person("see `nvidia-smi` for what it is, and end it before training"))
        return None

    with_cards = {name: facts for name, facts in e.with_gpus().items() if facts.gpus}
    yield from each(with_cards, judge, good="The cards are free")


CHECKS: Final = tuple(_theme.checks)
