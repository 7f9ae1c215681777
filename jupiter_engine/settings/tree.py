"""From the bytes of a settings file to a tree of values that know their line and column.

Jupiter reads a small, unsurprising part of YAML: mappings, lists and scalars of one document.
Anchors, aliases, merge keys and tags are refused, so a file of some bytes cannot unfold into
gigabytes and no value comes from anywhere but the line it stands on. The tree is built from
the parser's event stream with an explicit stack: no input can exhaust the interpreter's stack
(the C parser's own composer recurses without a limit).
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml

MAX_BYTES: Final = 256 * 1024
MAX_DEPTH: Final = 24
MAX_VALUES: Final = 20_000
MAX_PROBLEMS: Final = 40

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# What YAML does not allow in a stream. (A set with characters above U+00FF takes milliseconds to compile;
# the few that exist there are left to the parser.)
_NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
_CONTROL_IN_VALUE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")
_TAG_PREFIX = "tag:yaml.org,2002:"


class Place(msgspec.Struct, frozen=True):
    """Where something stands in a file; both count from 1."""

    line: int
    column: int


class Problem(msgspec.Struct, frozen=True):
    """One thing wrong with a file: where (None: the file as a whole) and a sentence without the file name."""

    place: Place | None
    text: str


class Scalar(msgspec.Struct):
    text: str
    tag: str
    """What plain YAML 1.1 makes of it: str, int, float, bool, null, timestamp, merge, value."""
    quoted: bool
    place: Place


class Sequence(msgspec.Struct):
    place: Place
    items: list[Node] = msgspec.field(default_factory=list)


class Mapping(msgspec.Struct):
    place: Place
    entries: dict[str, tuple[Scalar, Node]] = msgspec.field(default_factory=dict)
    """Key text -> (key, value), in the order of the file."""

    def get(self, key: str) -> Node | None:
        found = self.entries.get(key)
        return found[1] if found else None

    def pop(self, key: str) -> tuple[Scalar, Node] | None:
        return self.entries.pop(key, None)

    def put(self, key: str, value: Node, place: Place) -> None:
        """Set a key as if it stood at `place` (used when an older spelling is read as the present one)."""
        self.entries[key] = (Scalar(key, "str", False, place), value)


Node = Scalar | Sequence | Mapping


class Unreadable(Exception):
    """The file gives no tree at all; `problem` says why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.text)
        self.problem = problem


def quote(text: str) -> str:
    """A value as it is shown in a message: one line, printable, at most 60 characters."""
    flat = "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return f'"{flat if len(flat) <= 60 else flat[:57] + "..."}"'


def read_text(path: Path) -> str:
    """The decoded text of a settings file; raises Unreadable for anything that is not a small UTF-8 text file."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise Unreadable(Problem(None, "this is a folder; a YAML file is expected"))
        if not stat.S_ISREG(mode):
            # A pipe or device could block for ever.
            raise Unreadable(Problem(None, "this is not a regular file; a YAML file is expected"))
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise Unreadable(Problem(None, "there is no such file")) from None
    except PermissionError:
        raise Unreadable(Problem(None, "the file may not be read; check its permissions (chmod u+r)")) from None
    except (OSError, ValueError) as error:
        # ValueError: a path with a NUL character.
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise Unreadable(Problem(None, f"the file cannot be read ({reason})")) from error
    if len(data) > MAX_BYTES:
        raise Unreadable(Problem(None, f"the file is larger than {MAX_BYTES // 1024} KiB, too large for settings"))
    return decode(data)


def decode(data: bytes) -> str:
    """UTF-8 (a byte order mark is dropped); raises Unreadable naming the line of the first byte that is not."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or data[:4] == b"\x00\x00\xfe\xff":
        raise Unreadable(Problem(Place(1, 1), "the file is encoded as UTF-16 or UTF-32; save it as UTF-8"))
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = _place_at(data[: error.start].decode("utf-8"))
        shown = f"0x{data[error.start]:02x}"
        raise Unreadable(Problem(place, f"the byte {shown} is not UTF-8 text; save the file as UTF-8")) from None
    strange = _NOT_TEXT.search(text)
    if strange:
        place = _place_at(text[: strange.start()])
        shown = f"U+{ord(strange.group()):04X}"
        raise Unreadable(
            Problem(place, f"the character {shown} is not allowed in YAML; remove it (is this a text file?)")
        )
    return text


def _place_at(before: str) -> Place:
    return Place(before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1)


def parse(text: str) -> tuple[Node | None, list[Problem]]:
    """The tree of the one document in `text` (None: there is none) and the problems of its form.

    Problems of form are those that leave a usable tree: duplicate keys, anchors, tags. Raises
    Unreadable where the YAML itself breaks off.
    """
    builder = _Builder()
    # The constructor of the C parser already checks the stream and may raise.
    try:
        loader = _Loader(text)
        try:
            while loader.check_event():
                builder.take(loader.get_event(), loader)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise Unreadable(_syntax_problem(error, text)) from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # ValueError and OverflowError: the pure Python scanner on escapes such as "\UFFFFFFFF".
        raise Unreadable(Problem(None, f"the YAML cannot be read ({quote(str(error))})")) from error
    return builder.root, builder.problems


