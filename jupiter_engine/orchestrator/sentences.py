"""History in words: one plain sentence a journal entry, for the headless run, the logs and screen readers."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from jupiter_engine.orchestrator import results
from jupiter_engine.orchestrator.results import told
from jupiter_engine.protocol import journal as j
from jupiter_engine.protocol.facts import Progress
from jupiter_engine.units import bytes_text, count_text, duration_text, plain_text


def sentence(entry: j.AnyEntry) -> str | None:
    """What happened, safe for a terminal; None for entries that only keep books."""
    text = _sentence(entry)
    return None if text is None else plain_text(text)


def _sentence(entry: j.AnyEntry) -> str | None:
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
    """As the clock on the wall here; a time that no clock shows is unknown."""
    try:
        return datetime.fromtimestamp(at, tz=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return "an unknown time"


def one_line(text: str) -> str:
    """Another machine's words as part of a line on a terminal."""
    return " ".join(plain_text(text).split())


def reasons_text(rejected: dict[str, int]) -> str:
    """`too_short 3, copy 1`, the most frequent first."""
    return ", ".join(f"{reason} {count}" for reason, count in sorted(rejected.items(), key=lambda x: -x[1]))


def mix_text(mix: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in mix.items())


def result_text(stage: str, result: dict[str, Any]) -> str:
    """The numbers of a finished stage in a few words; empty if it has none to tell, or none of the expected form."""
    return one_line(_told_text(told(stage, result)))


def _told_text(one: results.Told | None) -> str:
    match one:
        case results.Prepared():
            return f"base generator {one.model.name}, {count_text(one.parameters)} parameters"
        case results.Collected():
            reused = ", unchanged since the last collection" if one.reused else ""
            return (
                f"{one.documents} documents ({bytes_text(one.bytes)}), {one.chunks} chunks, "
                f"{one.items} questions, {bytes_text(one.vault_bytes)} held out in the vault{reused}"
            )
        case results.Generated():
            return f"{one.samples} samples, {one.new_tokens} tokens at {one.tokens_per_s:.0f} tokens/s"
        case results.Filtered():
            reasons = f" ({reasons_text(one.rejected)})" if one.rejected else ""
            return f"{one.accepted} accepted, {sum(one.rejected.values())} rejected{reasons}"
        case results.Reviewed():
            return f"{one.accepted} accepted, {one.rejected} rejected, {one.reviewed} seen by a person"
        case results.Queued():
            return f"{one.sequences} sequences, {count_text(one.tokens)} tokens ({mix_text(one.mix)})"
        case results.Trained():
            return (
                f"{one.steps} steps, loss {one.first_loss:.3f} -> {one.last_loss:.3f}, "
                f"{one.tokens_per_s:.0f} tokens/s, model {one.model.folder}"
            )
        case results.Evaluated():
            units = ", ".join(f"{count} {task}" for task, count in one.units.items())
            return f"{units} for each model" + (f", {one.cached} from cache" if one.cached else "")
        case None:
            return ""


def progress_text(stage: str, progress: Progress) -> str:
    """`train: 12/30 steps (40 %), 0.2 steps/s, ETA 1m30s - note`; safe for a terminal, whoever wrote it."""
    unit = one_line(progress.unit)
    share = f" ({progress.done / progress.total:.0%})" if progress.total else ""
    rate = f", {progress.rate_per_s:.3g} {unit}/s" if progress.rate_per_s else ""
    eta = f", ETA {duration_text(progress.eta_s)}" if progress.eta_s is not None else ""
    note = f" - {text}" if (text := one_line(progress.note)) else ""
    return f"{stage}: {progress.done:.0f}/{progress.total:.0f} {unit}{share}{rate}{eta}{note}"
