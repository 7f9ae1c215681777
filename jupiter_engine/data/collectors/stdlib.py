"""The running interpreter's standard library as documents; reads files only, imports none of the modules.

Three parts: `topics` (the language reference shipped as pydoc_data), `docstrings` (one
readable page a module, with signatures) and `source` (the files themselves).
"""

from __future__ import annotations

import ast
import importlib
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

from jupiter_engine.data.collectors.document import Collected, RawDocument
from jupiter_engine.protocol.specs import SourceSpec

LICENSE = "PSF-2.0"

_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "_bundled", "_pyrepl", "dist-packages", "idle_test", "lib-dynload", "lib2to3", "pydoc_data"}
    | {"site-packages", "test", "tests", "turtledemo"}
)
# One generated character table a file; the few hand-written codecs among them are not worth telling apart.
_TABLE_FOLDERS = frozenset({"encodings"})
_MAX_SOURCE_BYTES = 400_000


def library_root() -> Path:
    """Folder of the pure-Python standard library of this interpreter."""
    return Path(sysconfig.get_paths()["stdlib"])


def modules(root: Path) -> list[tuple[str, Path]]:
    """(dotted module name, file) of every library module worth reading, sorted by name."""
    found: list[tuple[str, Path]] = []
    for path in _python_files(root):
        parts = list(path.relative_to(root).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        if parts and not any(part.startswith("_sysconfigdata") for part in parts):
            found.append((".".join(parts), path))
    return sorted(found)


def _python_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            skipped = path.name in _SKIPPED_FOLDERS or path.name in _TABLE_FOLDERS or path.name.startswith("config-")
            if not skipped and path.name.isidentifier():
                yield from _python_files(path)
        elif path.suffix == ".py":
            yield path


def collect(source: SourceSpec) -> Collected:
    """Documents of the wanted parts: topics first, then modules by name (docstrings before source)."""
    collected = Collected()
    if "topics" in source.parts:
        _topics(source, collected)
    if "docstrings" in source.parts or "source" in source.parts:
        for name, path in modules(library_root()):
            _module(source, collected, name, path)
    return collected


def _topics(source: SourceSpec, collected: Collected) -> None:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions ship Python without its documentation data
        collected.skip("topics not installed", "pydoc_data.topics")
        return
    for name in sorted(topics):
        text = topics[name].strip() + "\n"
        collected.documents.append(
            RawDocument(
                source=source.id,
                uri=f"stdlib:topic/{name}",
                title=name,
                kind="docs",
                license=LICENSE,
                text=text,
            )
        )


def _module(source: SourceSpec, collected: Collected, name: str, path: Path) -> None:
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:  # a few old files declare another encoding
        collected.skip("not utf-8", name)
        return
    if len(text) > _MAX_SOURCE_BYTES or is_table(text):
        collected.skip("generated table", name)
        return
    if "docstrings" in source.parts:
        page = docstring_page(name, text)
        if page:
            collected.documents.append(
                RawDocument(
                    source=source.id,
                    uri=f"stdlib:doc/{name}",
                    title=name,
                    kind="docs",
                    license=LICENSE,
                    text=page,
                    family=f"module {name}",
                )
            )
    if "source" in source.parts and text.strip():
        collected.documents.append(
            RawDocument(
                source=source.id,
                uri=f"stdlib:source/{name}",
                title=name,
                kind="code",
                license=LICENSE,
                text=text,
                family=f"module {name}",
            )
        )


def is_table(text: str) -> bool:
    """A long file whose lines are mostly literals: generated data that teaches nothing."""
    if len(text) < 8_000:
        return False
    lines = [line.strip() for line in text.splitlines()]
    filled = [line for line in lines if line]
    literal = sum(line[0] in "'\"([{0123456789" or line.startswith(("b'", "u'", "r'")) for line in filled)
    return literal > 0.7 * len(filled)


# -- docstrings ------------------------------------------------------------------------------------


def docstring_page(module: str, text: str) -> str:
    """A Markdown page of the module's public docstrings; '' if there are none or the file does not parse.

    `# module`, its docstring, then for each documented class, function and method
    `## module.name(signature)` and its docstring.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # another project's escape sequences
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return ""
    parts = [_entry(f"# {module}", ast.get_docstring(tree))] if ast.get_docstring(tree) else []
    parts.extend(_members(tree.body, module))
    if not parts:
        return ""
    if not ast.get_docstring(tree):
        parts.insert(0, f"# {module}\n")
    return "\n".join(parts)


def _members(body: list[ast.stmt], prefix: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            bases = ", ".join(ast.unparse(base) for base in node.bases)
            doc = ast.get_docstring(node)
            if doc:
                yield _entry(f"## class {prefix}.{node.name}" + (f"({bases})" if bases else ""), doc)
            yield from _members(node.body, f"{prefix}.{node.name}")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc and (not node.name.startswith("_") or node.name == "__init__"):
                yield _entry(f"## {prefix}.{node.name}({signature(node)})", doc)


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The parameter list as one line of source, annotations left out."""
    bare = ast.arguments(
        posonlyargs=[ast.arg(arg=a.arg) for a in node.args.posonlyargs],
        args=[ast.arg(arg=a.arg) for a in node.args.args],
        vararg=ast.arg(arg=node.args.vararg.arg) if node.args.vararg else None,
        kwonlyargs=[ast.arg(arg=a.arg) for a in node.args.kwonlyargs],
        kw_defaults=node.args.kw_defaults,
        kwarg=ast.arg(arg=node.args.kwarg.arg) if node.args.kwarg else None,
        defaults=node.args.defaults,
    )
    return ast.unparse(bare)


def _entry(heading: str, doc: str | None) -> str:
    body = textwrap.dedent(doc or "").strip()
    return f"{heading}\n\n{body}\n"
