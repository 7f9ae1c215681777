"""Copies on the leading host: byte for byte what `follow` sends, and nothing that was not asked for."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from jupiter_engine.node import program
from jupiter_engine.node.errors import NodeError
from jupiter_engine.node.mirror import FRAME_BYTES, Mirror


def frames(*parts: dict[str, Any] | bytes) -> io.BytesIO:
    return io.BytesIO(
        b"".join(part if isinstance(part, bytes) else json.dumps(part).encode() + b"\n" for part in parts)
    )


def mirror(folder: Path) -> Mirror:
    return Mirror({"rank-1.log": folder / "rank-1.log"})


def take_all(target: Mirror, stream: io.BytesIO) -> None:
    while target.take(stream) is not None:
        pass


def test_appends_resets_and_says_what_it_has(tmp_path: Path) -> None:
    target = mirror(tmp_path)
    stream = frames(
        *({"f": "file", "path": "rank-1.log", "inode": 7, "offset": 0, "size": 3}, b"one"),
        {"f": "beat", "at": 1.0, "state": {}},
        *({"f": "file", "path": "rank-1.log", "inode": 7, "offset": 3, "size": 4}, b"\ntwo"),
    )
    take_all(target, stream)
    assert (tmp_path / "rank-1.log").read_bytes() == b"one\ntwo"
    check = hashlib.sha256(b"one\ntwo").hexdigest()
    assert target.have() == {"rank-1.log": {"offset": 7, "inode": 7, "check": check}}
    assert target.holds({"rank-1.log": 7})
    assert not target.holds({"rank-1.log": 8})
    again = frames(
        {"f": "reset", "path": "rank-1.log", "inode": 8, "size": 2},
        *({"f": "file", "path": "rank-1.log", "inode": 8, "offset": 0, "size": 2}, b"ab"),
    )
    take_all(target, again)
    assert (tmp_path / "rank-1.log").read_bytes() == b"ab"


FILE = {"f": "file", "path": "rank-1.log", "inode": 7, "offset": 0, "size": 1}


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([{**FILE, "path": "rank-2.log"}, b"x"], "nobody asked for"),
        ([{**FILE, "path": "../../etc/passwd"}, b"x"], "nobody asked for"),
        ([{**FILE, "path": ["rank-1.log"]}, b"x"], "nobody asked for"),
        ([{**FILE, "offset": 5}, b"x"], "wanted"),
        ([{**FILE, "size": -1}], "size of a frame"),
        ([{**FILE, "size": FRAME_BYTES + 1}], "size of a frame"),
        ([{**FILE, "size": True}], "size of a frame"),
        ([{**FILE, "size": 10}, b"short"], "middle of a frame"),
        ([{"f": "remove", "path": "rank-1.log", "inode": 7}], "unknown frame"),
        ([b"Welcome to node2!\n"], "no frame"),
        ([b"x" * 100_000], "no frame"),
        ([b"[1, 2]\n"], "no frame"),
        ([{"error": {"kind": "missing", "detail": "the folder is gone"}}], "the folder is gone"),
    ],
)
def test_refused(tmp_path: Path, parts: list[dict[str, Any] | bytes], words: str) -> None:
    target = mirror(tmp_path)
    with pytest.raises(NodeError, match=words):
        take_all(target, frames(*parts))
    assert not (tmp_path / "rank-1.log").exists() or (tmp_path / "rank-1.log").read_bytes() == b""


def test_goes_on_where_a_broken_connection_ended(tmp_path: Path) -> None:
    """Against the real `follow`, twice: nothing is sent or written twice."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "rank-1.log").write_bytes(b"a" * 100_000)
    target = Mirror({"rank-1.log": tmp_path / "copy" / "rank-1.log"})
    sent = []
    for more in (b"", b"b" * 10):
        with (source / "rank-1.log").open("ab") as file:
            file.write(more)
        request = {"root": str(source), "patterns": target.paths, "have": target.have(), "beat_s": 0.1, "poll_s": 0.02}
        process = subprocess.Popen(program.argv("follow"), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            while not target.holds({"rank-1.log": (source / "rank-1.log").stat().st_size}):
                frame = target.take(process.stdout)
                assert frame is not None
                sent.append(frame.get("size", 0))
            process.kill()
    assert (tmp_path / "copy" / "rank-1.log").read_bytes() == (source / "rank-1.log").read_bytes()
    assert sum(sent) == 100_010
