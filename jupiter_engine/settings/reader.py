"""YAML into frozen typed settings: every problem of a file at once, each a sentence with its place.

The types are msgspec structs; their field types and `Meta` bounds are the schema. The tree
(settings.tree) is walked along that schema, which is what lets a message name file, line,
column and key, say what stands there and what is expected, and suggest the nearest spelling.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import msgspec
from msgspec import inspect as mi

from jupiter_engine.errors import ConfigError
from jupiter_engine.settings import tree
from jupiter_engine.settings.tree import MAX_PROBLEMS, Node, Place, Problem, Scalar, Sequence, Unreadable, quote

T = TypeVar("T")
S = TypeVar("S", bound=msgspec.Struct)

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_NUMBER = re.compile(r"[-+]?([0-9][0-9_]*)?\.?[0-9_]*([eE][-+]?[0-9]+)?")
_WITH_UNIT = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*[A-Za-z%]+")
_INDEX = re.compile(r"\[[0-9]+\]")
_LARGEST: Final = 2**63 - 1
_INVALID: Final = object()

NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9_-]{0,62}$"


class Loaded(msgspec.Struct, Generic[T], frozen=True):
    """Settings together with where they came from and what a person should know about them."""

    value: T
    path: Path
    warnings: tuple[str, ...] = ()
    """Complete sentences; nothing here stops anything."""
    places: Mapping[str, Place] = msgspec.field(default_factory=dict)
    """Dotted key (`generation.templates[0].prompt`) -> where its value stands; only keys that stand in the file."""


class Findings:
    """The problems and warnings of one file, and where its keys stand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[Problem] = []
        self.warnings: list[str] = []
        self.places: dict[str, Place] = {}

    def given(self, key: str) -> bool:
        """Whether the dotted key stands in the file (and is not a default)."""
        return key in self.places

    def place(self, key: str) -> Place | None:
        """Where `key` stands, else the nearest key around it."""
        while key:
            if key in self.places:
                return self.places[key]
            key = key[: key.rindex("[")] if key.endswith("]") else key.rpartition(".")[0]
        return self.places.get("")

    def problem(self, key: str, text: str) -> None:
        """`text` completes a sentence that begins with the key: "`training.steps` <text>"."""
        self.problems.append(Problem(self.place(key), f"`{key}` {text}"))

    def problem_at(self, place: Place | None, text: str) -> None:
        self.problems.append(Problem(place, text))

    def warn(self, key: str, text: str) -> None:
        self.warnings.append(located(self.path, self.place(key), f"`{key}` {text}"))

    def raise_if_any(self) -> None:
        """Raise one ConfigError for all problems found so far, in the order of the file."""
        if not self.problems:
            return
        inside = sorted(set(self.problems), key=_line_order)
        sentences = [located(self.path, problem.place, problem.text) for problem in inside[:MAX_PROBLEMS]]
        if len(inside) > MAX_PROBLEMS:
            sentences.append(f"{shown(self.path)}: {len(inside) - MAX_PROBLEMS} further problems are not listed.")
        more = len(inside) - 1
        detail = sentences[0] + (f" ({more} more in this file)" if more else "")
        raise ConfigError(detail, fix="correct the file, then try again", problems=tuple(sentences))


_type_info = functools.cache(mi.type_info)


def _line_order(problem: Problem) -> tuple[int, int, str]:
    return (problem.place.line, problem.place.column, problem.text) if problem.place else (0, 0, problem.text)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def shown(path: Path) -> str:
    """A path as it stands in messages: printable, whatever bytes the file name holds."""
    return _printable(str(path))


def located(path: Path, place: Place | None, text: str) -> str:
    """`config/cluster.yaml, line 3, column 5: <text>.`"""
    where = f", line {place.line}, column {place.column}" if place else ""
    return _printable(f"{path}{where}: {text}") + ("" if text.endswith((".", "?")) else ".")


