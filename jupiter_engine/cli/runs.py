"""runs: all cycles, one cycle's report, and its training compared, exported or shown again."""

from __future__ import annotations

import argparse
import csv
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from jupiter_engine.api import Comparison, RunSummary, Workspace, compare_runs, sentence
from jupiter_engine.cli.output import open_workspace, print_json, print_table
from jupiter_engine.errors import ExitCode, StageFailed, UsageError
from jupiter_engine.files import write_atomic
from jupiter_engine.protocol.facts import Metric
from jupiter_engine.protocol.state import CycleState
from jupiter_engine.units import bytes_text, count_text, duration_text, plain_text

LONGEST_PAUSE_S: Final = 5.0
"""Of a replay: a night in which nothing happened need not be waited for again."""


def runs(options: argparse.Namespace) -> int:
    """`runs`, `runs CYCLE`, `runs compare A B`, `runs export CYCLE FILE`, `runs replay CYCLE`."""
    workspace = open_workspace(options)
    verb, words = "", list(options.words)
    if words and words[0] in ("compare", "export", "replay"):
        verb = words.pop(0)
    wanted = {"": (0, 1), "compare": (2, 2), "export": (2, 2), "replay": (1, 1)}[verb]
    if not wanted[0] <= len(words) <= wanted[1]:
        raise UsageError(
            f"`{f'runs {verb}'.strip()}` takes {' or '.join(map(str, dict.fromkeys(wanted)))} names, not {len(words)}",
            fix="`runs [CYCLE]`, `runs compare CYCLE CYCLE`, `runs export CYCLE FILE` or `runs replay CYCLE`",
        )
    match verb:
        case "compare":
            return _compare(workspace, options, words)
        case "export":
            return _export(workspace, options, words[0], Path(words[1]))
        case "replay":
            return _replay(workspace, options, words[0])
    return _report(workspace, options, words[0]) if words else _list(workspace, options)


def _cycle(workspace: Workspace, name: str) -> CycleState:
    cycle = workspace.state.cycles.get(name)
    if cycle is None:
        raise UsageError(f"there is no cycle {name!r}", fix="`jupiter runs` lists all cycles")
    return cycle


def _metrics(workspace: Workspace, cycle: CycleState) -> list[Metric]:
    """Every optimizer step of a cycle's training, once, in order."""
    found, _ = workspace.metrics(cycle.stages["train"].run or f"{cycle.id}-train")
    steps = {metric.step: metric for metric in found}
    if not steps:
        raise UsageError(f"cycle {cycle.id} has not trained a step", fix="`jupiter status` shows where cycles stand")
    return [steps[step] for step in sorted(steps)]


def _list(workspace: Workspace, options: argparse.Namespace) -> int:
    cycles = [c for c in workspace.state.cycles.values() if options.domain in (None, c.domain)]
    if options.json:
        print_json(cycles)
        return ExitCode.DONE
    rows = []
    for c in cycles:
        ended = c.ended_at
        verdict = c.decision.verdict if c.decision else "-"
        took = duration_text(ended - c.created_at) if ended else "-"
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(c.created_at))
        rows.append((c.id, c.status, verdict, c.outcome or "-", when, took))
    print_table(("cycle", "status", "gate", "outcome", "started", "took"), rows)
    return ExitCode.DONE


def _report(workspace: Workspace, options: argparse.Namespace, name: str) -> int:
    cycle = _cycle(workspace, name)
    if options.json:
        print_json(cycle)
    elif cycle.report:
        print(plain_text(Path(cycle.report).read_text(encoding="utf-8")))
    else:
        print(f"cycle {cycle.id} is {cycle.status}; its report comes at its end")
    return ExitCode.DONE


# -- compare -------------------------------------------------------------------------------------------
ROWS: Final[tuple[tuple[str, Callable[[RunSummary], str]], ...]] = (
    ("steps", lambda s: f"{s.steps:,}"),
    ("trained tokens", lambda s: f"{s.tokens:,}"),
    ("time of the steps", lambda s: duration_text(s.seconds)),
    ("tokens/s, median", lambda s: count_text(s.tokens_per_s)),
    ("first loss", lambda s: f"{s.first_loss:.4f}"),
    ("last loss", lambda s: f"{s.last_loss:.4f}"),
    (
        "lowest held-out loss",
        lambda s: "-" if s.held_out_loss is None else f"{s.held_out_loss:.4f} (step {s.held_out_step})",
    ),
    ("most memory of a rank", lambda s: "-" if s.peak_bytes is None else bytes_text(s.peak_bytes)),
    ("MFU, median", lambda s: "-" if s.mfu is None else f"{s.mfu:.1%}"),
    ("ranks' time lost to waiting", lambda s: "-" if s.waiting_share is None else f"{s.waiting_share:.1%}"),
)


