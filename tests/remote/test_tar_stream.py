"""Tar streams: what we write real tar understands, what a hostile machine writes gets nowhere."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jupiter_engine.errors import DiskFull
from jupiter_engine.remote.tar_stream import Receiver, TarRefused, checked_name, pieces


def entry(name: str, data: bytes = b"", **fields: object) -> bytes:
    """One entry exactly as given, however wrong."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    written = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    return written + data + bytes(-len(data) % 512)


END = bytes(1024)


def receive(stream: bytes, target: Path, names: list[str], *, limit_bytes: int = 1 << 20, step: int = 1000) -> None:
    receiver = Receiver(target, names, limit_bytes=limit_bytes)
    try:
        for at in range(0, len(stream), step):
            receiver.feed(stream[at : at + step])
        receiver.finish()
    finally:
        receiver.close()


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


HOSTILE = {
    "parent": entry("../out", b"x"),
    "parent inside": entry("a/../../out", b"x"),
    "absolute": entry("/tmp/jupiter-out", b"x"),
    "unasked": entry("other", b"x"),
    "twice": entry("a", b"x") + entry("a", b"y"),
    "symlink": entry("a", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": entry("a", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
    "device": entry("a", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
    "fifo": entry("a", type=tarfile.FIFOTYPE),
    "folder": entry("a", type=tarfile.DIRTYPE),
    "sparse": entry("a", type=tarfile.GNUTYPE_SPARSE),
    "too large": entry("a", bytes(1025)),
    "pax path": entry("a", b"x", pax_headers={"path": "../out"}),
    "pax size": entry("a", b"x", pax_headers={"size": "99999999999"}),
    "huge header": entry("x", bytes(70_000), type=tarfile.XHDTYPE),
    "endless pax": entry("x", b"9999999 path=a\n", type=tarfile.XHDTYPE),
    "pax without length": entry("x", b"path=a\n", type=tarfile.XHDTYPE),
    "pax size text": entry("x", b"13 size=many\n", type=tarfile.XHDTYPE),
    "pax negative": entry("x", b"11 size=-1\n", type=tarfile.XHDTYPE),
    "no tar": b"HTTP/1.1 200 OK\r\n" * 100,
    "broken sum": b"b" + entry("a", b"x")[1:],
    "short": entry("a", bytes(600))[:700],
    "nothing": b"",
    "only the end": END,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_streams_write_nothing_outside_and_leave_no_half_file(name: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(TarRefused):
        receive(HOSTILE[name] + (END if name not in ("short", "nothing") else b""), target, ["a"], limit_bytes=1024)
    left = everything(tmp_path)
    assert left in (["target"], ["target", "target/a"])
    if "target/a" in left:
        assert not (target / "a").is_symlink()
        assert (target / "a").read_bytes() == b"x"


def test_a_link_that_is_already_there_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("safe")
    target = tmp_path / "target"
    target.mkdir()
    (target / "a").symlink_to(tmp_path / "outside")
    receive(entry("a", b"new") + END, target, ["a"])
    assert (tmp_path / "outside").read_text() == "safe"
    assert not (target / "a").is_symlink()
    (target / "d").symlink_to(tmp_path)
    with pytest.raises(TarRefused, match="leads out"):
        receive(entry("d/b", b"new") + END, target, ["d/b"])
    assert not (tmp_path / "b").exists()


def test_modes_keep_only_whether_it_can_be_run(tmp_path: Path) -> None:
    receive(entry("a", b"x", mode=0o6777) + entry("b", b"x", mode=0o666) + END, tmp_path, ["a", "b"])
    assert (tmp_path / "a").stat().st_mode & 0o7777 == 0o755
    assert (tmp_path / "b").stat().st_mode & 0o7777 == 0o644


def test_what_comes_after_the_end_is_ignored(tmp_path: Path) -> None:
    receive(entry("a", b"x") + END + entry("b", b"y") + os.urandom(5000), tmp_path, ["a"])
    assert everything(tmp_path) == ["a"]


def test_no_room_is_said_before_it_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100 << 20))
    with pytest.raises(DiskFull):
        receive(entry("a", bytes(80 << 20)), tmp_path, ["a"], limit_bytes=1 << 30, step=1 << 20)
    assert not everything(tmp_path)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_every_form_of_tar_is_read(form: int, tmp_path: Path) -> None:
    names = ["plain", "n" * 90 + "/" + "m" * 90, "./dotted"]
    if form != tarfile.USTAR_FORMAT:
        names += ["long" * 40 + "/" + "x" * 200, "日本"]
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 700
            archive.addfile(info, io.BytesIO(name.encode().ljust(700)))
    wanted = [name.removeprefix("./") for name in names]
    receive(stream.getvalue(), tmp_path, wanted)
    assert {name: (tmp_path / name).read_bytes() for name in wanted} == {
        name.removeprefix("./"): name.encode().ljust(700) for name in names
    }


@given(sizes=st.lists(st.integers(0, 3000), max_size=5), step=st.integers(1, 4000), piece=st.integers(1, 3000))
@settings(max_examples=40, deadline=None)
def test_there_and_back_in_pieces_of_any_size(
    sizes: list[int], step: int, piece: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tar")
    files = []
    for number, size in enumerate(sizes):
        path = folder / f"source{number}"
        path.write_bytes(os.urandom(size))
        files.append((path, f"d{number}/it's {number}"))
    written = [*pieces(files, piece)]
    assert sum(content for _, content in written) == sum(sizes)
    receive(b"".join(data for data, _ in written), folder / "back", [name for _, name in files], step=step)
    for path, name in files:
        assert (folder / "back" / name).read_bytes() == path.read_bytes()


def test_real_tar_reads_what_we_write(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(100_000))
    source.chmod(0o755)
    names = ["plain", "deep/er/it's\n", "é" * 60 + "/" + "y" * 200, "\udcff"]
    stream = b"".join(data for data, _ in pieces([(source, name) for name in names], 1 << 16))
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-x", "-f", "-", "-C", str(tmp_path / "out")], input=stream, check=True)
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == source.read_bytes()
        assert (tmp_path / "out" / name).stat().st_mode & 0o777 == 0o755


def test_only_regular_files_are_sent(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    writer = os.open(tmp_path / "fifo", os.O_RDWR)
    try:
        with pytest.raises(TarRefused, match="regular"):
            list(pieces([(tmp_path / "fifo", "a")], 1000))
    finally:
        os.close(writer)


def test_a_file_that_shrinks_meanwhile_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    stream = pieces([(path, "a")], 1000)
    next(stream)
    os.truncate(path, 10_000)
    with pytest.raises(TarRefused, match="shorter"):
        list(stream)


@pytest.mark.parametrize("name", ["", "/a", "../a", "a/..", "a//b", ".", "a/./b", "a\0b", "a/"])
def test_names_that_are_no_names(name: str) -> None:
    with pytest.raises(TarRefused):
        checked_name(name)
