"""Vectors through real login shells: what arrives is what was sent, whatever it holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jupiter_engine.errors import UsageError
from jupiter_engine.remote import quoting
from tests.ssh_server import parse

SHELLS = ("sh", "bash", "dash", "zsh", "fish", "csh", "tcsh", "ksh", "mksh")
SHOW = (sys.executable, "-c", "import os, sys; print([os.fsencode(a) for a in sys.argv[1:]])")
NASTY = [
    *[
        "",
        " ",
        "a b",
        "it's",
        "'",
        "''",
        "'''",
        '"',
        '"$x"',
        "\\",
        "\\\\",
        "a\\",
        "\\'",
        "a\\nb",
        "!",
        "!!",
        "a!b",
        "!$",
    ],
    *[
        "$(id)",
        "`id`",
        "$HOME",
        "${x}",
        "~",
        "~root",
        "=ls",
        "%self",
        "*",
        "?",
        "[a]",
        "{a,b}",
        ";",
        "&",
        "|",
        "<",
        ">",
    ],
    *[
        "#",
        "^",
        "()",
        "-n",
        "--",
        "-",
        "%s",
        "\n",
        "a\nb\n\n",
        "\r\n",
        "\t",
        "\x7f",
        "\x01\x81",
        "\x1b[31m",
        "é",
        "日本",
    ],
    *["😀", "\udcff\udc81", "a=b", "x" * 5000, ".", "a.", ".\n", "jupiter-begin-0 1\n"],
]
# Everything that a vector can hold: any character, and bytes that are none.
texts = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0") | st.sampled_from("'\\!\n\udc80\udcff")
)


def arrived(shell: str, vector: list[str], environment: dict[str, str]) -> str:
    mark = quoting.new_mark()
    line = quoting.command_line([*SHOW, *vector], mark)
    base = {"PATH": os.environ["PATH"], "HOME": "/"}
    done = subprocess.run([shell, "-c", line], capture_output=True, env={**base, **environment}, check=False)
    assert done.returncode == 0, done.stderr
    first, _, rest = done.stdout.partition(b"\n")
    assert first.decode().split()[0] == mark
    assert done.stderr.decode().split()[0] == mark
    return rest.decode()


def expected(vector: list[str]) -> str:
    return repr([os.fsencode(text) for text in vector]) + "\n"


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
@pytest.mark.parametrize("shell", SHELLS)
def test_nasty_vectors_arrive_through_every_shell(shell: str, locale: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    ascii_only = [text for text in NASTY if text.isprintable() and text.isascii()]
    # Both ways of writing: plain quotes, and octal escapes once anything is beyond printable ASCII.
    assert "printf" not in quoting.command_line([*SHOW, *ascii_only], "m")
    assert "printf" in quoting.command_line([*SHOW, *NASTY], "m")
    for vector in (ascii_only, NASTY):
        assert arrived(shell, vector, {"LC_ALL": locale}) == expected(vector)


@pytest.mark.parametrize("shell", ["bash", "dash", "zsh", "fish", "tcsh"])
@given(vector=st.lists(texts, min_size=1, max_size=6))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_vector_arrives(shell: str, vector: list[str]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    assert arrived(shell, vector, {"LC_ALL": "C.UTF-8"}) == expected(vector)


@given(vector=st.lists(texts, min_size=1, max_size=6))
def test_the_line_is_one_line_of_printable_ascii_and_says_the_vector(vector: list[str]) -> None:
    line = quoting.command_line(["program", *vector], "mark")
    assert line.isascii()
    assert line.isprintable()
    assert parse(line) == ("mark", ("program", *vector))


def test_a_program_with_a_leading_dash_is_no_option_of_exec() -> None:
    assert parse(quoting.command_line(["-x", "-y"], "m")) == ("m", ("./-x", "-y"))


@pytest.mark.parametrize("vector", [[], [""], ["a\0b"], ["a", "b\0"], ["a", "\ud800"]])
def test_what_no_program_can_be_given_is_refused(vector: list[str]) -> None:
    with pytest.raises(UsageError):
        quoting.command_line(vector, "m")


def test_a_vector_too_long_for_a_shell_is_refused_here() -> None:
    quoting.command_line(["a", "x" * 100_000], "m")
    with pytest.raises(UsageError, match=r"take 195\.4 KiB") as caught:
        quoting.command_line(["a", "x" * 200_000], "m")
    assert "standard input" in caught.value.fix
