"""What `follow` finds and what the mirror makes of it: the copy is the source, byte for byte, whatever happens."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jupiter_engine.cluster.frames import FileFrame, ResetFrame
from jupiter_engine.cluster.mirror import Limits, Mirror
from jupiter_engine.errors import DiskFull, RemoteError
from jupiter_engine.node.tail import Known, Tail, problem_of

PATTERNS = ("events.jsonl", "*.log", "results/*.jsonl", "ranks/*/*.json")
NAMES = ("events.jsonl", "worker.log", "results/a.jsonl", "results/b.jsonl", "ranks/1/state.json")


def tail_for(source: Path, mirror: Mirror) -> Tail:
    """What a fresh `follow` knows: only what the mirror says it has."""
    have = {path: Known(found.inode, found.offset, found.check) for path, found in mirror.have().items()}
    return Tail(str(source), list(PATTERNS), have)


def frames(tail: Tail, piece_bytes: int) -> Iterator[FileFrame | ResetFrame]:
    for found in tail.look():
        for header, content in tail.news(found, piece_bytes):
            if header["f"] == "file":
                yield FileFrame(path=header["path"], inode=header["inode"], offset=header["offset"], data=content)
            else:
                yield ResetFrame(path=header["path"], inode=header["inode"], size=header["size"])


def apply(mirror: Mirror, found: Iterator[FileFrame | ResetFrame], limit: int = 1 << 30) -> int:
    """Apply at most `limit` frames; how many came."""

    async def work() -> int:
        count = 0
        for frame in found:
            if count >= limit:
                break
            await mirror.apply(frame)
            count += 1
        return count

    return asyncio.run(work())


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in NAMES if (folder / name).exists()}


@contextmanager
def two_folders() -> Iterator[tuple[Path, Path]]:
    base = Path(tempfile.mkdtemp(prefix="jupiter-mirror-"))
    try:
        (base / "source").mkdir()
        (base / "copy").mkdir()
        yield base / "source", base / "copy"
    finally:
        shutil.rmtree(base)


ACTS = st.one_of(
    st.tuples(st.just("append"), st.sampled_from(NAMES), st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("append_line"), st.sampled_from(NAMES), st.integers(0, 10**9)),
    st.tuples(st.just("replace"), st.sampled_from(NAMES), st.binary(max_size=60)),
    st.tuples(st.just("recreate"), st.sampled_from(NAMES), st.binary(max_size=60)),
    st.tuples(st.just("rewrite"), st.sampled_from(NAMES), st.binary(min_size=1, max_size=60)),
    st.tuples(st.just("cut"), st.sampled_from(NAMES), st.integers(0, 50)),
    st.tuples(st.just("look"), st.just(""), st.integers(1, 30)),
    st.tuples(st.just("partly"), st.just(""), st.integers(0, 4)),
    st.tuples(st.just("restart"), st.just(""), st.just(0)),
)


def act(source: Path, kind: str, name: str, value: object) -> None:
    path = source / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "append" and isinstance(value, bytes):
        with path.open("ab") as file:
            file.write(value)
    elif kind == "append_line":
        with path.open("ab") as file:
            file.write(json.dumps({"seq": value}).encode() + b"\n")
    elif kind == "replace" and isinstance(value, bytes):
        temp = path.with_name(".new")
        temp.write_bytes(value)
        temp.replace(path)
    elif kind == "recreate" and isinstance(value, bytes):
        # The file system is likely to give the same inode out again.
        path.unlink(missing_ok=True)
        path.write_bytes(value)
    elif kind == "rewrite" and isinstance(value, bytes) and path.exists():
        with path.open("r+b") as file:
            file.write(value)
    elif kind == "cut" and isinstance(value, int) and path.exists():
        os.truncate(path, min(value, path.stat().st_size))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(acts=st.lists(ACTS, max_size=30), piece_bytes=st.sampled_from([1, 7, 64]))
def test_the_copy_becomes_the_source(acts: list[tuple[str, str, object]], piece_bytes: int) -> None:
    with two_folders() as (source, copy):
        mirror = Mirror(copy, PATTERNS)
        tail = tail_for(source, mirror)
        for kind, name, value in acts:
            if kind == "look":
                apply(mirror, frames(tail, piece_bytes))
            elif kind == "partly":
                # The receiver is killed after some frames: all it knew but the files is gone.
                assert isinstance(value, int)
                apply(mirror, frames(tail, piece_bytes), value)
                mirror = Mirror(copy, PATTERNS)
                tail = tail_for(source, mirror)
            elif kind == "restart":
                mirror = Mirror(copy, PATTERNS)
                tail = tail_for(source, mirror)
            else:
                act(source, kind, name, value)
        apply(mirror, frames(tail, piece_bytes))
        assert contents(copy) == contents(source)
        assert apply(mirror, frames(tail, piece_bytes)) == 0, "nothing is sent twice"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    lines=st.lists(st.integers(0, 10**6), max_size=12),
    cuts=st.lists(st.integers(1, 60), max_size=6),
    restarts=st.sets(st.integers(0, 5)),
)
def test_each_event_is_held_back_until_it_may_be_seen(lines: list[int], cuts: list[int], restarts: set[int]) -> None:
    content = b"".join(json.dumps({"seq": at, "value": value}).encode() + b"\n" for at, value in enumerate(lines))
    with two_folders() as (source, copy):
        seen: list[bytes] = []
        here = copy / "events.jsonl"

        async def before(line: bytes) -> None:
            shown = here.read_bytes() if here.exists() else b""
            assert line + b"\n" not in shown, "it is not to be seen before we were asked"
            assert shown == b"".join(known + b"\n" for known in seen)
            await asyncio.sleep(0)
            seen.append(line)

        mirror = Mirror(copy, PATTERNS, before_events=before)
        tail = tail_for(source, mirror)
        done = 0
        for at, cut in enumerate([*cuts, len(content)]):
            act(source, "append", "events.jsonl", content[done : done + cut])
            done += cut
            apply(mirror, frames(tail, 5))
            assert not here.exists() or here.read_bytes().endswith(b"\n") or not here.read_bytes()
            if at in restarts:
                mirror = Mirror(copy, PATTERNS, before_events=before)
                tail = tail_for(source, mirror)
        apply(mirror, frames(tail, 5))
        assert seen == content.splitlines()
        assert not content or here.read_bytes() == content


def test_events_of_a_replaced_file_are_not_announced_again(tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.mkdir()
    copy.mkdir()
    seen: list[bytes] = []

    async def before(line: bytes) -> None:
        seen.append(line)

    mirror = Mirror(copy, PATTERNS, before_events=before)
    tail = tail_for(source, mirror)
    (source / "events.jsonl").write_bytes(b'{"seq": 1}\n{"seq": 2}\n{"se')
    apply(mirror, frames(tail, 1000))
    # The worker was killed in the middle of a line; its successor drops that and goes on.
    os.truncate(source / "events.jsonl", 22)
    with (source / "events.jsonl").open("ab") as file:
        file.write(b'{"at": 3}\n')
    apply(mirror, frames(tail, 4))
    assert seen == [b'{"seq": 1}', b'{"seq": 2}', b'{"at": 3}']
    assert (copy / "events.jsonl").read_bytes() == (source / "events.jsonl").read_bytes()


def test_rows_are_sent_before_the_event_that_announces_them(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    tail = Tail(str(tmp_path), ["events.jsonl", "results/*.jsonl", "node/events.jsonl"], {})
    (tmp_path / "events.jsonl").write_bytes(b"first\n")
    found = tail.look()
    # Between the look and the reading a worker adds a row and announces it.
    (tmp_path / "results" / "a.jsonl").write_bytes(b"row\n")
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b"second\n")
    sent = [content for entry in found for _, content in tail.news(entry, 1000)]
    assert sent == [b"first\n"], "the announcement waits for the next look"
    order = [(header["path"], content) for entry in tail.look() for header, content in tail.news(entry, 1000)]
    assert order == [("results/a.jsonl", b"row\n"), ("events.jsonl", b"second\n")]


def test_no_link_and_nothing_special_is_followed(tmp_path: Path) -> None:
    source, secret = tmp_path / "source", tmp_path / "secret"
    (source / "results").mkdir(parents=True)
    secret.mkdir()
    (secret / "x.jsonl").write_bytes(b"secret")
    (source / "a.log").symlink_to(secret / "x.jsonl")
    (source / "ranks").symlink_to(secret)
    (source / "results" / "inner").symlink_to(secret)
    os.mkfifo(source / "fifo.log")
    (source / ".hidden.log").write_bytes(b"hidden")
    (source / "real.log").write_bytes(b"real")
    tail = Tail(str(source), ["*.log", "ranks/*.jsonl", "results/*/*.jsonl", "results/inner/x.jsonl"], {})
    assert [found.path for found in tail.look()] == ["real.log"]
    # A file may become a link between the look and the reading.
    found = tail.look()[0]
    (source / "real.log").unlink()
    (source / "real.log").symlink_to(secret / "x.jsonl")
    assert list(tail.news(found, 100)) == []


@pytest.mark.parametrize("pattern", ["", "/etc/passwd", "../x", "a//b", "a/./b", ".ssh/*", "a/" * 9 + "b", "a\0"])
def test_a_pattern_stays_below_the_folder(pattern: str) -> None:
    assert problem_of(pattern)


def test_thousands_of_files_arrive(tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    (source / "results").mkdir(parents=True)
    copy.mkdir()
    for number in range(3000):
        (source / "results" / f"{number}.jsonl").write_bytes(b"%d\n" % number)
    mirror = Mirror(copy, PATTERNS)
    tail = tail_for(source, mirror)
    assert apply(mirror, frames(tail, 1 << 20)) == 3000
    assert len(list((copy / "results").iterdir())) == 3000
    again = Mirror(copy, PATTERNS)
    assert apply(again, frames(tail_for(source, again), 1 << 20)) == 0, "a restart fetches nothing again"


def refuses(mirror: Mirror, *frames: FileFrame | ResetFrame) -> str:
    with pytest.raises(RemoteError) as caught:
        apply(mirror, iter(frames))
    return caught.value.detail


def piece(path: str, offset: int, data: bytes = b"x", inode: int = 1) -> FileFrame:
    return FileFrame(path=path, inode=inode, offset=offset, data=data)


def test_gaps_overlaps_and_foreign_files_are_refused(tmp_path: Path) -> None:
    mirror = Mirror(tmp_path, (*PATTERNS, "spec.json", "SPEC.json", "inbox/*"))
    mirror.have()
    assert "goes on at 5, not at 0" in refuses(mirror, piece("a.log", 5))
    assert "goes on at 0, not at 1" in refuses(mirror, piece("a.log", 0), piece("a.log", 0))
    assert "another file" in refuses(mirror, piece("a.log", 1, inode=2))
    assert "after its reset" in refuses(mirror, ResetFrame(path="a.log", inode=3, size=4), piece("a.log", 1, inode=3))
    for path in ("spec.json", "SPEC.json", "inbox/halt"):
        assert "not its to write" in refuses(mirror, piece(path, 0))
    for path in (
        "../a.log",
        "/etc/a.log",
        "results/../a.log",
        "b.txt",
        "results//a.jsonl",
        "a\n.log",
        ".a.log",
        "x\\.log",
    ):
        refuses(mirror, piece(path, 0))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mirror", ".mirror.jsonl", "a.log"]
    assert (tmp_path / "a.log").read_bytes() == b"x"


def test_a_node_cannot_fill_our_disk(tmp_path: Path) -> None:
    mirror = Mirror(tmp_path, ("*.log",), limits=Limits(files=2, file_bytes=10, total_bytes=15))
    mirror.have()
    apply(mirror, iter([piece("a.log", 0, b"x" * 10), piece("b.log", 0, b"y")]))
    assert "11 bytes" in refuses(mirror, piece("a.log", 10))
    assert "16 in all" in refuses(mirror, piece("b.log", 1, b"z" * 5))
    assert "more than 2 files" in refuses(mirror, piece("c.log", 0))
    assert "99 bytes" in refuses(mirror, ResetFrame(path="a.log", inode=9, size=99))


def test_a_link_in_the_copy_leads_nowhere(tmp_path: Path) -> None:
    copy, elsewhere = tmp_path / "copy", tmp_path / "elsewhere"
    copy.mkdir()
    elsewhere.mkdir()
    (copy / "results").symlink_to(elsewhere)
    (copy / "a.log").symlink_to(elsewhere / "a.log")
    mirror = Mirror(copy, PATTERNS)
    mirror.have()
    assert "link" in refuses(mirror, piece("results/a.jsonl", 0))
    with pytest.raises(OSError, match="symbolic links"):
        apply(mirror, iter([piece("a.log", 0)]))
    assert list(elsewhere.iterdir()) == []


def test_a_replaced_file_is_never_seen_in_part(tmp_path: Path) -> None:
    (tmp_path / "ranks" / "1").mkdir(parents=True)
    mirror = Mirror(tmp_path, PATTERNS)
    mirror.have()
    name = "ranks/1/state.json"
    apply(mirror, iter([piece(name, 0, b"old")]))
    apply(mirror, iter([ResetFrame(path=name, inode=2, size=6), piece(name, 0, b"new", inode=2)]))
    assert (tmp_path / name).read_bytes() == b"old"
    apply(mirror, iter([piece(name, 3, b"er!", inode=2), piece(name, 6, b"+", inode=2)]))
    assert (tmp_path / name).read_bytes() == b"newer!+"


def test_a_full_disk_here_leaves_no_half_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = Mirror(tmp_path, PATTERNS)
    mirror.have()
    apply(mirror, iter([piece("a.log", 0, b"first")]))
    real, room = os.write, random.Random(1).randint(1, 8)

    def short_write(fd: int, data: bytes) -> int:
        if len(data) <= room:
            raise OSError(28, "No space left on device")
        return real(fd, bytes(data)[: len(data) - room])

    monkeypatch.setattr(os, "write", short_write)
    with pytest.raises(DiskFull):
        apply(mirror, iter([piece("a.log", 5, b"second piece")]))
    monkeypatch.undo()
    assert (tmp_path / "a.log").read_bytes() == b"first"
    apply(mirror, iter([piece("a.log", 5, b"second piece")]))
    assert (tmp_path / "a.log").read_bytes() == b"firstsecond piece"


def test_a_quiet_file_is_not_read_again(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_bytes(b"content")
    tail = Tail(str(tmp_path), ["*.log"], {})
    assert [content for entry in tail.look() for _, content in tail.news(entry, 100)] == [b"content"]
    time.sleep(0.15)
    assert [1 for entry in tail.look() for _ in tail.news(entry, 100)] == []
    settled = tail.known["a.log"]
    assert settled.changed_ns == (tmp_path / "a.log").stat().st_ctime_ns
    (tmp_path / "a.log").write_bytes(b"CONTENT")
    assert [content for entry in tail.look() for _, content in tail.news(entry, 100)] == [b"", b"CONTENT"]


@pytest.mark.parametrize("damage", [b'{"path":"worker.l', b"\x00" * 40, b'{"path":"\xff","inode":1}', b"[]"])
def test_a_power_cut_in_the_list_of_files_costs_a_transfer_at_most(tmp_path: Path, damage: bytes) -> None:
    with two_folders() as (source, copy):
        for name in ("worker.log", "results/a.jsonl"):
            (source / name).parent.mkdir(exist_ok=True)
            (source / name).write_bytes(b"one\n")
            mirror = Mirror(copy, PATTERNS)
            apply(mirror, frames(tail_for(source, mirror), 64))
        inodes = copy / ".mirror.jsonl"
        lines = inodes.read_bytes().splitlines(keepends=True)
        for torn in (b"".join(lines) + damage, damage + b"\n" + lines[-1], lines[0] + damage + b"\n"):
            inodes.write_bytes(torn)
            for name in ("worker.log", "results/a.jsonl", "results/b.jsonl"):
                with (source / name).open("ab") as file:
                    file.write(b"two\n")
            for _ in range(2):
                mirror = Mirror(copy, PATTERNS)
                apply(mirror, frames(tail_for(source, mirror), 64))
                assert contents(copy) == contents(source)