def load(
    path: Path,
    kind: type[S],
    *,
    refused: Mapping[str, str] | None = None,
    rewrite: Callable[[tree.Mapping, Findings], None] | None = None,
    check: Callable[[S, Findings], S] | None = None,
) -> Loaded[S]:
    """Read `path` as a `kind`; raises ConfigError with all problems, and nothing else for any file content.

    `refused` names keys that Jupiter knows but does not take (`data_sources.github`, list
    positions written `[]`), each with the reason and what to do instead. `rewrite` turns older
    spellings in the tree into present ones; `check` holds rules between fields and may return
    a completed value.
    """
    found = Findings(path)
    try:
        root, problems = tree.parse(tree.read_text(path))
    except Unreadable as unreadable:
        found.problems.append(unreadable.problem)
        found.raise_if_any()
        raise  # never reached: one problem was found
    found.problems.extend(problems)
    top = _top_level(root, found)
    if top is None:
        found.raise_if_any()
        raise ConfigError(f"{shown(path)} is empty")  # never reached, for the type checker
    found.places[""] = top.place
    if rewrite is not None:
        rewrite(top, found)
    plain = _Walk(found, kind, refused or {}).struct(top, _type_info(kind), "")  # type: ignore[arg-type]
    found.raise_if_any()
    try:
        value = msgspec.convert(plain, kind)
    except msgspec.ValidationError as error:  # a bound that the walk does not know
        found.problem_at(None, str(error))
        found.raise_if_any()
        raise
    if check is not None:
        value = check(value, found)
    found.raise_if_any()
    return Loaded(value, path, tuple(found.warnings), found.places)


def _top_level(root: Node | None, found: Findings) -> tree.Mapping | None:
    if isinstance(root, tree.Mapping):
        return root
    if root is None or (isinstance(root, Scalar) and root.tag == "null"):
        found.problem_at(None, "the file is empty; expected a mapping of keys to values")
    elif isinstance(root, Sequence):
        found.problem_at(root.place, "the file begins with a list; expected a mapping of keys to values (`key: value`)")
    else:
        text = f"found the text {quote(root.text)}; expected a mapping of keys to values (`key: value`)"
        found.problem_at(root.place, text)
    return None


def nearest(word: str, choices: list[str]) -> str | None:
    """The choice a person probably meant, or None."""
    lowered = {choice.lower(): choice for choice in reversed(choices)}
    match = difflib.get_close_matches(word.lower(), list(lowered), n=1, cutoff=0.6)
    return lowered[match[0]] if match else None


def describe(kind: mi.Type) -> str:
    """What a value of this type is, in words that follow "expected"."""
    match kind:
        case mi.IntType() | mi.FloatType():
            noun = "a whole number" if isinstance(kind, mi.IntType) else "a number"
            if kind.ge is not None and kind.le is not None:
                return f"{noun} from {_plain(kind.ge)} to {_plain(kind.le)}"
            bounds = (
                ("of at least", kind.ge),
                ("greater than", kind.gt),
                ("of at most", kind.le),
                ("less than", kind.lt),
            )
            given = [f"{words} {_plain(bound)}" for words, bound in bounds if bound is not None]
            return " and ".join([f"{noun} {given[0]}", *given[1:]]) if given else noun
        case mi.StrType():
            if kind.pattern == NAME_PATTERN:
                return "a name of at most 63 small letters, digits, - and _ that starts with a letter or digit"
            return "a text"
        case mi.BoolType():
            return "true or false"
        case mi.LiteralType():
            names = [str(value) for value in kind.values]
            return names[0] if len(names) == 1 else "one of " + ", ".join(names)
        case mi.VarTupleType():
            return f"a list ({describe(kind.item_type)} each)"
        case mi.StructType():
            return "a mapping with keys such as " + ", ".join(field.encode_name for field in kind.fields[:3])
        case mi.UnionType():
            return " or ".join(describe(part) for part in kind.types if not isinstance(part, mi.NoneType))
    raise TypeError(f"settings cannot hold {kind}")


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)


def _found(node: Node) -> str:
    """What stands there, in words that follow "found"."""
    if isinstance(node, tree.Mapping):
        return "a mapping"
    if isinstance(node, Sequence):
        return "a list"
    if node.tag == "null" and not node.quoted:
        return "nothing"
    kind = {"int": "the number", "float": "the number", "timestamp": "the date"}.get(node.tag, "the text")
    if node.tag == "bool":
        return f"{node.text} (which YAML reads as {'true' if _truth(node.text) else 'false'})"
    return f"{kind} {quote(node.text) if kind == 'the text' else node.text[:40]}"


