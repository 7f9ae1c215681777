"""A domain's settings as a person reads them."""

from __future__ import annotations

from typing import Any

from jupiter_engine.protocol.state import CycleState, State
from jupiter_engine.units import bytes_text, count_text, duration_text
from jupiter_tui.view.picture import DomainFile
from jupiter_tui.view.text import Line, cut_line, mark, number, one_line, pad, pairs, rule, wrap
from jupiter_tui.view.train import result_of


def domain_rows(domains: tuple[DomainFile, ...], state: State, cursor: int, width: int) -> list[Line]:
    """One line a domain: mark, name, cycles, what is wrong."""
    lines: list[Line] = []
    for index, domain in enumerate(domains):
        cycles = sum(c.domain == domain.name for c in state.cycles.values())
        note = (
            f"{len(domain.problems)} problems" if domain.problems else f"{cycles} cycles" if cycles else "no cycle yet"
        )
        chosen = index == cursor
        line: Line = [("> " if chosen else "  ", "accent"), mark("bad" if domain.problems else "ok"), (" ", "")]
        line += [
            (pad(domain.name, 13), "cursor" if chosen else "bold"),
            (f" {note}", "bad" if domain.problems else "dim"),
        ]
        lines.append(cut_line(line, width))
    return lines or [[("no domain yet: n makes one", "dim")]]


def domain_lines(domain: DomainFile, last: CycleState | None, width: int) -> list[Line]:
    """Problems first; else description, sources, what one cycle will do, gate, and all settings."""
    lines: list[Line] = [[(domain.name, "bold"), (f"  {domain.path}", "dim")]]
    if domain.problems:
        lines += [[], [mark("bad"), (f" not accepted: {len(domain.problems)} problems (e opens the file)", "bad")]]
        for problem in domain.problems:
            lines += [[], *wrap(problem, width)]
        return [cut_line(line, width) for line in lines]
    settings: dict[str, Any] = dict(domain.settings or {})
    info = settings.get("domain", {})
    lines += wrap(str(info.get("description", "")), width)
    for warning in domain.warnings:
        lines += [[("** ", "warn"), (one_line(warning), "warn")]]
    lines += [[], rule("Sources", width), *source_lines(settings.get("sources", ()))]
    lines += [[], rule("One cycle", width), *plan_lines(settings, last)]
    lines += [[], rule("Gate", width), *gate_lines(settings.get("gate", {}))]
    lines += [[], rule("All settings", width), *tree_lines(settings)]
    return [cut_line(line, width) for line in lines]


def source_lines(sources: Any) -> list[Line]:
    lines: list[Line] = []
    for source in sources:
        where = source.get("path") or ", ".join(source.get("parts", ()))
        limit = f", at most {bytes_text(source['max_bytes'])}" if source.get("max_bytes") else ""
        about = f"{source.get('type')}: {where}{limit}"
        about += f", licence {source.get('license')}, weight {number(source.get('weight'))}"
        lines.append([(pad(one_line(str(source.get("id", ""))), 16), "bold"), (one_line(about), "")])
    return lines


def plan_lines(settings: dict[str, Any], last: CycleState | None) -> list[Line]:
    """What a cycle will do in numbers, and how long the last one took."""
    generation, recipe = settings.get("generation", {}), settings.get("training", {})
    tokens = recipe.get("steps", 0) * recipe.get("batch_sequences", 0) * recipe.get("sequence_tokens", 0)
    batch = f"{recipe.get('batch_sequences')} x {recipe.get('sequence_tokens')}"
    mix = settings.get("mix", {})
    review = settings.get("review", {})
    rows = [
        ("generate", f"{generation.get('samples')} samples, up to {generation.get('max_new_tokens')} tokens each"),
        ("review", _review_words(review)),
        (
            "train",
            f"{recipe.get('steps')} steps of {batch} tokens = {count_text(tokens)} tokens",
        ),
        ("start from", str(recipe.get("start"))),
        ("mix", ", ".join(f"{k.replace('_', ' ')} {number(v)}" for k, v in mix.items())),
    ]
    if last is not None and last.ended_at is not None:
        rows.append(("last cycle", f"took {duration_text(last.ended_at - last.created_at)} here"))
        speed = result_of(last, "train", "tokens_per_s")
        if speed:
            rows.append(
                ("training", f"about {duration_text(tokens / speed)} at the last cycle's {count_text(speed)} tokens/s")
            )
    return pairs(rows)


def _review_words(review: dict[str, Any]) -> str:
    mode = review.get("mode", "auto")
    return {
        "auto": "none: the filters decide",
        "manual": "a person sees every sample",
        "sample": f"a person sees {float(review.get('share') or 0):.0%} of the samples",
    }.get(mode, str(mode))


def gate_lines(gate: dict[str, Any]) -> list[Line]:
    return pairs(
        [(key.replace("_", " "), number(v) if isinstance(v, (int, float)) else str(v)) for key, v in gate.items()]
    )


def tree_lines(value: Any, depth: int = 0) -> list[Line]:
    """A nested mapping as indented `key: value` lines."""
    lines: list[Line] = []
    lead = "  " * depth
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            lines += [[(f"{lead}{key}", "accent")], *tree_lines(inner, depth + 1)]
        elif isinstance(inner, (list, tuple)) and any(isinstance(i, dict) for i in inner):
            lines.append([(f"{lead}{key}", "accent")])
            for index, item in enumerate(inner, 1):
                lines += [[(f"{lead}  {index}.", "dim")], *tree_lines(item, depth + 2)]
        elif inner not in (None, (), [], ""):
            shown = ", ".join(map(str, inner)) if isinstance(inner, (list, tuple)) else str(inner)
            lines.append([(f"{lead}{key}: ", "dim"), (one_line(shown), "")])
    return lines