class _Builder:
    """Collects parser events into a tree."""

    def __init__(self) -> None:
        self.root: Node | None = None
        self.problems: list[Problem] = []
        self._open: list[tuple[Sequence | Mapping, list[Node]]] = []
        self._values = 0
        self._documents = 0

    def take(self, event: Any, loader: Any) -> None:
        if isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                raise Unreadable(
                    Problem(_place(event), "a second YAML document begins here (`---`); a settings file holds one")
                )
        elif isinstance(event, yaml.SequenceStartEvent | yaml.MappingStartEvent):
            self._check_properties(event)
            kind = Sequence if isinstance(event, yaml.SequenceStartEvent) else Mapping
            if len(self._open) >= MAX_DEPTH:
                raise Unreadable(Problem(_place(event), f"values are nested more than {MAX_DEPTH} deep"))
            self._open.append((kind(_place(event)), []))
        elif isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent):
            node, children = self._open.pop()
            if isinstance(node, Sequence):
                node.items = children
            else:
                self._pair(node, children)
            self._add(node)
        elif isinstance(event, yaml.AliasEvent):
            self._problem(event, f"the alias *{event.anchor} is not supported; write the value out")
            self._add(Scalar("", "null", False, _place(event)))
        elif isinstance(event, yaml.ScalarEvent):
            self._check_properties(event)
            self._add(self._scalar(event, loader))

    def _scalar(self, event: Any, loader: Any) -> Scalar:
        quoted = event.style in ("'", '"', "|", ">")
        tag = loader.resolve(yaml.ScalarNode, event.value, (not quoted, quoted)).removeprefix(_TAG_PREFIX)
        if _CONTROL_IN_VALUE.search(event.value):
            self._problem(event, f"the value {quote(event.value)} holds a control character; remove it")
        return Scalar(event.value, tag, quoted, _place(event))

    def _check_properties(self, event: Any) -> None:
        if event.anchor is not None:
            self._problem(event, f"the anchor &{event.anchor} is not supported; write values out where they are used")
        if event.tag is not None:
            shown = event.tag.replace(_TAG_PREFIX, "!!")
            self._problem(event, f"the tag {quote(shown)} is not supported; remove it")

    def _problem(self, event: Any, text: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(Problem(_place(event), text))

    def _add(self, node: Node) -> None:
        self._values += 1
        if self._values > MAX_VALUES:
            raise Unreadable(Problem(node.place, f"the file holds more than {MAX_VALUES} values"))
        if self._open:
            self._open[-1][1].append(node)
        else:
            self.root = node

    def _pair(self, node: Mapping, children: list[Node]) -> None:
        for key, value in zip(children[::2], children[1::2], strict=True):
            if not isinstance(key, Scalar):
                self.problems.append(Problem(key.place, "a list or mapping cannot be a key; a key is a plain word"))
            elif key.tag == "merge" and not key.quoted:
                self.problems.append(Problem(key.place, "the merge key `<<` is not supported; write the values out"))
            elif key.text in node.entries:
                first = node.entries[key.text][0].place.line
                text = f"the key `{_key_text(key.text)}` stands here a second time (first on line {first}); keep one"
                self.problems.append(Problem(key.place, text))
            else:
                node.entries[key.text] = (key, value)


def _key_text(text: str) -> str:
    return quote(text)[1:-1]


def _place(event: Any) -> Place:
    return Place(event.start_mark.line + 1, event.start_mark.column + 1)


_HINTS = (
    (
        "mapping values are not allowed",
        "put a value that contains a colon in quotes, and check this line's indentation",
    ),
    ("could not find expected ':'", "a key needs a colon and a space after it"),
    ("did not find expected key", "check the indentation of this line and the one above"),
    ("did not find expected '-' indicator", "check the indentation of this list"),
    ("expected <block end>", "check the indentation of this line and the one above"),
    ("did not find expected ',' or", "a bracket or brace is not closed, or a comma is missing"),
    ("expected ',' or", "a bracket or brace is not closed, or a comma is missing"),
    ("unexpected end of stream", "a quote is not closed"),
    ("cannot start any token", "put the value in quotes"),
    ("unknown escape character", "in double quotes a backslash starts an escape; use single quotes"),
    ("undefined alias", "a value that starts with * must be in quotes"),
    ("expected alphabetic or numeric character", "a value that starts with * or & must be in quotes"),
)


def _syntax_problem(error: yaml.MarkedYAMLError, text: str) -> Problem:
    said = " ".join(str(error.problem or error.context or "it breaks off").split())
    mark, began = error.problem_mark or error.context_mark, error.context_mark
    if mark is None:
        return Problem(None, f"the YAML cannot be read ({said})")
    place = Place(mark.line + 1, mark.column + 1)
    if "maximum nesting depth" in said:  # the C scanner reads ahead and may meet its own limit first
        return Problem(place, f"values are nested more than {MAX_DEPTH} deep")
    if began is not None and ("end of stream" in said or "could not find expected ':'" in said):
        # The parser notices only later; the open quote or the key without a colon stands where it began.
        place = Place(began.line + 1, began.column + 1)
    lines = text.splitlines()
    hint = next((hint for pattern, hint in _HINTS if pattern in said), "")
    for number in range(min(place.line, len(lines)), max(place.line - 3, 0), -1):
        indent = lines[number - 1][: len(lines[number - 1]) - len(lines[number - 1].lstrip())]
        if "\t" in indent or ("\\t" in said and "\t" in lines[number - 1]):
            place, hint = Place(number, lines[number - 1].index("\t") + 1), "a tab is used here; YAML wants spaces"
            break
    since = ""
    if began is not None and began.line + 1 != place.line and error.context:
        since = f", {' '.join(error.context.split())} that began on line {began.line + 1}"
    return Problem(place, f"the YAML cannot be read ({said}{since})" + (f"; {hint}" if hint else ""))
