"""History in words: one plain sentence a journal entry, for the headless run, the logs and screen readers."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from jupiter_engine.protocol import journal as j
from jupiter_engine.protocol.facts import Progress
from jupiter_engine.units import bytes_text, count_text, duration_text


def sentence(entry: j.AnyEntry) -> str | None:
    """What happened; None for entries that only keep books."""
    match entry:
        case j.CycleCreated():
            return f"cycle {entry.cycle}: created for domain {entry.domain} ({entry.mode})"
        case j.StageStarted():
            again = f", attempt {entry.attempt}" if entry.attempt > 1 else ""
            return f"{entry.stage}: started{again}"
        case j.StageFinished():
            return f"{entry.stage}: done" + (f" - {text}" if (text := result_text(entry.stage, entry.result)) else "")
        case j.StageFailed():
            return f"{entry.stage}: FAILED - {entry.title}: {entry.detail}" + (f" -> {entry.fix}" if entry.fix else "")
        case j.CycleStatus():
            return f"cycle {entry.cycle}: {entry.status} (by {entry.by})"
        case j.CycleWaits():
            return f"cycle {entry.cycle}: waits for a person's {entry.what}"
        case j.CycleFinished():
            return f"cycle {entry.cycle}: finished, candidate {entry.outcome}; report {entry.report}"
        case j.DecisionMade():
            d = entry.decision
            # The worker has noted the evidence sentence by sentence already.
            return f"gate: {d.verdict} (candidate {d.candidate} against {d.incumbent}, look {d.look})"
        case j.DecisionAnswered():
            override = ", against the gate's verdict" if entry.override else ""
            return f"decision: {entry.answer} (by {entry.by}{override})"
        case j.GeneratorActivated():
            return f"generator of {entry.domain} is now {entry.name} ({entry.reason})"
        case j.Noted():
            where = f"{entry.stage}: " if entry.stage else ""
            mark = "" if entry.level == "info" else f"{entry.level}: "
            # Learnt only now: the time at which it happened is part of the news.
            when = f"(at {_clock(entry.happened_at)}) " if entry.happened_at is not None else ""
            return f"{where}{mark}{when}{entry.text}"
        case _:
            return None


def _clock(at: float) -> str:
    return datetime.fromtimestamp(at, tz=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def result_text(stage: str, result: dict[str, Any]) -> str:
    """The numbers of a finished stage in a few words; empty if it has none to tell."""
    get = result.get
    match stage:
        case "prepare":
            return f"base generator {get('model', {}).get('name')}, {count_text(get('parameters', 0))} parameters"
        case "collect":
            reused = ", unchanged since the last collection" if get("reused") else ""
            return (
                f"{get('documents')} documents ({bytes_text(get('bytes', 0))}), {get('chunks')} chunks, "
                f"{get('items')} questions, {bytes_text(get('vault_bytes', 0))} held out in the vault{reused}"
            )
        case "generate":
            return f"{get('samples')} samples, {get('new_tokens')} tokens at {get('tokens_per_s', 0):.0f} tokens/s"
        case "filter":
            rejected = get("rejected", {})
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(rejected.items(), key=lambda x: -x[1]))
            return f"{get('accepted')} accepted, {sum(rejected.values())} rejected" + (
                f" ({reasons})" if reasons else ""
            )
        case "review":
            return f"{get('accepted')} accepted, {get('rejected')} rejected, {get('reviewed')} seen by a person"
        case "queue":
            mix = ", ".join(f"{name} {share:.0%}" for name, share in get("mix", {}).items())
            return f"{get('sequences')} sequences, {count_text(get('tokens', 0))} tokens ({mix})"
        case "train":
            return (
                f"{get('steps')} steps, loss {get('first_loss', 0):.3f} -> {get('last_loss', 0):.3f}, "
                f"{get('tokens_per_s', 0):.0f} tokens/s, model {get('model', {}).get('folder')}"
            )
        case "evaluate":
            units = ", ".join(f"{count} {task}" for task, count in get("units", {}).items())
            return f"{units} for each model" + (f", {get('cached')} from cache" if get("cached") else "")
        case _:
            return ""


def progress_text(stage: str, progress: Progress) -> str:
    """`train: 12/30 steps (40 %), 0.2 steps/s, ETA 1m30s - note`."""
    share = f" ({progress.done / progress.total:.0%})" if progress.total else ""
    rate = f", {progress.rate_per_s:.3g} {progress.unit}/s" if progress.rate_per_s else ""
    eta = f", ETA {duration_text(progress.eta_s)}" if progress.eta_s is not None else ""
    note = f" - {progress.note}" if progress.note else ""
    return f"{stage}: {progress.done:.0f}/{progress.total:.0f} {progress.unit}{share}{rate}{eta}{note}"
