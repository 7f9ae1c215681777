"""Item makers: each turns one stated fact into a question, its answer and where that stands."""

from __future__ import annotations

import re
from collections.abc import Callable as Function
from collections.abc import Iterator
from dataclasses import dataclass

from jupiter_engine.data import knowledge
from jupiter_engine.data.knowledge import Callable
from jupiter_engine.protocol.rows import Document

Span = tuple[int, int]


def _any_answer(_option: str) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Draft:
    """An item that still lacks its distractors."""

    maker: str
    document: Document
    question: str
    answer: str
    type: str
    """Only answers (and alternatives) of one type are options of each other."""
    groups: tuple[str, ...]
    """Where to look for siblings first, nearest first; the whole pool comes last by itself."""
    spans: tuple[Span, ...]
    """Character spans of the document that hold the answer; the first inside one chunk is the evidence."""
    alternatives: tuple[str, ...] = ()
    """Further wrong options of the same type from the same place."""
    asks: str = ""
    """What is asked, apart from the place: answers to drafts of the same maker and `asks` are no wrong options."""
    accepts: Function[[str], bool] = _any_answer
    """Whether an option is certainly wrong and does not give itself away."""


def drafts(document: Document, text: str) -> Iterator[Draft]:
    """Drafts of all makers, in order of appearance."""
    for entry in knowledge.callables(text, document.kind, document.title):
        yield from _purpose(document, entry)
        yield from _signature(document, entry)
        yield from _default(document, entry)
        yield from _module(document, entry)
        yield from _parameter(document, entry)
        yield from _class(document, entry)
        yield from _option(document, entry, text)
        yield from _base(document, entry)
    if document.kind == "docs":
        yield from _cloze(document, text)


def _spans(entry: Callable) -> tuple[Span, ...]:
    return ((entry.heading_start, entry.summary_end), (entry.heading_start, entry.heading_end))


def _word(entry: Callable) -> str:
    if entry.form == "class":
        return "class"
    return "method" if _owner_is_class(entry) else "function"


def _owner_is_class(entry: Callable) -> bool:
    last = entry.owner.rpartition(".")[2]
    return last[:1].isupper() or entry.params.startswith(("self", "cls"))


def _gives_away(name: str, sentence: str) -> bool:
    """Whether a sentence contains the name or a telling part of it (four letters or more)."""
    low = sentence.lower()
    parts = [part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)]
    return name.lower() in low or any(len(part) >= 4 and part in low for part in parts)


def _purpose(document: Document, entry: Callable) -> Iterator[Draft]:
    """Name from summary, and summary from name; both ways only where neither contains the other."""
    if not entry.summary or entry.name == "__init__" or _gives_away(entry.name, entry.summary):
        return
    word, place = _word(entry), "class" if _owner_is_class(entry) else "module"
    yield Draft(
        maker="purpose",
        document=document,
        question=f'Which {word} of the {place} {entry.owner} is described as: "{entry.summary}"',
        answer=entry.name,
        asks=entry.summary,
        type=f"{word} name",
        groups=(f"owner {entry.owner}", f"document {document.id}"),
        spans=(_spans(entry)[0],),
        accepts=lambda option: not _gives_away(option, entry.summary),
    )
    yield Draft(
        maker="summary",
        document=document,
        question=f"How does the documentation describe the {word} {entry.qualified}?",
        answer=entry.summary,
        type=f"{word} summary",
        groups=(f"owner {entry.owner}", f"document {document.id}"),
        spans=((entry.heading_start, entry.summary_end), (entry.heading_end, entry.summary_end)),
        accepts=lambda option: not _gives_away(entry.name, option),
    )


def _signature(document: Document, entry: Callable) -> Iterator[Draft]:
    if not entry.parameters or len(entry.params) > 120:
        return
    word = "constructor" if entry.name == "__init__" else _word(entry)
    name = entry.owner if entry.name == "__init__" else entry.qualified
    yield Draft(
        maker="signature",
        document=document,
        question=f"What are the parameters of the {word} {name}?",
        answer=f"({entry.params})",
        type="method signature" if entry.params.startswith(("self", "cls")) else "signature",
        groups=(f"owner {entry.owner}", f"document {document.id}"),
        spans=_spans(entry)[1:],
    )


def _default(document: Document, entry: Callable) -> Iterator[Draft]:
    for parameter in entry.parameters:
        kind = _literal_kind(parameter.default)
        if kind and parameter.default:
            name = entry.owner if entry.name == "__init__" else entry.qualified
            yield Draft(
                maker="default",
                document=document,
                question=f"What is the default value of the parameter {parameter.name} of {name}?",
                answer=parameter.default,
                type=f"default {kind}",
                groups=(f"owner {entry.owner}", f"document {document.id}"),
                spans=_spans(entry)[1:],
            )


