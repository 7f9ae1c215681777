"""plan: what a cycle will do, from the settings, and how long, from what was measured here before."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import msgspec

from jupiter_engine.api import Workspace
from jupiter_engine.cli.output import open_workspace, print_json
from jupiter_engine.cluster.placement import require_duties
from jupiter_engine.errors import ExitCode
from jupiter_engine.protocol.state import CycleState
from jupiter_engine.settings.cluster import launch_spec
from jupiter_engine.settings.domain import DomainSettings, check_paths
from jupiter_engine.units import duration_text


def plan(options: argparse.Namespace) -> int:
    workspace = open_workspace(options)
    loaded = workspace.domain(options.domain)
    check_paths(loaded)
    cluster = workspace.cluster().value
    require_duties(cluster)
    settings = loaded.value
    launch = launch_spec(cluster)
    steps = _steps(settings)
    durations = measured_durations(workspace, options.domain, settings)
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
                "warnings": loaded.warnings,
            }
        )
        return ExitCode.DONE
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
    for warning in loaded.warnings:
        print(f"warning: {warning}")
    return ExitCode.DONE


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
