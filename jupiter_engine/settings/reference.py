"""The reference of all settings, taken from the types that read them.

docs/config.md holds these tables between markers; scripts/config_reference writes them and a
test fails while they are out of date, so the documentation cannot promise a key that is not read.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Final

import msgspec
from msgspec import inspect as mi

from jupiter_engine.settings.cluster import ClusterSettings
from jupiter_engine.settings.domain import DomainSettings
from jupiter_engine.settings.reader import describe

FILES: Final[dict[str, type[msgspec.Struct]]] = {
    "config/cluster.yaml": ClusterSettings,
    "config/domains/NAME.yaml": DomainSettings,
}

READERS: Final[dict[str, str]] = {
    "schema": "whoever loads the file",
    "nodes": "placement, Fleet page",
    "nodes[].host": "connections",
    "nodes[].device_type": "placement, groups, environment push",
    "nodes[].connection_type": "check of the groups",
    "nodes[].ssh_user": "connections",
    "nodes[].ssh_port": "connections",
    "nodes[].identity": "connections",
    "nodes[].jump": "connections",
    "nodes[].python": "node runner, environment push",
    "nodes[].workdir": "node runner, environment push",
    "nodes[].environment": "environment push, launch",
    "nodes[].micro_batch_sequences": "train",
    "groups": "train",
    "launch": "train; `twin` and threads also generate, evaluate",
    "islands": "train, `jupiter nodes link`",
    "islands.rounds": "train (the hub)",
    "connection": "connections",
    "retries": "supervision of workers",
    "retries.group_restarts_per_hour": "train (groups)",
    "retries.node_lost_after_s": "train (groups)",
    "domain.name": "everything",
    "domain.description": "console, `jupiter status`",
    "domain.language": "check of the templates",
    "domain.keywords": "collect",
    "domain.negative_keywords": "collect",
    "base": "prepare",
    "sources": "collect, queue",
    "chunk": "collect",
    "generation": "generate, evaluate (yield)",
    "filters": "filter, evaluate (yield)",
    "review": "review",
    "mix": "queue",
    "training": "queue, train",
    "training.seed": "collect (split), queue, train, evaluate, gate",
    "evaluation": "collect (split), evaluate",
    "gate": "gate",
}
"""Dotted key -> the stage or part that reads it and everything below it."""

_BEGIN, _END = "<!-- keys of {file}: written by scripts/config_reference -->", "<!-- end of keys -->"


@dataclass(frozen=True, slots=True)
class Row:
    """One key of a settings file."""

    key: str
    """Dotted; lists are written `key[]`."""
    type: str
    default: str
    meaning: str
    reader: str


@cache
def field_docs(kind: type[msgspec.Struct]) -> dict[str, str]:
    """The text under each field of a struct's class body, as one line."""
    body = ast.parse(inspect.getsource(importlib.import_module(kind.__module__))).body
    (found,) = [node for node in body if isinstance(node, ast.ClassDef) and node.name == kind.__name__]
    docs: dict[str, str] = {}
    for item, after in zip(found.body, [*found.body[1:], None], strict=True):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            docs[item.target.id] = " ".join(str(text).split())
    return docs


def rows(kind: type[msgspec.Struct]) -> Iterator[Row]:
    """Every key of a settings file, in the order of the types; a section comes before its keys."""
    yield from _rows(mi.type_info(kind), "")


def _rows(info: mi.Type, prefix: str) -> Iterator[Row]:
    assert isinstance(info, mi.StructType)
    docs = field_docs(info.cls)
    for field in info.fields:
        key = f"{prefix}.{field.encode_name}" if prefix else field.encode_name
        section = next((part for part in _structs(field.type)), None)
        meaning = docs[field.name]
        if section is not None and not meaning:
            meaning = " ".join((section.cls.__doc__ or "").split())
        what = "section" if isinstance(field.type, mi.StructType) else "list of sections" if section else None
        yield Row(key, what or describe(field.type), _default(field), meaning, _reader(key))
        if section is not None:
            yield from _rows(section, key + ("" if isinstance(field.type, mi.StructType) else "[]"))


def _structs(info: mi.Type) -> Iterator[mi.StructType]:
    if isinstance(info, mi.StructType):
        yield info
    elif isinstance(info, mi.VarTupleType):
        yield from _structs(info.item_type)


def _default(field: mi.Field) -> str:
    if field.required:
        return "required"
    if any(_structs(field.type)):
        return "this machine" if field.name == "nodes" else ""
    if field.default is None:
        return "none"
    return _yaml(field.default)


def _yaml(value: object) -> str:
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_yaml(item) for item in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value if re.fullmatch(r"[\w./@-]+", value) else f'"{value}"'
    return f"{value:g}" if isinstance(value, float) else str(value)


def _reader(key: str) -> str:
    while key not in READERS:
        if not re.search(r"[.\[]", key):
            return ""
        key = key.removesuffix("[]") if key.endswith("[]") else key.rpartition(".")[0]
    return READERS[key]


def table(kind: type[msgspec.Struct]) -> str:
    """The Markdown table of a settings file."""
    lines = ["| Key | Type | Default | Meaning | Read by |", "|---|---|---|---|---|"]
    for row in rows(kind):
        default = f"`{row.default}`" if row.default not in ("", "required", "none", "this machine") else row.default
        cells = (f"`{row.key}`", row.type, default, row.meaning, row.reader)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def rewritten(document: str) -> str:
    """`document` with the tables between its markers brought up to date; raises ValueError if a marker is missing."""
    for file, kind in FILES.items():
        begin = _BEGIN.format(file=file)
        start = document.index(begin) + len(begin)
        document = f"{document[:start]}\n{table(kind)}\n{document[document.index(_END, start) :]}"
    return document