def _compare(workspace: Workspace, options: argparse.Namespace, names: Sequence[str]) -> int:
    a, b = (_cycle(workspace, name) for name in names)
    found = compare_runs(_metrics(workspace, a), _metrics(workspace, b), a.settings, b.settings)
    if options.json:
        print_json(found)
        return ExitCode.DONE
    print_table(("", a.id, b.id), [(label, shown(found.a), shown(found.b)) for label, shown in ROWS])
    print()
    if found.curve:
        print("loss after as many trained tokens (mean of the steps around):")
        print_table(("tokens", a.id, b.id, "difference"), list(_curve_rows(found)))
    else:
        print("the runs have no trained tokens in common")
    print()
    if found.differing:
        print("settings that differ:")
        print_table(("key", a.id, b.id), [(key, *values) for key, values in found.differing.items()])
    else:
        print("the settings are the same")
    return ExitCode.DONE


def _curve_rows(found: Comparison) -> Iterator[tuple[str, str, str, str]]:
    for place in found.curve:
        yield f"{place.tokens:,}", f"{place.a:.4f}", f"{place.b:.4f}", f"{place.b - place.a:+.4f}"


# -- export --------------------------------------------------------------------------------------------
FORMATS: Final = {".csv": "csv", ".jsonl": "jsonl", ".json": "jsonl"}


def _export(workspace: Workspace, options: argparse.Namespace, name: str, target: Path) -> int:
    metrics = _metrics(workspace, _cycle(workspace, name))
    form = options.format or FORMATS.get(target.suffix.lower())
    if form is None:
        raise UsageError(
            f"the name {target.name} does not say in which form",
            fix="end it with .csv or .jsonl, or give --format csv, jsonl or tensorboard",
        )
    if form == "tensorboard":
        _tensorboard(metrics, target)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        text = csv_text(metrics) if form == "csv" else jsonl_text(metrics)
        write_atomic(target, text.encode())
    if options.json:
        print_json({"cycle": name, "format": form, "target": str(target.absolute()), "steps": len(metrics)})
    else:
        print(f"wrote {len(metrics)} steps of {name} to {target}")
    return ExitCode.DONE


def jsonl_text(metrics: Sequence[Metric]) -> str:
    """One object a step, as in metrics.jsonl."""
    return "".join(msgspec.json.encode(metric).decode() + "\n" for metric in metrics)


def csv_text(metrics: Sequence[Metric]) -> str:
    """One line a step; what ranks report apart has a column a rank, such as rank_seconds.0. Unknown is empty."""
    rows = [_flat(metric) for metric in metrics]
    columns: dict[str, None] = {}
    for row in rows:
        columns.update(dict.fromkeys(row))
    out = io.StringIO()
    writer = csv.DictWriter(out, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _flat(metric: Metric) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in msgspec.to_builtins(metric).items():
        if isinstance(value, list | tuple):
            row.update({f"{key}.{rank}": inner for rank, inner in enumerate(value)})
        else:
            row[key] = value
    return row


def _tensorboard(metrics: Sequence[Metric], target: Path) -> None:
    """The writer's library loads numpy, so it works in a process of its own."""
    argv = [sys.executable, "-m", "jupiter_engine.worker.tensorboard", str(target.absolute())]
    done = subprocess.run(argv, input=jsonl_text(metrics), capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode != 0:
        words = plain_text(done.stderr or done.stdout).strip().splitlines()
        raise StageFailed(words[-1] if words else "no reason was given", title="The export failed")


# -- replay --------------------------------------------------------------------------------------------
def _replay(workspace: Workspace, options: argparse.Namespace, name: str) -> int:
    """Everything that happened in a cycle again, in its order and its rhythm, `--speed` times as fast."""
    cycle = _cycle(workspace, name)
    if options.speed <= 0:
        raise UsageError(f"--speed is {options.speed:g}", fix="give a number above 0, such as 60 for an hour a minute")
    before: float | None = None
    for at, text, record in _history(workspace, cycle):
        if before is not None:
            time.sleep(min(LONGEST_PAUSE_S, max(0.0, at - before) / options.speed))
        before = at
        if options.json:
            print_json({"at": at, **record})
        else:
            print(f"{time.strftime('%H:%M:%S', time.localtime(at))}  {text}", flush=True)
    return ExitCode.DONE


def _history(workspace: Workspace, cycle: CycleState) -> list[tuple[float, str, dict[str, Any]]]:
    """(time, words, record) of journal entries and optimizer steps of a cycle, by time."""
    found: list[tuple[float, str, dict[str, Any]]] = [
        (recorded.at, text, msgspec.to_builtins(recorded.entry))
        for recorded in workspace.entries()
        if getattr(recorded.entry, "cycle", None) == cycle.id and (text := sentence(recorded.entry))
    ]
    run = cycle.stages["train"].run or f"{cycle.id}-train"
    steps = {metric.step: metric for metric in workspace.metrics(run)[0]}
    found += [(metric.at, _step_text(metric), msgspec.to_builtins(metric)) for metric in steps.values()]
    return sorted(found, key=lambda event: event[0])


def _step_text(metric: Metric) -> str:
    held_out = f"  held out {metric.held_out_loss:.4f}" if metric.held_out_loss is not None else ""
    return (
        f"train: step {metric.step}  loss {metric.loss:.4f}{held_out}  rate {metric.learning_rate:.2e}  "
        f"norm {metric.grad_norm:.3g}  {count_text(metric.tokens_per_s)} tokens/s"
    )
