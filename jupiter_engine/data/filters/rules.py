"""What can be said of one sample by looking at it and at its source chunk: pure functions, no state."""

from __future__ import annotations

import ast
import re
import warnings
from collections import Counter

from jupiter_engine.data.words import words

_COPY_NGRAM = 8
_REPETITION_NGRAM = 4

# Talk about the answer or the answerer instead of the subject.
_META = re.compile(
    "|".join(
        (
            r"\bas an ai\b|\bai (?:language )?model\b|\bai assistant\b|\blanguage model\b",
            r"\bi'?m sorry\b|\bi apologi[sz]e\b|\bi cannot\b|\bi can'?t (?:help|assist)\b",
            r"\bi'?m (?:here|ready|happy|unable) to\b|\bi(?:'d| would) be happy\b|\bhow can i (?:help|assist)\b",
            r"\blet me know if\b|\bfeel free to\b|\byour (?:next )?question\b|\bhugging face\b",
            r"\b(?:the|this) (?:provided|above) (?:text|passage|document|documentation)\b",
            r"\b(?:the|this) (?:text|passage) (?:above|below|you|explains|describes|is about)\b",
            r"\bhere(?:'s| is) (?:a|an|the|my) (?:question|rewritten|revised|rewrite|possible|summary|conversation)\b",
            r"\b(?:based on|according to) (?:the|this) (?:given )?(?:text|passage|documentation)\b",
        )
    ),
    re.IGNORECASE,
)
_LEFT_OVER = re.compile(
    r"<\|[^|\n]*\|>|\{(?:chunk|title|topic)\}|<the (?:question|answer)>|\[(?:question|answer)\]|^\.\.\.$",
    re.IGNORECASE | re.MULTILINE,
)
_FENCED = re.compile(r"```[ \t]*(?P<language>\w*)[^\n]*\n(?P<body>.*?)(?:```|\Z)", re.DOTALL)
# Words that carry grammar, or that any explanation of software uses whatever its subject.
_FUNCTION_WORDS = frozenset(
    words(
        "a about above after again all also always an and any are as at be because been before being below between "
        "both but by can cannot could did do does doing done each either else even every few first for from further "
        "get gets had has have he her here him his how however i if in into is it its itself just last less let like "
        "made make makes many may me might more most much must my need needs new no nor not now of off often on once "
        "one only or other our out over own same second see she should since so some such than that the their them "
        "then there these they third this those three through thus to too two under until up upon use used useful "
        "uses using very was way we were what when where whether which while who whom whose why will with within "
        "without would yet you your"
    )
)


def has_leftovers(text: str) -> bool:
    """Whether template placeholders or special tokens stand in the text."""
    return _LEFT_OVER.search(text) is not None


def is_meta(text: str) -> bool:
    """Whether the text refuses, offers help or talks about itself instead of the subject."""
    return _META.search(text) is not None


def repetition(text: str) -> float:
    """Share of words that stand inside a word 4-gram that occurs more than once (0 for fewer than 8 words)."""
    found = words(text)
    if len(found) < 2 * _REPETITION_NGRAM:
        return 0.0
    grams = [tuple(found[i : i + _REPETITION_NGRAM]) for i in range(len(found) - _REPETITION_NGRAM + 1)]
    counts = Counter(grams)
    covered = [False] * len(found)
    for start, gram in enumerate(grams):
        if counts[gram] > 1:
            covered[start : start + _REPETITION_NGRAM] = [True] * _REPETITION_NGRAM
    return sum(covered) / len(covered)


def stem(word: str) -> str:
    """A word without a plural or verb ending: enough to see that `returns` is `return`."""
    for ending in ("ings", "ing", "ies", "ed", "es", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def grounding(response: str, chunk_text: str) -> float:
    """Share of the response's distinct content words (stemmed) that occur in the chunk; 0 if there are none."""
    known = {stem(part) for word in words(chunk_text) for part in (word, *word.split("_"))}
    content = {stem(w) for w in words(response) if w not in _FUNCTION_WORDS and len(w) > 1 and not w.isdigit()}
    return sum(word in known for word in content) / len(content) if content else 0.0


def copied(response: str, chunk_text: str) -> float:
    """Share of the response's word 8-grams that stand verbatim in the chunk (0 for fewer than 8 words)."""
    grams = _grams(response)
    known = set(_grams(chunk_text))
    return sum(gram in known for gram in grams) / len(grams) if grams else 0.0


def _grams(text: str) -> list[tuple[str, ...]]:
    found = words(text)
    return [tuple(found[i : i + _COPY_NGRAM]) for i in range(len(found) - _COPY_NGRAM + 1)]


def python_blocks(text: str) -> list[str]:
    """Bodies of the fenced blocks that are Python or unnamed."""
    return [m["body"] for m in _FENCED.finditer(text) if m["language"].lower() in ("", "python", "py", "python3")]


def python_parses(text: str) -> bool:
    """Whether the text holds Python code (in fences) and all of it parses; nothing is run."""
    blocks = [block for block in python_blocks(text) if block.strip()]
    for block in blocks:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                tree = ast.parse(_without_prompts(block))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
        if not tree.body:
            return False
    return bool(blocks)


def _without_prompts(block: str) -> str:
    """An interactive session without its prompts and its output; other code unchanged."""
    if not re.search(r"^>>> ", block, re.MULTILINE):
        return block
    return "\n".join(line[4:] for line in block.splitlines() if line.startswith((">>> ", "... ")))