def _truth(text: str) -> bool:
    return text.lower() in ("true", "yes", "on")


def leaves(kind: mi.Type, key: str = "") -> Iterator[tuple[str, mi.Field]]:
    """Every field below a type as (dotted key, field); lists are written `key[]`."""
    match kind:
        case mi.StructType():
            for item in kind.fields:
                below = f"{key}.{item.encode_name}" if key else item.encode_name
                yield below, item
                yield from leaves(item.type, below)
        case mi.VarTupleType():
            yield from leaves(kind.item_type, f"{key}[]")
        case mi.UnionType():
            for part in kind.types:
                yield from leaves(part, key)


class _Walk:
    """One pass over a tree along a type; values come out as plain Python for msgspec.convert."""

    def __init__(self, found: Findings, kind: type[msgspec.Struct], refused: Mapping[str, str]) -> None:
        self._found = found
        self._kind = kind
        self._refused = refused

    def value(self, node: Node, kind: mi.Type, key: str) -> Any:
        self._found.places[key] = node.place
        if isinstance(kind, mi.UnionType):
            if isinstance(node, Scalar) and node.tag == "null" and not node.quoted:
                return None
            kind = next(part for part in kind.types if not isinstance(part, mi.NoneType))
        if isinstance(kind, mi.StructType):
            return self.struct(node, kind, key) if isinstance(node, tree.Mapping) else self._wrong(node, kind, key)
        if isinstance(kind, mi.VarTupleType):
            return self._list(node, kind, key)
        if not isinstance(node, Scalar):
            return self._wrong(node, kind, key)
        if isinstance(kind, mi.IntType | mi.FloatType):
            return self._number(node, kind, key)
        if isinstance(kind, mi.BoolType):
            return _truth(node.text) if node.tag == "bool" else self._wrong(node, kind, key)
        return self._text(node, kind, key)

    def _wrong(self, node: Node, kind: mi.Type, key: str, advice: str = "") -> Any:
        if not advice and isinstance(node, Scalar) and node.tag == "null" and not node.quoted:
            advice = "give a value or remove the key"
        text = f"`{key}`: found {_found(node)}, expected {describe(kind)}" + (f"; {advice}" if advice else "")
        self._found.problem_at(node.place, text)
        return _INVALID

    def struct(self, node: tree.Mapping, kind: mi.StructType, key: str) -> Any:
        known = {item.encode_name: item for item in kind.fields}
        plain: dict[str, Any] = {}
        for name, (key_node, value) in node.entries.items():
            below = f"{key}.{name}" if key else name
            if name in known:
                plain[name] = self.value(value, known[name].type, below)
            else:
                self._unknown(key_node, value, name, below, list(known))
        for name, item in known.items():
            if item.required and name not in node.entries:
                below = f"{key}.{name}" if key else name
                self._found.problem_at(node.place, f"`{below}` is missing; expected {describe(item.type)}")
        return plain

    def _unknown(self, key_node: Scalar, value: Node, name: str, below: str, known: list[str]) -> None:
        shown_key = quote(below)[1:-1]
        generic = _INDEX.sub("[]", below)
        # A refused section explains its parts one by one where it can.
        parts = [(part, entry) for part, entry in _entries(value) if f"{generic}.{part}" in self._refused]
        for part, entry in parts:
            reason = self._refused[f"{generic}.{part}"]
            self._found.problem_at(entry.place, f"`{shown_key}.{part}` is not accepted: {reason}")
        if parts:
            return
        if generic in self._refused:
            self._found.problem_at(key_node.place, f"`{shown_key}` is not accepted: {self._refused[generic]}")
            return
        text = f"`{shown_key}` is not a known key"
        guess = nearest(name, known)
        if guess:
            text += f"; did you mean `{guess}`?"
            if len(known) > 1:
                text += f" Known here: {', '.join(known)}"
        else:
            places = [path for path, _ in leaves(_type_info(self._kind)) if path.rpartition(".")[2] == name]
            text += f"; it belongs at `{places[0]}`" if places else ""
            text += f"; known here: {', '.join(known)}"
        if key_node.tag == "bool" and not key_node.quoted:
            text += f" (YAML reads {name} as true or false; write it in quotes if it is meant as a word)"
        self._found.problem_at(key_node.place, text)

    def _list(self, node: Node, kind: mi.VarTupleType, key: str) -> Any:
        if not isinstance(node, Sequence):
            advice = ""
            if isinstance(node, tree.Mapping):
                advice = "begin each entry with a dash (`- `)"
            elif node.tag != "null" and not isinstance(kind.item_type, mi.StructType):
                advice = f"write [{node.text[:40]}]"
            return self._wrong(node, kind, key, advice)
        return [self.value(item, kind.item_type, f"{key}[{i}]") for i, item in enumerate(node.items)]

    def _number(self, node: Scalar, kind: mi.IntType | mi.FloatType, key: str) -> Any:
        text = node.text.strip()
        whole = isinstance(kind, mi.IntType)
        # YAML 1.1 takes 1e-4 (no dot) for a text and 010 or 1:30 for other numbers than they seem.
        numeric = bool(_NUMBER.fullmatch(text)) and any(c.isdigit() for c in text)
        if node.quoted and numeric:
            return self._wrong(node, kind, key, "remove the quotes")
        if not numeric:
            return self._wrong(node, kind, key, self._number_advice(node, text))
        if re.match(r"[-+]?0[0-9_]", text):
            return self._wrong(node, kind, key, "remove the leading zero (YAML reads such a number as octal)")
        try:
            number = float(text.replace("_", ""))
        except ValueError:
            return self._wrong(node, kind, key)
        if not math.isfinite(number) or abs(number) > _LARGEST:
            return self._wrong(node, kind, key, "the number is too large")
        if whole and not _INTEGER.fullmatch(text):
            integral = number == int(number)
            return self._wrong(node, kind, key, f"write {int(number)}" if integral else "write it without a fraction")
        exact: float = int(text.replace("_", "")) if whole else number
        if abs(exact) > _LARGEST:
            return self._wrong(node, kind, key, "the number is too large")
        low = (kind.ge is not None and exact < kind.ge) or (kind.gt is not None and exact <= kind.gt)
        high = (kind.le is not None and exact > kind.le) or (kind.lt is not None and exact >= kind.lt)
        return self._wrong(node, kind, key) if low or high else exact

    @staticmethod
    def _number_advice(node: Scalar, text: str) -> str:
        if node.tag == "float":  # what is left of the floats: .inf, .nan, 1:30.5
            return "write a finite decimal number"
        if node.tag == "int":
            return "write a plain decimal number"
        unit = _WITH_UNIT.fullmatch(text)
        if unit and text.endswith("%"):
            return f"write {float(unit.group(1)) / 100:g}"
        if unit:
            return f"write {unit.group(1)} without quotes or unit"
        return "use a dot for decimals" if re.fullmatch(r"[0-9]+,[0-9]+", text) else ""

    def _text(self, node: Scalar, kind: mi.Type, key: str) -> Any:
        if isinstance(kind, mi.LiteralType):
            names = [str(value) for value in kind.values]
            if node.text in names:
                return node.text
            guess = nearest(node.text, names) if len(names) > 1 else None
            return self._wrong(node, kind, key, f"did you mean {guess}?" if guess else "")
        if node.tag == "null" and not node.quoted:
            return self._wrong(node, kind, key)
        if node.tag != "str" and not node.quoted:
            return self._wrong(node, kind, key, f'if the word is meant, quote it: "{node.text[:40]}"')
        if isinstance(kind, mi.StrType) and kind.pattern is not None and not re.search(kind.pattern, node.text):
            simple = re.sub(r"[\s.]+", "-", node.text.strip()).lower()
            return self._wrong(node, kind, key, f"write {simple}" if re.search(kind.pattern, simple) else "")
        if node.text.endswith("\n") and kind == mi.StrType(pattern=NAME_PATTERN):
            return self._wrong(node, kind, key)  # `$` also matches before a last newline
        return node.text


def _entries(node: Node) -> list[tuple[str, Scalar]]:
    return [(name, key) for name, (key, _) in node.entries.items()] if isinstance(node, tree.Mapping) else []
