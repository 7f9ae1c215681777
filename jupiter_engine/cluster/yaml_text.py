"""Changing a YAML file in place: single edits of its text that leave comments, order and layout as they are.

Every edit is proven: the new text must read as the old data with exactly that change, else nothing happens.
Only what Jupiter's settings allow is handled (no anchors, no tags); files are at most 256 KiB.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import yaml

from jupiter_engine.errors import ConfigError
from jupiter_engine.settings import tree

Key = str | int
Value = str | int | float | bool | Sequence[str]

_PLAIN: Final = re.compile(r"[A-Za-z0-9_/~.][A-Za-z0-9_/~. @+-]*")


def written(value: Value) -> str:
    """A value as it stands in a file: plain where YAML reads it back as that, else in quotes."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return f"{value:g}" if isinstance(value, float) and abs(value) < 1e6 else str(value)
    if not isinstance(value, str):
        return "[" + ", ".join(written(item) for item in value) + "]"
    if _PLAIN.fullmatch(value) and value == value.strip() and _reads_as_text(value):
        return value
    return '"' + "".join(_escaped(character) for character in value) + '"'


def _escaped(character: str) -> str:
    if character in '\\"':
        return "\\" + character
    if character.isprintable():
        return character
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"


def _reads_as_text(value: str) -> bool:
    node, _ = tree.parse(f"k: {value}")
    scalar = node.get("k") if isinstance(node, tree.Mapping) else None
    return isinstance(scalar, tree.Scalar) and scalar.tag == "str" and scalar.text == value


def written_mapping(values: Mapping[str, Value], column: int | None, newline: str = "\n") -> str:
    """A mapping: one key a line, further lines indented to `column`; or in braces where `column` is None."""
    pairs = [f"{key}: {written(value)}" for key, value in values.items()]
    return "{" + ", ".join(pairs) + "}" if column is None else f"{newline}{' ' * column}".join(pairs)


