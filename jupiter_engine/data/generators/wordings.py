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
_HEADING_MARK = re.compile(r"^#{1,6} +(?:class +)?", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Wording:
    """The built-in way of asking for one type."""

    ask: str
    """User message; {title} and {chunk} are filled in."""
    example: str
    """The assistant's answer to the same request about the example text; '' for no example turn."""
    openings: tuple[str, ...]
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


_EXAMPLE_TITLE = "sundial"
_EXAMPLE_TEXT = (
    "A sundial shows the time of day by the shadow that a rod, the gnomon, throws on a marked plate. "
    "It needs sunlight and must be set for the latitude of its place."
)

WORDINGS: dict[str, Wording] = {
    "qa": Wording(
        ask="Text about {title}:\n\n{chunk}\n\n"
        "Write one question about {title} that this text answers, and the answer.",
        example="Question: What does a sundial use to show the time of day?\n"
        "Answer: It uses the shadow that its rod, the gnomon, throws on a marked plate.",
        openings=("Question: What does {title}", "Question: What is {title}?\nAnswer:", "Question: How does {title}"),
        trained=(),
    ),
    "explanation": Wording(
        ask="Text about {title}:\n\n{chunk}\n\nUsing only this text, explain {title} in three sentences.",
        example="A sundial is a plate that tells the time by a shadow. A rod, the gnomon, throws the shadow on the "
        "marked plate. It works only in sunlight and has to be set for the latitude of its place.",
        openings=("{title} is",),
        trained=("Explain {title}.", "What is {title}?", "Explain in a few sentences what {title} is about."),
    ),
    "rephrase": Wording(
        ask="Text about {title}:\n\n{chunk}\n\nSay the same in your own words, in two or three sentences.",
        example="By the shadow of a rod on a marked plate, a sundial tells what time of day it is. It depends on "
        "sunlight and on being set for its latitude.",
        openings=("{title}",),
        trained=("Describe {title} in your own words.", "Give a short description of {title}.", "Summarise {title}."),
    ),
    "tutorial": Wording(
        ask="Text about {title}:\n\n{chunk}\n\nUsing only this text, write a short tutorial with three numbered steps.",
        example="1. Set the sundial for the latitude of your place.\n2. Put it where there is sunlight.\n"
        "3. Read the time where the shadow of the gnomon falls on the marked plate.",
        openings=("1.",),
        trained=("Write a short tutorial on {title}.", "Show me step by step how to use {title}."),
    ),
    "code": Wording(
        ask="Documentation of {title}:\n\n{chunk}\n\nWrite a short Python example that uses {title}.",
        example="",
        openings=("```python\n",),
        trained=("Write a short Python example that uses {title}.", "Show {title} in a few lines of Python."),
    ),
    "debug": Wording(
        ask="Text about {title}:\n\n{chunk}\n\n"
        "Using only this text, describe one mistake that is easily made with {title} and what is right.",
        example="A common mistake is to leave a sundial as it was set for another place. It must be set for the "
        "latitude of its place, and it needs sunlight.",
        openings=("A common mistake is",),
        trained=(
            "What mistake is often made with {title}, and how is it corrected?",
            "What can go wrong with {title}?",
        ),
    ),
    "conversation": Wording(
        ask="Text about {title}:\n\n{chunk}\n\nA student asks one question about {title}. "
        "The teacher answers it from this text.",
        example="Student: How does a sundial show the time of day?\n"
        "Teacher: A rod, the gnomon, throws a shadow on a marked plate, and the shadow shows the time.",
        openings=("Student: What does {title}", "Student: Can you tell me what {title}"),
        trained=(),
    ),
}


def ask(template: TemplateSpec, chunk: Chunk, *, topic: str = "", context_bytes: int) -> Ask:
    """The messages for one sample: the template's own wording, or the built-in one of its type.

    Raises ConfigError for a placeholder that does not exist.
    """
    wording = WORDINGS[template.type]
    fields = {"title": chunk.title, "chunk": _plain(chunk, context_bytes), "topic": topic or chunk.title}
    messages: list[Message] = []
    if template.system_prompt:
        messages.append({"role": "system", "content": template.system_prompt})
    if template.prompt is None:
        if wording.example:
            example = _filled(wording.ask, {"title": _EXAMPLE_TITLE, "chunk": _EXAMPLE_TEXT}, template)
            messages.append({"role": "user", "content": example})
            messages.append({"role": "assistant", "content": wording.example})
        user = _filled(wording.ask, fields, template)
    else:
        user = _filled(template.prompt, fields, template)
        if "{chunk}" not in template.prompt:
            user = f"{fields['chunk']}\n\n{user}"  # a sample is always grounded in a text
    messages.append({"role": "user", "content": user})
    return Ask(messages=tuple(messages), opening=_opening(template, chunk))


def _opening(template: TemplateSpec, chunk: Chunk) -> str:
    """The opening for this chunk; with a wording of its own only what marks the form."""
    wording = WORDINGS[template.type]
    # `What does textwrap.shorten` can be completed; `What does guide: How to begin` cannot.
    name = re.fullmatch(r"[\w.]+", chunk.title) is not None
    if template.prompt is None and (name or "{title}" not in wording.openings[0]):
        return _choice(wording.openings, template, chunk).replace("{title}", chunk.title)
    return {"qa": "Question:", "conversation": "Student:", "code": "```python\n"}.get(template.type, "")


def _choice(forms: Sequence[str], template: TemplateSpec, chunk: Chunk) -> str:
    """One of the forms, chosen by the chunk so that it is always the same."""
    return forms[int(sha256_text(f"{template.id} {chunk.id}")[:8], 16) % len(forms)]


def _plain(chunk: Chunk, context_bytes: int) -> str:
    """The shown part of a chunk, headings of prose without marks: a small model copies those instead of writing."""
    text = shown(chunk.text, context_bytes)
    return _HEADING_MARK.sub("", text) if chunk.kind == "docs" else text


def _filled(text: str, fields: dict[str, str], template: TemplateSpec) -> str:
    return _PLACEHOLDER.sub(lambda match: _field(match, fields, template), text)


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
_CODE = re.compile(r"```[^\n]*\n(?P<body>.*?)(?P<end>\n```|\Z)", re.DOTALL)
_SENTENCE = re.compile(r".+?(?:[.!?][\"')`]*(?=\s|$)|$)\s*", re.DOTALL)
_LAST_SENTENCE = re.compile(r".*[.!?][\"')`]*(?=\s|$)", re.DOTALL)
_TURN_OF_KIND = re.compile(r"\n\s*(?:#|```|\*\*[A-Z]|Note:|Example)")
_MAX_SENTENCES = 5


def parse(template: TemplateSpec, chunk: Chunk, text: str, *, finished: bool, topic: str = "") -> Parsed:
    """Prompt and response from the generator's text (`opening` included).

    Tolerant of bold markers, missing blank lines and further turns. Prose ends after
    five sentences, before a sentence that it has already said, before a heading or
    code, and with a whole sentence where the token limit cut it off (`finished`
    False); cut-off code ends with its last whole top-level statement.
    """
    if template.type in ("qa", "conversation"):
        return _pair(_QA if template.type == "qa" else _TALK, text, template, finished=finished)
    if template.type == "code":
        body = _code(text)
    elif template.type == "tutorial":
        body = text.strip() if finished else _whole_sentences(text)
    else:
        body = _prose(text, template, finished=finished)
    if not body:
        return Parsed("", text.strip())
    forms = WORDINGS[template.type].trained
    return Parsed(_choice(forms, template, chunk).replace("{title}", topic or chunk.title), body)


def _pair(form: re.Pattern[str], text: str, template: TemplateSpec, *, finished: bool) -> Parsed:
    match = form.match(text)
    if not match:
        return Parsed("", text.strip())
    question = " ".join(match["q"].split())
    turn = _NEXT_TURN.search("\n" + match["a"].strip())
    answer = ("\n" + match["a"].strip())[: turn.start()] if turn else match["a"]
    answer = _prose(answer, template, finished=finished or turn is not None)
    if len(question) < 8 or not answer or not question.rstrip("*\"'` ").endswith("?"):
        return Parsed("", text.strip())
    return Parsed(question, answer)


def _prose(text: str, template: TemplateSpec, *, finished: bool) -> str:
    body = text.strip()
    if turn := _TURN_OF_KIND.search(body):
        body, finished = body[: turn.start()], True
    # The example turn counts as said: a small model falls back to it when it has nothing to say.
    example = WORDINGS[template.type].example.partition("\n")
    said = {_normal(match[0]) for part in (example[0], example[2]) for match in _SENTENCE.finditer(part)}
    kept = []
    sentences = [match[0] for match in _SENTENCE.finditer(body)]
    if not finished and sentences and not _LAST_SENTENCE.fullmatch(sentences[-1].strip()):
        sentences.pop()
    for sentence in sentences[:_MAX_SENTENCES]:
        if _normal(sentence) in said:
            break
        said.add(_normal(sentence))
        kept.append(sentence)
    return "".join(kept).strip()


def _normal(sentence: str) -> str:
    """A sentence for comparison: without case, spacing and the label of an answer."""
    return " ".join(re.sub(r"^(?:answer|teacher):", "", sentence.strip().lower()).split())


def _whole_sentences(text: str) -> str:
    match = _LAST_SENTENCE.match(text)
    return match[0].strip() if match else ""


def _code(text: str) -> str:
    """The first fenced block; if it was cut off, without the top-level statement in which that happened."""
    match = _CODE.match(text.strip())
    if not match:
        return ""
    lines = match["body"].rstrip().splitlines()
    if not match["end"]:
        while lines and (not lines[-1].strip() or lines[-1][:1] in " \t)]}"):
            lines.pop()
        lines = lines[:-1]
    while lines and (not lines[-1].strip() or lines[-1].lstrip().startswith("#")):
        lines.pop()
    body = "\n".join(lines).rstrip()
    only_imports = all(re.match(r"(?:import|from|#|$)", line) for line in body.splitlines())
    return "" if only_imports else f"```python\n{body}\n```"
