from __future__ import annotations

from pathlib import Path

import pytest

from jupiter_engine.data.collectors import files, sources, stdlib
from jupiter_engine.errors import ConfigError, CorpusEmpty
from jupiter_engine.protocol.specs import SourceSpec
from tests.data.fixture_corpus import write_corpus


def spec(folder: Path, **fields: object) -> SourceSpec:
    values: dict[str, object] = {"id": "here", "type": "files", "path": str(folder), **fields}
    return SourceSpec(**values)  # type: ignore[arg-type]


def test_a_folder_is_read_in_the_same_order_with_its_kinds(tmp_path: Path) -> None:
    write_corpus(tmp_path, pages=3, modules=2)
    found = files.collect(spec(tmp_path)).documents
    assert [d.uri for d in found] == [
        "here:docs/topic00.md",
        "here:docs/topic01.md",
        "here:docs/topic02.md",
        "here:src/tools00.py",
        "here:src/tools01.py",
    ]
    assert [d.kind for d in found] == ["docs", "docs", "docs", "code", "code"]


def test_unreadable_files_are_counted_with_their_reason_and_a_name(tmp_path: Path) -> None:
    (tmp_path / "latin.md").write_bytes(b"caf\xe9 " * 100)
    (tmp_path / "empty.md").write_text(" \n", "utf-8")
    (tmp_path / "binary.txt").write_bytes(b"a\x00b" * 100)
    (tmp_path / "minified.py").write_text("x = 1;" * 5000, "utf-8")
    (tmp_path / "good.md").write_text("A good text.\n" * 20, "utf-8")
    collected = files.collect(spec(tmp_path))
    assert [d.title for d in collected.documents] == ["good"]
    assert collected.skipped == {
        "not utf-8": 1,
        "empty": 1,
        "binary": 1,
        "lines too long (minified or generated)": 1,
    }
    assert collected.examples["not utf-8"] == "latin.md"


def test_include_and_exclude_match_names_and_paths_and_tool_folders_are_never_read(tmp_path: Path) -> None:
    for name in ("a.md", "docs/b.md", "docs/old/c.md", "d.rst", ".git/e.md", "node_modules/f.md", "latest_notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text", "utf-8")
    found = files.find(spec(tmp_path, include=("*.md",), exclude=("docs/old/*", "test_*")))
    assert [name for name, _ in found] == ["a.md", "docs/b.md", "latest_notes.md"]


def test_mojibake_is_repaired_in_prose_and_never_in_code(tmp_path: Path) -> None:
    broken = "The caf\u00c3\u00a9 serves it\u00e2\u20ac\u2122s guests. 'Straight' \u2018curly\u2019\n" * 5
    (tmp_path / "a.md").write_text(broken, "utf-8")
    (tmp_path / "b.py").write_text(f"TEXT = '''{broken}'''\n", "utf-8")
    prose, code = files.collect(spec(tmp_path)).documents
    assert "caf\u00e9" in prose.text
    assert "it\u2019s" in prose.text
    assert "\u2018curly\u2019" in prose.text
    assert code.text == f"TEXT = '''{broken}'''\n"


def test_clean_text_passes_unchanged() -> None:
    text = "\ufb01ne \u2018quotes\u2019 na\u00efve \u65e5\u672c\u8a9e"
    assert files.repair(text) is text


def test_a_missing_path_names_the_source_and_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"source here: .*nowhere does not exist") as caught:
        files.find(spec(tmp_path / "nowhere"))
    assert caught.value.fix


def test_an_empty_corpus_names_its_sources_the_reasons_and_the_fix(tmp_path: Path) -> None:
    (tmp_path / "tiny.md").write_text("short", "utf-8")
    with pytest.raises(CorpusEmpty) as caught:
        sources.collect([spec(tmp_path)])
    assert f"here ({tmp_path})" in caught.value.detail
    assert "1 shorter than 120 bytes" in caught.value.detail
    assert "include:" in caught.value.fix


