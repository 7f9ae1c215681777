"""How the generator is asked for a sample, and how its free text becomes a prompt and a response.

The built-in wordings are short and open the answer themselves (`Question:`), because
a small model follows a begun form far more reliably than a described one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from jupiter_engine.errors import ConfigError
from jupiter_engine.files import sha256_text
from jupiter_engine.protocol.rows import Chunk
from jupiter_engine.protocol.specs import TemplateSpec

Message = dict[str, str]

PLACEHOLDERS = ("title", "chunk", "topic")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, kw_only=True)
class Wording:
    """The built-in way of asking for one type."""

    ask: str
    """User message; {title} and {chunk} are filled in."""
    opening: str
    """First words of the assistant's answer, given to the generator; part of the text that is parsed."""
    trained: tuple[str, ...]
    """What the trained model will be asked, where the answer does not hold its question; {title} is filled in."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A request to the generator before it is tokenised."""

    messages: tuple[Message, ...] = field(default_factory=tuple)
    opening: str = ""


@dataclass(frozen=True)
class Parsed:
    """`prompt` is '' where the answer does not have the asked form; `response` then holds the raw text."""

    prompt: str
    response: str


WORDINGS: dict[str, Wording] = {
    "qa": Wording(
        ask="Text about {title}:\n\n{chunk}\n\n"
        "Write one question about {title} that this text answers, and the answer.",
        opening="Question:",
        trained=(),
    ),
    "explanation": Wording(
        ask="Text about {title}:\n\n{chunk}\n\nUsing only this text, explain {title} in three sentences.",
        opening="",
        trained=("Explain {title}.", "What is {title}?", "Explain in a few sentences what {title} is about."),
    ),
    "rephrase": Wording(
        ask="Rewrite this text about {title} in your own words, in one short paragraph:\n\n{chunk}",
        opening="",
        trained=("Describe {title} in your own words.", "Give a short description of {title}.", "Summarise {title}."),
    ),
    "tutorial": Wording(
        ask="Text about {title}:\n\n{chunk}\n\nUsing only this text, write a short tutorial with three numbered steps.",
        opening="1.",
        trained=("Write a short tutorial on {title}.", "Show me step by step how to use {title}."),
    ),
    "code": Wording(
        ask="Documentation of {title}:\n\n{chunk}\n\nWrite a short Python example that uses {title}.",
        opening="```python\n",
        trained=("Write a short Python example that uses {title}.", "Show {title} in a few lines of Python."),
    ),
    "debug": Wording(
        ask="Documentation of {title}:\n\n{chunk}\n\n"
        "Describe one mistake that a programmer can make here and how to correct it.",
        opening="A common mistake is",
        trained=(
            "What mistake is often made with {title}, and how is it corrected?",
            "What can go wrong with {title}?",
        ),
    ),
    "conversation": Wording(
        ask="Text about {title}:\n\n{chunk}\n\nA student asks one question about {title}. "
        "The teacher answers it from this text.",
        opening="Student:",
        trained=(),
    ),
}


def ask(template: TemplateSpec, chunk: Chunk, *, topic: str = "", context_bytes: int) -> Ask:
    """The messages for one sample: the template's own wording, or the built-in one of its type.

    Raises ConfigError for a placeholder that does not exist.
    """
    wording = WORDINGS[template.type]
    text = template.prompt if template.prompt is not None else wording.ask
    fields = {"title": chunk.title, "chunk": shown(chunk.text, context_bytes), "topic": topic or chunk.title}
    user = _PLACEHOLDER.sub(lambda match: _field(match, fields, template), text)
    if template.prompt is not None and "{chunk}" not in text:
        user = f"{fields['chunk']}\n\n{user}"  # a sample is always grounded in a text
    messages = [{"role": "user", "content": user}]
    if template.system_prompt:
        messages.insert(0, {"role": "system", "content": template.system_prompt})
    own_form = template.prompt is not None and template.type not in ("qa", "conversation", "code")
    return Ask(messages=tuple(messages), opening="" if own_form else wording.opening)