def _literal_kind(default: str | None) -> str:
    """Type of a telling default; '' for None, True and False, which most parameters have."""
    if default is None or default in ("None", "True", "False", "()", "[]", "{}", "''", "b''", "..."):
        return ""
    if re.fullmatch(r"-?[\d.]+(?:e-?\d+)?", default):
        return "number"
    if default[0] in "'\"":
        return "text"
    return "name" if re.fullmatch(r"[A-Za-z_][\w.]*", default) else ""


def _module(document: Document, entry: Callable) -> Iterator[Draft]:
    """Where a function or class lives; only if the name does not tell."""
    if _owner_is_class(entry) or len(entry.name) < 4 or not entry.owner:
        return
    owner, name = entry.owner, entry.name
    if _gives_away(owner, name) or _gives_away(name, owner) or owner.startswith("_"):
        return
    yield Draft(
        maker="module",
        document=document,
        question=f"Which module has the {entry.form} {name}{'' if entry.form == 'class' else '()'}?",
        answer=owner,
        asks=name,
        type="module name",
        groups=(),
        spans=_spans(entry)[1:],
        accepts=lambda option: not _gives_away(option, name) and option.split(".")[0] != owner.split(".")[0],
    )


def _parameter(document: Document, entry: Callable) -> Iterator[Draft]:
    """One of a callable's parameters, told apart from those of its siblings."""
    names = [parameter.name for parameter in entry.parameters if len(parameter.name) >= 3]
    name = entry.owner if entry.name == "__init__" else entry.qualified
    own = frozenset(parameter.name for parameter in entry.parameters)
    for answer in names[:2]:
        if not _gives_away(answer, name):
            yield Draft(
                maker="parameter",
                document=document,
                question=f"Which of these is a parameter of {name}{_beside(names, answer)}?",
                answer=answer,
                type="parameter name",
                groups=(f"owner {entry.owner}", f"document {document.id}"),
                spans=_spans(entry)[1:],
                accepts=lambda option: option not in own and not _gives_away(option, name),
            )


def _beside(names: list[str], answer: str) -> str:
    return next((f", beside {name}" for name in names if name != answer), "")


def _class(document: Document, entry: Callable) -> Iterator[Draft]:
    """The class that has a method; only if the names do not tell."""
    owner = entry.owner.rpartition(".")[2]
    if entry.form != "function" or not owner[:1].isupper() or entry.name.startswith("__") or len(entry.name) < 4:
        return
    if _gives_away(owner, entry.name) or _gives_away(entry.name, owner):
        return
    module = entry.owner.rpartition(".")[0]
    yield Draft(
        maker="class",
        document=document,
        question=f"Which class of {module} has the method {entry.name}({entry.params})?",
        answer=owner,
        asks=entry.name,
        type="class with methods",
        groups=(f"owner {module}", f"document {document.id}"),
        spans=_spans(entry)[1:],
        accepts=lambda option: not _gives_away(option, entry.name),
    )


def _option(document: Document, entry: Callable, text: str) -> Iterator[Draft]:
    names = tuple(parameter.name for parameter in entry.parameters)
    for meaning in knowledge.meanings(text, entry):
        if _gives_away(meaning.parameter, meaning.meaning):
            continue
        yield Draft(
            maker="option",
            document=document,
            question=f'Which parameter of {entry.qualified} has this meaning: "{meaning.meaning}"',
            answer=meaning.parameter,
            type="parameter name",
            groups=(f"callable {entry.qualified}", f"owner {entry.owner}", f"document {document.id}"),
            spans=((meaning.start, meaning.end),),
            alternatives=names,
        )


def _base(document: Document, entry: Callable) -> Iterator[Draft]:
    base = entry.params.rpartition(".")[2]
    if entry.form != "class" or not re.fullmatch(r"[A-Za-z_.]\w*(?:\.\w+)*", entry.params) or base == "object":
        return
    if _gives_away(base, entry.qualified) or base.startswith("_"):
        return
    yield Draft(
        maker="base",
        document=document,
        question=f"From which class does the class {entry.qualified} derive?",
        answer=entry.params,
        type="base class",
        groups=(f"owner {entry.owner}", f"document {document.id}"),
        spans=_spans(entry)[1:],
        accepts=lambda option: not _gives_away(option.rpartition(".")[2], entry.qualified),
    )


def _cloze(document: Document, text: str) -> Iterator[Draft]:
    for cloze in knowledge.clozes(text):
        gap = re.sub(rf"(?<!\w){re.escape(cloze.term)}(?!\w)", "____", cloze.sentence)
        sentence = cloze.sentence.lower()
        yield Draft(
            maker="cloze",
            document=document,
            question=f"Which term fills the gap: {gap}",
            answer=cloze.term,
            type=f"term {_term_kind(cloze.term)}",
            groups=(f"document {document.id}",),
            spans=((cloze.start, cloze.end),),
            accepts=lambda option, sentence=sentence: option.lower() not in sentence,  # type: ignore[misc]
        )


def _term_kind(term: str) -> str:
    if term.startswith("__"):
        return "special method"
    if term.endswith("()"):
        return "call"
    if "." in term:
        return "dotted"
    return "capital" if term[0].isupper() else "word"
