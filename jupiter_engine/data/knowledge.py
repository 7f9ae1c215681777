"""What a document states in a regular form: callables with signature and summary, parameter meanings, quoted terms.

Everything found is a verbatim span of the text; nothing is inferred.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from jupiter_engine.protocol.rows import Kind

_HEADING = re.compile(
    r"^#{2,6} +(?P<cls>class +)?(?P<name>[A-Za-z_]\w*(?:\.\w+)*)(?:\((?P<params>[^\n]*)\))?[ \t]*$", re.MULTILINE
)
_ANY_HEADING = re.compile(r"^#{1,6} +\S", re.MULTILINE)
_DEF = re.compile(
    r"^(?P<indent>[ \t]*)(?:async +)?(?P<word>def|class) +(?P<name>\w+)(?:\((?P<params>[^\n]*)\))?[^\n(]*:[ \t]*\n"
    r"[ \t]*[rRuU]?(?P<quote>\"\"\"|''')(?P<doc>.*?)(?P=quote)",
    re.MULTILINE | re.DOTALL,
)
_SENTENCE_END = re.compile(r"(?<=[.!?])(?=\s|$)")
_PARAMETER = re.compile(
    r"^[ \t]*(?:[-*] +|:param +(?:\w+ +)?)?[`'\"*]{0,2}(?P<name>\w+)[`'\"*]{0,2}(?: *\((?P<extra>[^)\n]*)\))?"
    r" *(?:--|:|\u2013) *(?P<meaning>\S[^\n]{11,})$",
    re.MULTILINE,
)
_QUOTED = re.compile(r"(?:``|\"|`)(?P<term>[A-Za-z_][\w.]{2,30}(?:\(\))?)(?:``|\"|`)")
_PARAGRAPH = re.compile(r"\n[ \t]*\n")


@dataclass(frozen=True, kw_only=True)
class Parameter:
    name: str
    default: str | None
    """Source text of the default, None if there is none."""


@dataclass(frozen=True, kw_only=True)
class Callable:
    """A function, method or class with the span of text that names and sums it up."""

    form: Literal["function", "class"]
    qualified: str
    """Dotted name, module or class first."""
    params: str
    """Verbatim text between the parentheses; '' if there is none."""
    parameters: tuple[Parameter, ...]
    summary: str
    """First sentence of the description, whitespace collapsed; '' if it is no usable sentence."""
    heading_start: int
    heading_end: int
    body_end: int
    summary_end: int
    """Character offset after the first sentence (heading_end if there is none)."""

    @property
    def name(self) -> str:
        return self.qualified.rsplit(".", 1)[-1]

    @property
    def owner(self) -> str:
        return self.qualified.rpartition(".")[0]


@dataclass(frozen=True)
class Meaning:
    """A parameter and what the text says it does."""

    parameter: str
    meaning: str
    start: int
    end: int


@dataclass(frozen=True)
class Cloze:
    """A sentence and one term that is set off in it by quotes or backticks."""

    sentence: str
    """Whitespace collapsed."""
    term: str
    start: int
    end: int


def callables(text: str, kind: Kind, title: str) -> list[Callable]:
    """Public callables in order of appearance; in code only those with a one-line signature and a docstring."""
    found = _from_pages(text) if kind == "docs" else _from_code(text, title)
    return [c for c in found if not c.name.startswith("_") or c.name == "__init__"]


def _from_pages(text: str) -> Iterator[Callable]:
    ends = [match.start() for match in _ANY_HEADING.finditer(text)] + [len(text)]
    position = 0
    for match in _HEADING.finditer(text):
        if "." not in match["name"] and match["params"] is None:
            continue  # a plain word as a heading is a section, not a callable
        while ends[position] <= match.start():
            position += 1
        body_end = ends[position]
        summary, summary_end = first_sentence(text, match.end(), body_end)
        yield Callable(
            form="class" if match["cls"] else "function",
            qualified=match["name"],
            params=match["params"] or "",
            parameters=() if match["cls"] else parameters(match["params"] or ""),
            summary=summary,
            heading_start=match.start(),
            heading_end=match.end(),
            body_end=body_end,
            summary_end=summary_end,
        )


def _from_code(text: str, title: str) -> Iterator[Callable]:
    classes: list[tuple[int, str]] = []
    opened = 0
    scan = re.compile(r"^([ \t]*)class +(\w+)", re.MULTILINE)
    scopes = [(m.start(), len(m[1].expandtabs()), m[2]) for m in scan.finditer(text)]
    for match in _DEF.finditer(text):
        indent = len(match["indent"].expandtabs())
        while opened < len(scopes) and scopes[opened][0] < match.start():
            classes = [c for c in classes if c[0] < scopes[opened][1]]
            classes.append((scopes[opened][1], scopes[opened][2]))
            opened += 1
        outer = [c for c in classes if c[0] < indent]
        if (indent and not outer) or len(outer) * 4 < indent:
            continue  # a function inside a function
        doc_start = match.start("doc")
        summary, summary_end = first_sentence(text, doc_start, match.end("doc"))
        is_class = match["word"] == "class"
        yield Callable(
            form="class" if is_class else "function",
            qualified=".".join([title, *(c[1] for c in outer), match["name"]]),
            params=match["params"] or "",
            parameters=() if is_class else parameters(match["params"] or ""),
            summary=summary,
            heading_start=match.start(),
            heading_end=text.index("\n", match.start()),
            body_end=match.end(),
            summary_end=summary_end,
        )


def parameters(params: str) -> tuple[Parameter, ...]:
    """Named parameters of a Python signature, without self and cls; () if it is not Python."""
    try:
        parsed = ast.parse(f"def f({params}): pass").body[0]
    except (SyntaxError, ValueError):
        return ()
    if not isinstance(parsed, ast.FunctionDef):
        return ()
    args = parsed.args
    plain = [*args.posonlyargs, *args.args]
    plain_defaults: list[ast.expr | None] = [None] * (len(plain) - len(args.defaults)) + list(args.defaults)
    pairs = [*zip(plain, plain_defaults, strict=True), *zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    return tuple(
        Parameter(name=arg.arg, default=None if default is None else ast.unparse(default))
        for arg, default in pairs
        if arg.arg not in ("self", "cls")
    )


def first_sentence(text: str, start: int, end: int) -> tuple[str, int]:
    """(first sentence after `start`, whitespace collapsed; its end offset), or ('', start) if there is no clean one."""
    body = text[start:end]
    lead = len(body) - len(body.lstrip())
    paragraph = _PARAGRAPH.split(body[lead:], maxsplit=1)[0]
    match = _SENTENCE_END.search(paragraph)
    stop = match.start() if match else len(paragraph.rstrip())
    sentence = " ".join(paragraph[:stop].split())
    if not 4 <= len(sentence.split()) <= 40 or not sentence[0].isalpha() or ">>>" in sentence or sentence[-1] == "(":
        return "", start
    return sentence, start + lead + stop


def meanings(text: str, entry: Callable) -> list[Meaning]:
    """What the description says of single parameters, e.g. `width -- the longest line`."""
    names = {p.name for p in entry.parameters}
    return [
        Meaning(match["name"], match["meaning"].strip(), match.start(), match.end())
        for match in _PARAMETER.finditer(text, entry.heading_end, entry.body_end)
        if match["name"] in names
    ]


def clozes(text: str) -> list[Cloze]:
    """Prose sentences of 8 to 45 words in which exactly one occurrence of a set-off term stands."""
    found: list[Cloze] = []
    offset = 0
    for paragraph in re.split(r"(\n[ \t]*\n)", text):
        if paragraph.strip() and not paragraph.startswith(("   ", "#", ">>>", "\t")) and "::=" not in paragraph:
            found.extend(_sentences_with_term(paragraph, offset))
        offset += len(paragraph)
    return found


def _sentences_with_term(paragraph: str, offset: int) -> Iterator[Cloze]:
    start = 0
    for end in [match.start() for match in _SENTENCE_END.finditer(paragraph)]:
        raw = paragraph[start:end]
        lead = len(raw) - len(raw.lstrip())
        sentence = " ".join(raw.split())
        if 8 <= len(sentence.split()) <= 45 and sentence[0].isupper():
            for match in _QUOTED.finditer(sentence):
                if len(re.findall(rf"(?<!\w){re.escape(match['term'])}(?!\w)", sentence)) == 1:
                    yield Cloze(sentence, match["term"], offset + start + lead, offset + end)
        start = end
