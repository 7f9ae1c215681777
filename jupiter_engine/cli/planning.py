"""plan: what a cycle will do and how long, and whether its training fits the machines and what it costs."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from jupiter_engine.api import Workspace
from jupiter_engine.cli.output import open_workspace, print_json
from jupiter_engine.cli.plan_text import print_outlook
from jupiter_engine.cluster.placement import place, require_duties
from jupiter_engine.errors import ExitCode, UsageError
from jupiter_engine.orchestrator.planner import question_of, remember_devices
from jupiter_engine.planning.budget import device_of
from jupiter_engine.protocol.fleet import NodeFacts
from jupiter_engine.protocol.state import CycleState
from jupiter_engine.settings.cluster import ClusterSettings, launch_spec, node_by_name, node_twin
from jupiter_engine.settings.domain import DomainSettings, check_paths
from jupiter_engine.units import duration_text, plain_text


def plan(options: argparse.Namespace) -> int:
    workspace = open_workspace(options)
    loaded = workspace.domain(options.domain)
    check_paths(loaded)
    cluster = workspace.cluster().value
    require_duties(cluster)
    settings = loaded.value
    tokens = _count(options.tokens) if options.tokens is not None else None
    measured = asyncio.run(_ask_machines(workspace, cluster))
    problems: tuple[str, ...] = ()
    if options.calibrate:
        problems = _calibrate(workspace, options, cluster, measured, tokens)
    answer = workspace.outlook(options.domain, preset=options.model, tokens=tokens, facts=measured)
    launch = launch_spec(cluster)
    steps = _steps(settings)
    durations = measured_durations(workspace, options.domain, settings)
    status = ExitCode.NO_NODE if answer.fits is False else ExitCode.DONE
    if options.json:
        known = [d for d in durations.values() if d is not None]
        print_json(
            {
                "domain": options.domain,
                "settings": settings,
                "launch": launch,
                "stages": steps,
                "expected_seconds": durations,
                "expected_total_seconds": sum(known) if len(known) == len(durations) else None,
                "training": answer,
                "not_measured": problems,
                "warnings": loaded.warnings,
            }
        )
        return status
    print(f"domain {options.domain}: {settings.domain.description}")
    print(f"trains with {launch.twin}, {launch.ranks} rank(s), started by {launch.launcher}")
    for stage, text in steps.items():
        expected = durations.get(stage)
        shown = f"about {duration_text(expected)}" if expected is not None else ""
        print(f"  {stage:<9} {text}" + (f"  [{shown}]" if shown else ""))
    if any(d is None for d in durations.values()):
        print("durations appear once a cycle of this domain has been measured on this machine")
    else:
        print(f"whole cycle: about {duration_text(sum(d or 0.0 for d in durations.values()))}")
    print_outlook(answer, f"{options.model} from scratch" if options.model else f"the {options.domain} model")
    for warning in (*loaded.warnings, *problems):
        print(f"warning: {warning}")
    return status


def _count(text: str) -> int:
    """2e9, 500M, 20_000 -> a number of tokens; UsageError for anything else."""
    units = {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9, "t": 1e12}
    factor = units.get(text[-1:].lower(), 1.0)
    try:
        count = float(text[:-1] if factor != 1.0 else text) * factor
    except ValueError:
        count = 0.0
    if not 1 <= count <= 1e15:
        raise UsageError(f"--tokens is {text!r}; write a number such as 20000000, 2e9 or 500M")
    return int(count)


async def _ask_machines(workspace: Workspace, cluster: ClusterSettings) -> dict[str, NodeFacts]:
    """What the training machines say of themselves now; this machine is looked at anyway. Kept for later plans."""
    placement = place("train", cluster)
    if all(node.is_local() for node in placement.nodes):
        return {}
    from jupiter_engine.cluster.fleet import Fleet  # ssh is loaded only where another machine is asked

    fleet = Fleet(cluster, workspace.root)
    async with fleet.opened():
        _say(f"asking {len(placement.nodes)} machine(s)")
        await fleet.refresh_facts()
        found = {node.name: node for node in fleet.picture().nodes}
    facts: dict[str, NodeFacts] = {}
    for node in placement.nodes:
        status = found.get(node.title())
        if status is None or status.facts is None:
            _say(f"{node.title()} does not answer; it counts as it said last, or as config/cluster.yaml describes it")
            continue
        if not node.is_local():
            facts[node.title()] = status.facts
    remember_devices(
        workspace.root,
        {
            name: device_of(one, twin=node_twin(cluster, node_by_name(cluster, name)), name=name)
            for name, one in facts.items()
        },
    )
    return facts


def _calibrate(
    workspace: Workspace,
    options: argparse.Namespace,
    cluster: ClusterSettings,
    facts: dict[str, NodeFacts],
    tokens: int | None,
) -> tuple[str, ...]:
    """Measure the machines; returns sentences on those that could not be."""
    if options.seconds <= 0 or options.seconds != options.seconds:
        raise UsageError(f"--seconds must be more than 0, not {options.seconds:g}")
    busy = next((c for c in workspace.state.cycles.values() if c.active()), None)
    if busy is not None and workspace.engine() is not None:
        raise UsageError(
            f"cycle {busy.id} is at work, so nothing could be measured soundly",
            fix="`jupiter pause` it first, or calibrate later",
        )
    from jupiter_engine.orchestrator.calibrating import calibrate
    from jupiter_engine.orchestrator.engine import fleet_stages

    settings = workspace.domain(options.domain).value
    question = question_of(
        workspace.root,
        workspace.state,
        options.domain,
        settings,
        cluster,
        facts=facts,
        preset=options.model,
        tokens=tokens,
    )
    _, problems = asyncio.run(
        calibrate(
            workspace.root,
            options.domain,
            cluster,
            question,
            seconds=options.seconds,
            stages=lambda: fleet_stages(workspace.root),
            say=_say,
        )
    )
    return problems


def _say(text: str) -> None:
    """Progress, for people; standard output is for the plan."""
    print(plain_text(text), file=sys.stderr, flush=True)


def _steps(s: DomainSettings) -> dict[str, str]:
    """What each stage will do, in words, from the settings alone."""
    tokens = s.training.steps * s.training.batch_sequences * s.training.sequence_tokens
    sources = ", ".join(f"{x.id} ({x.type})" for x in s.sources)
    e = s.evaluation
    spent = f"{s.gate.alpha:.3f} spent over looks"
    return {
        "collect": f"sources: {sources}; {e.vault_share:.0%} held out in {e.slices} vault slices",
        "generate": f"{s.generation.samples} samples of up to {s.generation.max_new_tokens} tokens",
        "review": f"{s.review.mode}",
        "train": f"{s.training.steps} steps, {tokens} tokens",
        "evaluate": (
            f"{e.windows} windows, {e.mcq_known}+{e.mcq_vault} questions, {e.fitness_chunks} generations, each model"
        ),
        "gate": f"primary {s.gate.primary}, error budget {spent}",
    }


WORK: dict[str, Callable[[DomainSettings], float]] = {
    "collect": lambda _: 1.0,
    "generate": lambda s: s.generation.samples * s.generation.max_new_tokens,
    "train": lambda s: s.training.steps * s.training.batch_sequences * s.training.sequence_tokens,
    "evaluate": lambda s: (
        s.evaluation.windows + s.evaluation.mcq_known + s.evaluation.mcq_vault + s.evaluation.fitness_chunks
    ),
}
"""Amount of work of the long stages, in the unit that its time grows with."""


def measured_durations(workspace: Workspace, domain: str, settings: DomainSettings) -> dict[str, float | None]:
    """Seconds each long stage would take: the last measured stage scaled by its amount of work; None if unmeasured."""
    durations: dict[str, float | None] = dict.fromkeys(WORK)
    for cycle in workspace.state.cycles.values():
        if cycle.domain != domain:
            continue
        before = _settings(cycle)
        for stage in WORK:
            took = _seconds(cycle, stage)
            amount = WORK[stage](before) if before is not None else 0.0
            if took is not None and amount > 0:
                durations[stage] = took * WORK[stage](settings) / amount
    return durations


def _settings(cycle: CycleState) -> DomainSettings | None:
    try:
        return msgspec.convert(cycle.settings, DomainSettings)
    except msgspec.ValidationError:
        return None  # written by an earlier version: its times cannot be scaled


def _seconds(cycle: CycleState, stage: str) -> float | None:
    s: Any = cycle.stages[stage]
    # A stage of several attempts also counts the time in which nobody worked.
    if s.status != "done" or s.attempt != 1 or s.started_at is None or s.ended_at is None:
        return None
    return float(s.ended_at - s.started_at)
