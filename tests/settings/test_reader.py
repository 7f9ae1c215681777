"""What a settings file may be, and the sentence for everything it may not be."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from msgspec import Meta

from jupiter_engine.errors import ConfigError
from jupiter_engine.protocol.specs import Name, Spec
from jupiter_engine.settings import tree
from jupiter_engine.settings.reader import Loaded, load

LOADERS = [yaml.SafeLoader, *([yaml.CSafeLoader] if yaml.__with_libyaml__ else [])]


class Inner(Spec, frozen=True, kw_only=True):
    word: str = "none"
    rate: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.5


class Example(Spec, frozen=True, kw_only=True):
    name: Name
    count: Annotated[int, Meta(ge=1)] = 1
    switch: bool = False
    color: Literal["red", "green"] = "red"
    words: tuple[str, ...] = ()
    inner: Inner = Inner()
    parts: tuple[Inner, ...] = ()
    note: str | None = None


@pytest.fixture(params=LOADERS, ids=lambda loader: loader.__name__, autouse=True)
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of PyYAML's parsers: the C one is faster, the other one is everywhere."""
    monkeypatch.setattr(tree, "_Loader", request.param)


def read(folder: Path, text: str | bytes) -> Loaded[Example]:
    file = folder / "example.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return load(file, Example)


def problems(folder: Path, text: str | bytes) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        read(folder, text)
    for problem in caught.value.problems:
        assert problem.startswith(str(folder / "example.yaml"))
        assert problem.isprintable()
    return caught.value.problems


def test_values_come_out_typed(tmp_path: Path) -> None:
    text = "name: a-1\ncount: 1_000\nswitch: on\nwords: [x, 'on', \"5\"]\n"
    text += "inner: {rate: 1e-3}\nparts:\n- word: |\n    two\n"
    value = read(tmp_path, text).value
    assert value == Example(
        name="a-1",
        count=1000,
        switch=True,
        words=("x", "on", "5"),
        inner=Inner(rate=0.001),
        parts=(Inner(word="two\n"),),
    )


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    assert read(tmp_path, b"\xef\xbb\xbfname: a\r\ncount: 2\r\n").value == Example(name="a", count=2)


def test_places_are_kept_for_later_messages(tmp_path: Path) -> None:
    places = read(tmp_path, "name: a\nparts:\n  - {word: x}\n").places
    assert (places["parts[0].word"].line, places["parts[0].word"].column) == (3, 12)
    assert "count" not in places