def _field(match: re.Match[str], fields: dict[str, str], template: TemplateSpec) -> str:
    name = match[1]
    if name in fields:
        return fields[name]
    if template.prompt is not None and name.isidentifier() and name.islower() and len(name) < 20:
        raise ConfigError(
            f"template {template.id}: the prompt uses {{{name}}}, which does not exist",
            fix="use {title}, {chunk} or {topic}",
        )
    return match[0]


def shown(text: str, context_bytes: int) -> str:
    """The first whole lines of `text` within `context_bytes` UTF-8 bytes (at least a part of the first line)."""
    lines, size = [], 0
    for line in text.splitlines(keepends=True):
        size += len(line.encode("utf-8"))
        if size > context_bytes:
            break
        lines.append(line)
    kept = "".join(lines) or text.encode("utf-8")[:context_bytes].decode("utf-8", "ignore")
    return kept.strip("\n")


# -- answers ----------------------------------------------------------------------------------------

_QA = re.compile(
    r"\s*(?:\*\*)?(?:question|q)(?:\*\*)?\s*\d*\s*:(?:\*\*)?(?P<q>.+?)\n?\s*(?:\*\*)?(?:answer|a)(?:\*\*)?\s*:(?:\*\*)?(?P<a>.+)",
    re.IGNORECASE | re.DOTALL,
)
_TALK = re.compile(
    r"\s*(?:\*\*)?student(?:\*\*)?\s*:(?:\*\*)?(?P<q>.+?)\n\s*(?:\*\*)?teacher(?:\*\*)?\s*:(?:\*\*)?(?P<a>.+)",
    re.IGNORECASE | re.DOTALL,
)
_NEXT_TURN = re.compile(
    r"\n\s*(?:\*\*)?(?:question|answer|student|teacher|note|q|a|the answer is)(?:\*\*)?\s*\d*\s*:.*",
    re.IGNORECASE | re.DOTALL,
)
_CODE = re.compile(r"```[^\n]*\n.*?\n```", re.DOTALL)
_LAST_SENTENCE = re.compile(r".*[.!?:`)](?=\s|$)", re.DOTALL)


def parse(template: TemplateSpec, chunk: Chunk, text: str, *, finished: bool, topic: str = "") -> Parsed:
    """Prompt and response from the generator's text (`opening` included).

    Tolerant of bold markers, missing blank lines and further turns; an answer cut off by the
    token limit (`finished` False) ends at its last whole sentence.
    """
    if template.type in ("qa", "conversation"):
        return _pair(_QA if template.type == "qa" else _TALK, text, finished=finished)
    if template.type == "code":
        block = _CODE.match(text.strip())
        return Parsed(_trained(template, chunk, topic), block[0]) if block else Parsed("", text.strip())
    body = text.strip() if finished else _whole_sentences(text)
    return Parsed(_trained(template, chunk, topic), body) if body else Parsed("", text.strip())


def _pair(form: re.Pattern[str], text: str, *, finished: bool) -> Parsed:
    match = form.match(text)
    if not match:
        return Parsed("", text.strip())
    question = " ".join(match["q"].split())
    answer = _NEXT_TURN.sub("", "\n" + match["a"].strip())
    if not finished and answer.strip() == match["a"].strip():
        answer = _whole_sentences(answer)
    answer = answer.strip()
    if len(question) < 8 or not answer or "Question:" in question:
        return Parsed("", text.strip())
    return Parsed(question, answer)


def _whole_sentences(text: str) -> str:
    match = _LAST_SENTENCE.match(text)
    return match[0].strip() if match else ""


def _trained(template: TemplateSpec, chunk: Chunk, topic: str) -> str:
    """One of the type's wordings, chosen by the chunk so that it is always the same."""
    forms: Sequence[str] = WORDINGS[template.type].trained
    number = int(sha256_text(f"{template.id} {chunk.id}")[:8], 16)
    return forms[number % len(forms)].replace("{title}", topic or chunk.title)
