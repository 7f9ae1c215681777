"""Thousands of damaged settings files: only ConfigError may come out, and every problem names its place."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jupiter_engine.errors import ConfigError
from jupiter_engine.settings.cluster import load_cluster
from jupiter_engine.settings.domain import load_domain
from jupiter_engine.settings.workspace import shipped_folder

FILES = ("cluster.yaml", "domains/python.yaml", "domains/_template.yaml")
# Problems of the file as a whole; everything else must name a line.
OF_THE_FILE = re.compile(r"yaml: (the file is empty|the YAML cannot be read|.*further problems)")


def check(file: Path, name: str) -> bool:
    """Load a file; True if it was refused. Anything but ConfigError is the test's failure."""
    try:
        (load_cluster if name == "cluster.yaml" else load_domain)(file)
    except ConfigError as error:
        refused = error
    else:
        return False
    assert refused.problems
    for problem in refused.problems:
        assert problem.startswith(str(file)), problem
        assert re.match(r".*\.yaml, line \d+, column \d+: ", problem) or OF_THE_FILE.search(problem), problem
        assert problem.endswith((".", "?")), problem
        assert problem.isprintable(), problem
    assert refused.sentence().isprintable()
    return True


def flip_bytes(data: bytes, chance: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 4, 40))):
        out[chance.randrange(len(out))] = chance.randrange(256)
    return bytes(out)


def of_lines(change: Callable[[list[bytes], int, random.Random], None]) -> Callable[[bytes, random.Random], bytes]:
    def mutate(data: bytes, chance: random.Random) -> bytes:
        lines = data.split(b"\n")
        code = [i for i, line in enumerate(lines) if line.strip() and not line.strip().startswith(b"#")]
        for _ in range(chance.choice((1, 1, 2))):
            change(lines, min(chance.choice(code), len(lines) - 1), chance)
        return b"\n".join(lines)

    mutate.__name__ = change.__name__
    return mutate


def delete_line(lines: list[bytes], i: int, _: random.Random) -> None:
    del lines[i]


def repeat_line(lines: list[bytes], i: int, _: random.Random) -> None:
    lines.insert(i, lines[i])


def move_line(lines: list[bytes], i: int, chance: random.Random) -> None:
    lines.insert(chance.randrange(len(lines)), lines.pop(i))


def indent(lines: list[bytes], i: int, chance: random.Random) -> None:
    lines[i] = chance.choice((b" ", b"  ", b"\t", b"    ")) + lines[i]


def dedent(lines: list[bytes], i: int, chance: random.Random) -> None:
    lines[i] = lines[i][chance.choice((1, 2)) :]


def typo(lines: list[bytes], i: int, chance: random.Random) -> None:
    words = list(re.finditer(rb"[A-Za-z_]+(?=:)", lines[i]))
    if words:
        word = chance.choice(words)
        at = chance.randrange(word.start(), word.end())
        letter = chance.choice((b"", b"x", lines[i][at : at + 1] * 2))
        lines[i] = lines[i][:at] + letter + lines[i][at + 1 :]


VALUES = [
    *(b"", b"null", b"yes", b"off", b"1", b"0", b"-1", b"1.5", b"1e400", b".nan", b"-.inf", b"010", b"1:30", b"0x1F"),
    *(b"[]", b"{}", b"[[]]", b"{a: 1}", b"'1'", b'"', b"'", b"a: b", b"[", b"{", b"}", b"*a", b"&a b", b"!x y"),
    *(b"!!python/object:os.system x", b"|", b">", b"---", b"...", b"%", b"@", b"`", b"<<: {}", b"? x", b"2024-01-01"),
    *(
        b"\xff",
        b"\x00",
        b"\xef\xbb\xbf",
        "ñ".encode(),
        b'"\\ud800"',
        b'"\\x00"',
        b"9" * 5000,
        b"~user/x",
        b"/",
        b"http://x",
    ),
]


def swap_value(lines: list[bytes], i: int, chance: random.Random) -> None:
    key, colon, _ = lines[i].partition(b":")
    if colon:
        lines[i] = key + b": " + chance.choice(VALUES)


def swap_inline(lines: list[bytes], i: int, chance: random.Random) -> None:
    lines[i] = re.sub(
        rb"(?<=: )[^,}]+(?=[,}])",
        lambda match: chance.choice((*VALUES, match.group())),
        lines[i],
        count=chance.randrange(1, 3),
    )


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def insert(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(data))
    return data[:at] + chance.choice(VALUES) + data[at:]


MUTATIONS = [
    flip_bytes,
    cut,
    insert,
    *map(of_lines, (delete_line, repeat_line, move_line, indent, dedent, typo, swap_value, swap_inline)),
]


def mutate(name: str, rounds: int, folder: Path, seed: int) -> dict[str, int]:
    """Load `rounds` damaged copies for each kind of damage; returns how many of each kind were refused."""
    data = (shipped_folder() / name).read_bytes()
    file = folder / Path(name).name
    refused: dict[str, int] = {}
    for mutation in MUTATIONS:
        chance = random.Random(f"{seed} {name} {mutation.__name__}")
        refused[mutation.__name__] = 0
        for _ in range(rounds):
            file.write_bytes(mutation(data, chance))
            refused[mutation.__name__] += check(file, name)
    return refused


@pytest.mark.parametrize("name", FILES)
def test_damaged_files(name: str, tmp_path: Path) -> None:
    refused = mutate(name, 12, tmp_path, seed=1)
    assert refused["typo"] >= 8
    assert refused["swap_value"] >= 6


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_thousands_of_damaged_files(name: str, tmp_path: Path) -> None:
    mutate(name, 150, tmp_path, seed=2)


# Text that is mostly YAML's own punctuation reaches corners that words never do.
_YAMLISH = st.text(
    alphabet=st.sampled_from(list(" \n\t:-?[]{},#&*!|>'\"%@`~<=\\abn01.eE_xñ\u2028\x85\ufeff")), max_size=80
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.one_of(st.binary(max_size=60), _YAMLISH.map(lambda text: text.encode())))
def test_any_bytes_at_all(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_bytes(data)
    check(file, "cluster.yaml")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=_YAMLISH, key=st.sampled_from(["base", "sources", "generation", "mix_ratio", "data_sources", "training"]))
def test_any_value_of_a_section(value: str, key: str, tmp_path: Path) -> None:
    file = tmp_path / "rocks.yaml"
    file.write_bytes(f"domain: {{name: rocks}}\n{key}: {value}\n".encode())
    assert check(file, "rocks.yaml")