# Each refusal: the file's text, the line the message must name (None: the file), and what it must say.
REFUSALS: dict[str, tuple[str | bytes, int | None, tuple[str, ...]]] = {
    "empty": ("", None, ("the file is empty",)),
    "only comments": ("# nothing\n", None, ("the file is empty",)),
    "null": ("~\n", None, ("the file is empty",)),
    "a list on top": ("- name: a\n", 1, ("begins with a list", "expected a mapping")),
    "a word on top": ("hello\n", 1, ('the text "hello"', "expected a mapping")),
    "no space after the colon": ("name:a\n", 1, ('the text "name:a"', "key: value")),
    "unknown key": ("name: a\ncuont: 3\n", 2, ("`cuont` is not a known key", "did you mean `count`")),
    "unknown key, other case": ("name: a\nCount: 3\n", 2, ("`Count`", "did you mean `count`")),
    "unknown key below": ("name: a\ninner: {wrod: x}\n", 2, ("`inner.wrod`", "did you mean `word`")),
    "unknown key in a list": ("name: a\nparts:\n- {}\n- {wrd: x}\n", 4, ("`parts[1].wrd`", "did you mean `word`")),
    "key of another level": ("name: a\nrate: 0.2\n", 2, ("`rate` is not a known key", "belongs at `inner.rate`")),
    "far from any key": ("name: a\nzzz: 1\n", 2, ("`zzz` is not a known key", "known here: name, count")),
    "a key YAML reads as true": ("name: a\non: 1\n", 2, ("`on` is not a known key", "reads on as true or false")),
    "a key that is a number": ("name: a\n1: 1\n", 2, ("`1` is not a known key",)),
    "a key that is a list": ("name: a\n? [x]\n: 1\n", 2, ("cannot be a key",)),
    "missing key": ("count: 2\n", 1, ("`name` is missing", "expected a name")),
    "key twice": ("name: a\ncount: 2\nname: b\n", 3, ("`name` stands here a second time (first on line 1)",)),
    "key twice below": ("name: a\ninner:\n  rate: 1\n  rate: 1\n", 4, ("`rate` stands here a second time",)),
    "text for number": ("name: a\ncount: many\n", 2, ('`count`: found the text "many"', "whole number of at least 1")),
    "number in quotes": ("name: a\ncount: '3'\n", 2, ('found the text "3"', "remove the quotes")),
    "number with a unit": ("name: a\ncount: 16GB\n", 2, ('"16GB"', "write 16 without quotes or unit")),
    "percent": ("name: a\ninner: {rate: 10%}\n", 2, ('"10%"', "write 0.1")),
    "just too large": (f"name: a\ncount: {2**63}\n", 2, ("the number is too large",)),
    "no colon": ("name: a\ncount 3\nswitch: true\n", 2, ("a key needs a colon",)),
    "list without dashes": ("name: a\nparts:\n  word: x\n", 3, ("begin each entry with a dash",)),
    "name in capitals": ("name: My Rocks\n", 1, ("write my-rocks",)),
    "comma for dot": ("name: a\ninner: {rate: '0,5'}\n", 2, ("use a dot",)),
    "fraction for whole": ("name: a\ncount: 2.5\n", 2, ("found the number 2.5", "write it without a fraction")),
    "2.0 for whole": ("name: a\ncount: 2.0\n", 2, ("found the number 2.0", "write 2")),
    "exponent for whole": ("name: a\ncount: 1e3\n", 2, ("write 1000",)),
    "too small": ("name: a\ncount: 0\n", 2, ("found the number 0", "at least 1")),
    "below an open bound": ("name: a\ninner: {rate: 0}\n", 2, ("`inner.rate`", "greater than 0 and of at most 1")),
    "too large": ("name: a\ninner: {rate: 1.5}\n", 2, ("found the number 1.5", "greater than 0 and of at most 1")),
    "huge": (f"name: a\ncount: {'9' * 400}\n", 2, ("the number is too large",)),
    "huge float": ("name: a\ninner: {rate: 1e999}\n", 2, ("the number is too large",)),
    "not a number": ("name: a\ninner: {rate: .nan}\n", 2, ("found the number .nan", "finite decimal number")),
    "infinity": ("name: a\ninner: {rate: -.inf}\n", 2, ("finite decimal number",)),
    "octal": ("name: a\ncount: 010\n", 2, ("leading zero",)),
    "hexadecimal": ("name: a\ncount: 0x10\n", 2, ("plain decimal number",)),
    "sexagesimal": ("name: a\ncount: 1:30\n", 2, ("plain decimal number",)),
    "true for number": ("name: a\ncount: true\n", 2, ("found true", "expected a whole number")),
    "text for switch": ("name: a\nswitch: maybe\n", 2, ('found the text "maybe"', "expected true or false")),
    "number for switch": ("name: a\nswitch: 1\n", 2, ("found the number 1", "expected true or false")),
    "quoted switch": ("name: a\nswitch: 'true'\n", 2, ("expected true or false",)),
    "yes for text": ("name: yes\n", 1, ("found yes (which YAML reads as true)", 'quote it: "yes"')),
    "off for text": ("name: a\nwords: [off]\n", 2, ("`words[0]`", "reads as false", 'quote it: "off"')),
    "number for text": ("name: a\ninner: {word: 12}\n", 2, ("found the number 12, expected a text", 'quote it: "12"')),
    "date for text": ("name: a\ninner: {word: 2024-01-01}\n", 2, ("found the date 2024-01-01", "quote it")),
    "nothing for text": ("name:\n", 1, ("found nothing", "give a value or remove the key")),
    "nothing for a section": ("name: a\ninner:\n", 2, ("`inner`: found nothing", "expected a mapping")),
    "bad name": ("name: Über alles\n", 1, ('"Über alles"', "small letters")),
    "name with a newline": ('name: "a\\n"\n', 1, ("small letters",)),
    "unknown choice": ("name: a\ncolor: gren\n", 2, ("expected one of green, red", "did you mean green?")),
    "choice in other case": ("name: a\ncolor: RED\n", 2, ("did you mean red?",)),
    "choice as number": ("name: a\ncolor: 1\n", 2, ("expected one of green, red",)),
    "word for list": ("name: a\nwords: x\n", 2, ("`words`", "expected a list", "write [x]")),
    "mapping for list": ("name: a\nwords: {x: 1}\n", 2, ("found a mapping", "expected a list")),
    "list for section": ("name: a\ninner: []\n", 2, ("found a list", "expected a mapping")),
    "list for text": ("name: [a]\n", 1, ("found a list", "expected a name")),
    "section for number": ("name: a\ncount: {}\n", 2, ("found a mapping", "whole number")),
    "anchor": ("name: &x a\n", 1, ("the anchor &x is not supported",)),
    "alias": ("name: &x a\nnote: *x\n", 2, ("the alias *x is not supported",)),
    "undefined alias": ("name: *x\n", 1, ("*x",)),
    "merge": ("name: a\n<<: {count: 2}\n", 2, ("merge key",)),
    "tag": ("name: !!python/object:os.system a\n", 1, ("tag", "not supported")),
    "own tag": ("name: !secret a\n", 1, ('the tag "!secret" is not supported',)),
    "two documents": ("name: a\n---\nname: b\n", 2, ("second YAML document",)),
    "tab for indentation": ("name: a\ninner:\n\tword: x\n", 3, ("a tab is used here",)),
    "open quote": ('name: a\nnote: "x\ncount: 2\n', 2, ("a quote is not closed",)),
    "open bracket": ("name: a\nwords: [x, y\ncount: 2\n", None, ("cannot be read",)),
    "colon in a value": ("name: a\nnote: x: y\n", 2, ("put a value that contains a colon in quotes",)),
    "indentation": ("name: a\n  count: 2\n", 2, ("cannot be read", "indentation")),
    "backslash in quotes": ('name: a\nnote: "C:\\Models"\n', 2, ("backslash",)),
    "value that starts with %": ("name: a\nnote: %x\n", 2, ("quotes",)),
    "not UTF-8": (b"name: a\nnote: caf\xe9\n", 2, ("0xe9 is not UTF-8",)),
    "UTF-16": ("name: a\n".encode("utf-16"), 1, ("UTF-16", "save it as UTF-8")),
    "binary": (bytes(range(128)), 1, ("U+0000 is not allowed",)),
    "binary, not UTF-8": (bytes(range(250, 0, -1)), 1, ("0xfa is not UTF-8",)),
    "NUL": (b"name: a\x00\n", 1, ("U+0000",)),
    "escape character": (b"name: a\nnote: \x1b[31m\n", 2, ("U+001B",)),
    "escaped NUL": ('name: a\nnote: "\\0"\n', 2, ("control character",)),
    "impossible escape": ('name: a\nnote: "\\UFFFFFFFF"\n', None, ("cannot be read",)),
    "too large a file": ("#" * (tree.MAX_BYTES + 1), None, ("larger than 256 KiB",)),
    "too deep": ("name: " + "[" * 30000, 1, ("nested more than",)),
    "too many values": ("words: [" + "1," * 30000 + "]\n", 1, ("more than 20000 values",)),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name: str, tmp_path: Path) -> None:
    text, line, said = REFUSALS[name]
    found = problems(tmp_path, text)
    whole = "\n".join(found)
    for words in said:
        assert words in whole
    if line is not None:
        assert any(f", line {line}, column " in problem for problem in found), whole


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    found = problems(tmp_path, "count: 0\ncolor: blue\ninner: {rate: 2, x: 1}\nwords: 3\n")
    assert [problem.split(":")[0].rsplit("line ")[1].split(",")[0] for problem in found] == [
        "1",
        "1",
        "2",
        "3",
        "3",
        "4",
    ]