def test_max_bytes_keeps_whole_documents_the_same_each_time(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    limited = spec(tmp_path, max_bytes=20_000)
    first, reports = sources.collect([limited], seed=3)
    again, _ = sources.collect([limited], seed=3)
    other, _ = sources.collect([limited], seed=4)
    assert first == again
    assert [d.uri for d in first] != [d.uri for d in other]
    assert 15_000 < reports[0].bytes == sum(d.size_bytes for d in first) <= 20_000
    assert reports[0].skipped["beyond max_bytes"] == 36 - len(first)


def test_keywords_keep_whole_words_only_and_negative_keywords_remove(tmp_path: Path) -> None:
    for name, text in {
        "a": "The unity of all things. ",
        "b": "Our community is large. ",
        "c": "Unity, but spam. ",
    }.items():
        (tmp_path / f"{name}.md").write_text(text * 10, "utf-8")
    documents, reports = sources.collect([spec(tmp_path)], keywords=("unity",), negative_keywords=("SPAM",))
    assert [d.title for d in documents] == ["a"]
    assert reports[0].skipped == {"no keyword": 1, "negative keyword": 1}
    assert "no keyword (e.g. here:b.md)" in reports[0].sentence()


def test_the_same_text_in_two_sources_is_kept_once(tmp_path: Path) -> None:
    write_corpus(tmp_path, pages=2, modules=0)
    documents, reports = sources.collect([spec(tmp_path), spec(tmp_path, id="copy")])
    assert {d.source for d in documents} == {"here"}
    assert reports[1].skipped == {"same text as an earlier document": 2}


def test_the_fingerprint_follows_content_settings_and_specs(tmp_path: Path) -> None:
    write_corpus(tmp_path, pages=2, modules=1)
    first = sources.fingerprint([spec(tmp_path)], {"seed": 0})
    assert sources.fingerprint([spec(tmp_path)], {"seed": 0}) == first
    assert sources.fingerprint([spec(tmp_path)], {"seed": 1}) != first
    assert sources.fingerprint([spec(tmp_path, weight=2.0)], {"seed": 0}) != first
    (tmp_path / "docs" / "topic00.md").write_text("changed", "utf-8")
    assert sources.fingerprint([spec(tmp_path)], {"seed": 0}) != first


def test_a_docstring_page_shows_headings_signatures_and_no_private_names() -> None:
    page = stdlib.docstring_page(
        "box",
        '"""Boxes."""\n'
        "class Box(Base):\n"
        '    """A box."""\n'
        "    def __init__(self, size: int = 3, *rest, colour='red'):\n"
        '        """Make it."""\n'
        "    def _hidden(self):\n"
        '        """No."""\n'
        "def pack(a, /, b=None, **more):\n"
        '    """Put a into b."""\n'
        "def bare(): pass\n",
    )
    assert page == (
        "# box\n\nBoxes.\n\n## class box.Box(Base)\n\nA box.\n\n"
        "## box.Box.__init__(self, size=3, *rest, colour='red')\n\nMake it.\n\n"
        "## box.pack(a, /, b=None, **more)\n\nPut a into b.\n"
    )


def test_generated_tables_are_told_from_code() -> None:
    table = "TABLE = {\n" + "".join(f"    {n}: '{n:x}',\n" for n in range(800)) + "}\n"
    code = "".join(f"def f{n}(x):\n    return x + {n}\n" for n in range(400))
    assert stdlib.is_table(table)
    assert not stdlib.is_table(code)


def test_library_modules_leave_out_tests_and_installed_packages() -> None:
    names = [name for name, _ in stdlib.modules(stdlib.library_root())]
    assert names == sorted(names)
    assert {"textwrap", "json.decoder", "asyncio"} <= set(names)
    assert not [n for n in names if set(n.split(".")) & {"test", "tests", "idle_test", "site-packages", "turtledemo"}]
    assert not [n for n in names if n.startswith("encodings.")]


def test_topics_and_one_module_become_documents() -> None:
    topics = stdlib.collect(SourceSpec(id="std", type="stdlib", parts=("topics",))).documents
    assert len(topics) > 50
    assert {"assert", "lambda", "yield"} <= {d.title for d in topics}
    assert {d.license for d in topics} == {"PSF-2.0"}
    assert {d.kind for d in topics} == {"docs"}
