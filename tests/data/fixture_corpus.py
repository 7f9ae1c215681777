"""A few dozen small Markdown and Python files, the same on every machine."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

_NOUNS = ("buffer", "ledger", "parcel", "signal", "record", "window", "packet", "module", "vector", "matrix")
_VERBS = ("collects", "rotates", "compares", "stores", "removes", "formats", "splits", "merges", "counts", "reverses")
_PLACES = ("harbour", "garden", "archive", "kitchen", "library", "station", "factory", "theatre", "meadow", "quarry")
_HOWS = ("slowly", "twice", "in order", "at night", "by hand", "without delay", "once a week", "from the left")


def words_of(seed: str, count: int) -> str:
    """`count` made-up words: text that no other seed repeats."""
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("bcdfglmnprstv", k=2)) + rng.choice("aeiou") * 2 for _ in range(count))


def topic_page(number: int, functions: int = 6) -> str:
    """A Markdown page with headings, signatures, first sentences and parameter meanings."""
    rng = random.Random(f"page {number}")
    name = f"topic{number:02d}"
    parts = [f"# {name}\n\nThe pages of {name} are about the {rng.choice(_PLACES)} and {words_of(name, 30)}.\n"]
    for index in range(functions):
        noun, verb = rng.choice(_NOUNS), rng.choice(_VERBS)
        tag = hashlib.sha256(f"{number} {index}".encode()).hexdigest()[:5]
        first, second = f"p{tag}", f"{rng.choice(_NOUNS)}_size"
        parts.append(
            f"## {name}.f{tag}{index}({first}, {second}={rng.randrange(2, 99)}{', mode=None' * (index % 2)})\n\n"
            f"The caller {verb} one {noun} {rng.choice(_HOWS)} near the {rng.choice(_PLACES)} "
            f"of {words_of(tag, 3)}.\n\n"
            f"{first} -- the {noun} that is taken from {words_of(tag + 'x', 4)}\n"
            f"{second} -- how much of it is kept for {words_of(tag + 'y', 4)}\n\n"
            f"{words_of(tag + 'z', 40)}.\n"
        )
    return "\n".join(parts)


def module_source(number: int) -> str:
    """A small Python file with documented functions."""
    parts = [f'"""Tools of group {number}: {words_of(f"module {number}", 12)}."""\n']
    for index in range(4):
        tag = f"m{number}_{index}"
        parts.append(
            f"\ndef run_{tag}(value, step={index + 3}):\n"
            f'    """Moves the value along {words_of(tag, 6)}."""\n'
            f"    {tag}_total = value * step + {number * 7 + index}\n"
            f"    return {tag}_total  # {words_of(tag + 'c', 12)}\n"
        )
    return "\n".join(parts)


def write_corpus(folder: Path, *, pages: int = 24, modules: int = 12) -> Path:
    """Write docs/*.md and src/*.py under `folder` and return it."""
    (folder / "docs").mkdir(parents=True, exist_ok=True)
    (folder / "src").mkdir(exist_ok=True)
    for number in range(pages):
        (folder / "docs" / f"topic{number:02d}.md").write_text(topic_page(number), "utf-8")
    for number in range(modules):
        (folder / "src" / f"tools{number:02d}.py").write_text(module_source(number), "utf-8")
    return folder