def test_a_flood_of_problems_is_cut_short(tmp_path: Path) -> None:
    found = problems(tmp_path, "name: a\nwords: [" + "{}, " * 500 + "]\n")
    assert len(found) == tree.MAX_PROBLEMS + 1
    assert "460 further problems" in found[-1]


@pytest.mark.parametrize(
    "bomb",
    [
        "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"b{i}: &b{i} [{','.join(['*a'] * 9)}]\n" for i in range(50)),
        "a: &a [*a]\n",
        "[" * 200_000,
        "{a: " * 60_000,
        "- " * 100_000,
        "? " * 100_000,
        "a: !!binary " + "A" * 200_000,
        "a: " + "9" * 200_000,
        "a: 0b" + "1" * 200_000,
        "a: 1" + ":59" * 60_000,
        "%YAML 9999999999999999999.1\n---\na: 1\n",
        "%TAG ! !!!!\n---\na: !b 1\n",
    ],
    ids=range(12),
)
def test_a_bomb_is_refused_within_seconds(bomb: str, tmp_path: Path) -> None:
    began = time.monotonic()
    problems(tmp_path, bomb)
    assert time.monotonic() - began < 5


def test_what_is_no_file(tmp_path: Path) -> None:
    def said(path: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            load(path, Example)
        (problem,) = caught.value.problems
        return problem

    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    assert said(tmp_path / "no.yaml") == f"{tmp_path}/no.yaml: there is no such file."
    assert "this is a folder" in said(tmp_path)
    assert "not a regular file" in said(tmp_path / "pipe.yaml")
    assert "cannot be read" in said(tmp_path / "loop.yaml")
    assert "cannot be read" in said(tmp_path / ("x" * 300))
    assert "cannot be read" in said(tmp_path / "a\0b.yaml")
    assert "no such file" in said(Path(os.fsdecode(b"/tmp/\xff\x1b[31m.yaml")))
    assert said(Path(os.fsdecode(b"/tmp/\xff\x1b[31m.yaml"))).isprintable()


def test_a_file_without_read_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "example.yaml"
    file.write_text("name: a\n")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    # The tests may run as root, whom chmod does not stop.
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(ConfigError, match="may not be read; check its permissions"):
        load(file, Example)


def test_the_error_is_one_line_with_a_count(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, "count: 0\nswitch: 7\n")
    assert "(2 more in this file)" in caught.value.sentence()
    assert "\n" not in caught.value.sentence()
    assert caught.value.exit_code == 2


@pytest.mark.slow
def test_settings_load_no_tensor_library_and_load_fast() -> None:
    """The settings stand between a key press and the console: they must cost little to import."""
    code = (
        "import sys;"
        "from jupiter_engine.settings import cluster, domain, workspace;"
        "print(sorted({'numpy', 'torch', 'mlx', 'textual', 'transformers', 'rich'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