class YamlText:
    """The text of one file; paths are keys and positions: ("nodes", 1, "role")."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._newline = "\r\n" if "\r\n" in text else "\n"

    def data(self) -> Any:
        """What the file says; ConfigError where the stricter of YAML's two parsers does not take it."""
        try:
            return yaml.safe_load(self.text)
        except yaml.YAMLError as error:
            raise _unchangeable() from error

    # -- edits ---------------------------------------------------------------------------------------------
    def append(self, path: Sequence[Key], values: Mapping[str, Value]) -> None:
        """Add a mapping to the end of the list at `path`."""
        data = self.data()
        _at(data, path).append(_plain(values))
        node = self._node(path)
        if node.flow_style:
            text = written_mapping(values, None)
            self._put_in_flow(node, text, data)
            return
        column = node.start_mark.column
        at = self._line_end(self._end(node.value[-1]))
        item = f"{' ' * column}- {written_mapping(values, column + 2, self._newline)}"
        self._replace(at, at, self._own_line(at, item), data)

    def remove_item(self, path: Sequence[Key], position: int) -> None:
        """Take one item out of the list at `path`; comments around it stay."""
        data = self.data()
        del _at(data, path)[position]
        node = self._node(path)
        items = node.value
        if len(items) == 1:
            self._replace(node.start_mark.index, self._end(node), "[]", data)
        elif node.flow_style:
            if position + 1 < len(items):
                start, end = items[position].start_mark.index, items[position + 1].start_mark.index
            else:
                start, end = self._end(items[position - 1]), self._end(items[position])
            self._replace(start, end, "", data)
        else:
            start = self._dash_line(node.start_mark.column, items[position].start_mark.index)
            self._replace(start, self._next_line(self._end(items[position])), "", data)

    def set(self, path: Sequence[Key], key: str, value: Value) -> None:
        """Give `key` of the mapping at `path` a value, in its place or after the last key."""
        data = self.data()
        _at(data, path)[key] = list(value) if isinstance(value, tuple) else value
        node = self._node(path)
        text = written(value)
        for name, old in node.value:
            if name.value == key:
                start, end = old.start_mark.index, self._end(old)
                # An empty value (`key:`) has no place of its own.
                self._replace(start, end, text if end > start else f" {text}", data)
                return
        if node.flow_style:
            self._put_in_flow(node, f"{key}: {text}", data)
            return
        at = self._line_end(self._end(node))
        self._replace(at, at, self._own_line(at, f"{' ' * node.start_mark.column}{key}: {text}"), data)

    def remove_key(self, path: Sequence[Key], key: str) -> None:
        """Take `key` out of the mapping at `path`, which must have others."""
        data = self.data()
        del _at(data, path)[key]
        node = self._node(path)
        entries = node.value
        position = next(i for i, (name, _) in enumerate(entries) if name.value == key)
        name, value = entries[position]
        if position == 0 and len(entries) > 1 and (node.flow_style or self._shares_line(name.start_mark.index)):
            # The first key behind a dash or a brace: the next one takes its place.
            self._replace(name.start_mark.index, entries[1][0].start_mark.index, "", data)
        elif node.flow_style:
            start = self._end(entries[position - 1][1]) if position else name.start_mark.index
            self._replace(start, self._end(value), "", data)
        else:
            start = self.text.rfind("\n", 0, name.start_mark.index) + 1
            self._replace(start, self._next_line(self._end(value)), "", data)

    def append_section(self, key: str, items: Sequence[Mapping[str, Value]]) -> None:
        """Add a list of mappings under a new top-level key, at the end of the file."""
        data = self.data()
        data[key] = [_plain(item) for item in items]
        root = self._node(())
        lines = [f"{key}:", *(f"  - {written_mapping(item, 4, self._newline)}" for item in items)]
        if root.flow_style:
            inner = ", ".join(written_mapping(item, None) for item in items)
            self._put_in_flow(root, f"{key}: [{inner}]", data)
            return
        at = len(self.text)
        before = "" if not self.text or self.text.endswith("\n") else self._newline
        self._replace(at, at, before + self._newline.join(lines) + self._newline, data)

    # -- places --------------------------------------------------------------------------------------------
    def _node(self, path: Sequence[Key]) -> Any:
        node: Any = yaml.compose(self.text, Loader=yaml.SafeLoader)
        for part in path:
            if isinstance(part, int):
                node = node.value[part]
            else:
                node = next(value for name, value in node.value if name.value == part)
        return node

    def _end(self, node: Any) -> int:
        """Where a node's own text ends; the parser's end of a block lies behind what follows it."""
        if isinstance(node, yaml.ScalarNode):
            end: int = node.end_mark.index
            # A block of text (`|`, `>`) ends in front of the next line's first word.
            return len(self.text[:end].rstrip()) if node.style in ("|", ">") else end
        if node.flow_style or not node.value:
            return int(node.end_mark.index)
        last = node.value[-1]
        return max(self._end(last[0]) + 1, self._end(last[1])) if isinstance(last, tuple) else self._end(last)

    def _line_end(self, index: int) -> int:
        """Where the line of `index` ends, before its line break; comments behind a value belong to it."""
        end = self.text.find("\n", index)
        end = len(self.text) if end < 0 else end
        return end - 1 if end > 0 and self.text[end - 1 : end + 1] == "\r\n" else end

    def _next_line(self, index: int) -> int:
        end = self.text.find("\n", self._line_end(index))
        return len(self.text) if end < 0 else end + 1

    def _own_line(self, at: int, line: str) -> str:
        """`line` as it is inserted at the end of another one."""
        return self._newline + line + ("" if at < len(self.text) else self._newline)

    def _dash_line(self, column: int, index: int) -> int:
        """Start of the line whose dash, in `column`, begins the item at `index`."""
        start = self.text.rfind("\n", 0, index) + 1
        while not (
            self.text[start + column : start + column + 1] == "-" and not self.text[start : start + column].strip()
        ):
            if start == 0:
                raise _unchangeable()
            start = self.text.rfind("\n", 0, start - 1) + 1
        return start

    def _shares_line(self, index: int) -> bool:
        start = self.text.rfind("\n", 0, index) + 1
        return bool(self.text[start:index].strip())

    def _put_in_flow(self, node: Any, text: str, data: Any) -> None:
        if node.value:
            last = node.value[-1]
            at = self._end(last[1] if isinstance(last, tuple) else last)
            self._replace(at, at, f", {text}", data)
        else:
            at = node.start_mark.index + 1
            self._replace(at, at, text, data)

    def _replace(self, start: int, end: int, text: str, expected: Any) -> None:
        """The edit, if it reads as `expected`; ConfigError if it does not, and nothing is changed."""
        new = self.text[:start] + text + self.text[end:]
        try:
            same = yaml.safe_load(new) == expected
        except yaml.YAMLError:
            same = False
        if not same:
            raise _unchangeable()
        self.text = new


def _unchangeable() -> ConfigError:
    return ConfigError(
        "the file is laid out in a way that cannot be changed safely", fix="make this change in an editor"
    )


def _at(data: Any, path: Sequence[Key]) -> Any:
    for part in path:
        data = data[part]
    return data


def _plain(values: Mapping[str, Value]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else copy.copy(value) for key, value in values.items()}
