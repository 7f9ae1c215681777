"""Trees and files to a node and back: only what is missing, whole or not at all, whatever the network does."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from jupiter_engine.cluster import conversation, transfer
from jupiter_engine.cluster.contents import HashCache
from jupiter_engine.cluster.conversation import ask
from jupiter_engine.errors import DiskFull, RemoteError, StageFailed
from jupiter_engine.files import sha256_file
from jupiter_engine.node import wire
from jupiter_engine.protocol.fleet import Transfer
from tests.cluster.metered_node import Fault, MeteredNode

BIG = 3 << 20


def make_tree(folder: Path, *, small: int = 40, big: int = 2, seed: int = 1) -> Path:
    chance = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(small):
        path = folder / f"part{i % 5}" / f"file {i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(chance.randbytes(chance.randrange(0, 5000)))
    for i in range(big):
        (folder / f"weights-{i}.bin").write_bytes(chance.randbytes(BIG))
    script = folder / "run.sh"
    script.write_text(f"#!/bin/sh\necho {seed}\n")
    script.chmod(0o755)
    # Old enough for its hash to be remembered.
    for path in folder.rglob("*"):
        os.utime(path, (1.7e9, 1.7e9))
    return folder


def content(folder: Path) -> dict[str, tuple[bytes, bool]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), os.access(path, os.X_OK) and path.stat().st_mode & 0o100 > 0)
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def node(tmp_path: Path) -> MeteredNode:
    (tmp_path / "there").mkdir()
    return MeteredNode.at(tmp_path / "there")


@pytest.fixture
def hashes(tmp_path: Path) -> HashCache:
    return HashCache(tmp_path / "hashes.sqlite")


async def test_a_tree_arrives_and_its_second_push_is_one_short_round_trip(
    node: MeteredNode, hashes: HashCache, tmp_path: Path
) -> None:
    tree = make_tree(tmp_path / "tree")
    told: list[Transfer] = []
    sent = await transfer.send_tree(node, tree, "runs/1/inputs", hashes, told.append)
    there = Path(node.workdir) / "runs/1/inputs"
    assert content(there) == content(tree)
    assert sent.moved_bytes == sent.total_bytes > 2 * BIG
    assert told[-1].sent_bytes == told[-1].total_bytes == sent.total_bytes
    assert [t.step for t in told][-1] == "verifying"

    node.streams.clear()
    node.sent_bytes = 0
    again = await transfer.send_tree(node, tree, "runs/1/inputs", hashes)
    assert again.moved_bytes == 0
    assert again.sha256 == sent.sha256
    assert node.streams == ["tree-take"]
    assert node.sent_bytes < 100


async def test_only_what_changed_is_sent_and_what_is_gone_goes(
    node: MeteredNode, hashes: HashCache, tmp_path: Path
) -> None:
    tree = make_tree(tmp_path / "tree")
    await transfer.send_tree(node, tree, "inputs", hashes)
    (tree / "weights-0.bin").rename(tree / "renamed.bin")
    (tree / "part1" / "file 1.txt").unlink()
    (tree / "new.txt").write_text("new")
    node.sent_bytes = 0
    sent = await transfer.send_tree(node, tree, "inputs", hashes)
    assert content(Path(node.workdir) / "inputs") == content(tree)
    assert sent.moved_bytes == 3
    # The same files under another folder: the node has them all.
    node.sent_bytes = 0
    elsewhere = await transfer.send_tree(node, tree, "other", hashes)
    assert elsewhere.moved_bytes == 0
    assert content(Path(node.workdir) / "other") == content(tree)


@pytest.mark.parametrize("seed", range(6))
async def test_what_arrived_before_a_cut_is_not_sent_again(
    node: MeteredNode, hashes: HashCache, tmp_path: Path, seed: int
) -> None:
    tree = make_tree(tmp_path / "tree", seed=seed)
    total = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())
    cut = random.Random(seed).randrange(20_000, total)
    node.fault = Fault(cut_after_bytes=cut)
    with pytest.raises(RemoteError):
        await transfer.send_tree(node, tree, "inputs", hashes)
    assert not (Path(node.workdir) / "inputs").exists()
    sent = await transfer.send_tree(node, tree, "inputs", hashes)
    assert content(Path(node.workdir) / "inputs") == content(tree)
    # Headers and the manifest also passed before the cut, and the file that was cut may be a small one.
    assert sent.moved_bytes <= total - cut + 20_000 + wire.SMALL_BYTES
    assert sent.moved_bytes < total
    assert not list((Path(node.workdir) / "store").glob("*.part"))


async def test_a_flipped_bit_is_found_and_the_file_sent_again(
    node: MeteredNode, hashes: HashCache, tmp_path: Path
) -> None:
    tree = make_tree(tmp_path / "tree")
    for at in (BIG, BIG + 500_000):
        node.fault = Fault(flip_at_byte=at)
        sent = await transfer.send_tree(node, tree, f"inputs-{at}", hashes)
        assert node.came_true()
        assert content(Path(node.workdir) / f"inputs-{at}") == content(tree)
        assert sent.moved_bytes <= BIG
        for path in (Path(node.workdir) / "store").rglob("*"):
            if path.is_file() and path.name.isalnum():
                assert sha256_file(path) == path.name
        for i in range(2):
            (tree / f"weights-{i}.bin").write_bytes(random.Random(at + i).randbytes(BIG))


async def test_damage_on_the_nodes_disk_is_found(node: MeteredNode, hashes: HashCache, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree")
    await transfer.send_tree(node, tree, "inputs", hashes)
    there = Path(node.workdir) / "inputs"
    (there / "weights-0.bin").chmod(0o644)
    with (there / "weights-0.bin").open("r+b") as file:
        file.write(b"overwritten in place, and so in the store")
    (there / "part0" / "file 0.txt").write_text("other")
    pack = next((Path(node.workdir) / "store" / "packs").glob("*.pack"))
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.write_bytes(data)
    sent = await transfer.send_tree(node, tree, "inputs", hashes)
    assert content(there) == content(tree)
    assert BIG <= sent.moved_bytes < BIG + 6000
    fresh = await transfer.send_tree(node, tree, "fresh", hashes)
    assert content(Path(node.workdir) / "fresh") == content(tree)
    assert fresh.moved_bytes < 6000


async def test_a_full_disk_is_said_before_anything_is_sent(
    node: MeteredNode, hashes: HashCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = make_tree(tmp_path / "tree")
    monkeypatch.setattr(transfer, "SPARE_BYTES", 1 << 60)
    with pytest.raises(DiskFull, match="are needed"):
        await transfer.send_tree(node, tree, "inputs", hashes)
    assert node.sent_bytes < 20_000
    assert not list((Path(node.workdir) / "store").glob("*.part"))


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


async def test_a_disk_that_fills_meanwhile_is_said_with_numbers_and_goes_on_once_there_is_room(
    node: MeteredNode, hashes: HashCache, tmp_path: Path, tiny_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = make_tree(tmp_path / "tree", small=5, big=3)
    node.workdir = str(tiny_disk / "work")
    with pytest.raises(DiskFull, match="are needed"):
        await transfer.send_tree(node, tree, "inputs", hashes)
    # As if there had been room when it began.
    monkeypatch.setattr(transfer, "_require_room", lambda *_: None)
    with pytest.raises(DiskFull, match=r"no room left .* bytes are free"):
        await transfer.send_tree(node, tree, "inputs", hashes)
    assert not (tiny_disk / "work" / "inputs").exists()
    await asyncio.to_thread(subprocess.run, ["mount", "-o", "remount,size=32m", str(tiny_disk)], check=True)
    sent = await transfer.send_tree(node, tree, "inputs", hashes)
    assert content(tiny_disk / "work" / "inputs") == content(tree)
    assert sent.moved_bytes <= sent.total_bytes - BIG


async def test_a_tree_comes_back_and_only_what_is_new(node: MeteredNode, hashes: HashCache, tmp_path: Path) -> None:
    there = make_tree(Path(node.workdir) / "results")
    here = tmp_path / "results"
    got = await transfer.fetch_tree(node, "results", here, hashes, limit_bytes=1 << 30)
    assert content(here) == content(there)
    assert got.moved_bytes == got.total_bytes
    node.fetched_bytes = 0
    again = await transfer.fetch_tree(node, "results", here, hashes, limit_bytes=1 << 30)
    assert again.moved_bytes == 0
    (there / "weights-0.bin").write_bytes(b"x" * 100_000)
    (there / "run.sh").unlink()
    third = await transfer.fetch_tree(node, "results", here, hashes, limit_bytes=1 << 30)
    assert third.moved_bytes == 100_000
    assert content(here) == content(there)
    assert {Path(name).parts[0] for name in content(tmp_path)} == {"results", "there", "hashes.sqlite"}


async def test_fetching_goes_on_after_a_cut_and_finds_flipped_bits(
    node: MeteredNode, hashes: HashCache, tmp_path: Path
) -> None:
    there = make_tree(Path(node.workdir) / "results")
    here = tmp_path / "results"
    total = sum(len(data) for data, _ in content(there).values())
    node.fault = Fault(cut_after_bytes=4 << 20, incoming=True)
    with pytest.raises(RemoteError):
        await transfer.fetch_tree(node, "results", here, hashes, limit_bytes=1 << 30)
    assert not here.exists()
    node.fetched_bytes, node.fault = 0, Fault(flip_at_byte=200_000, incoming=True)
    await transfer.fetch_tree(node, "results", here, hashes, limit_bytes=1 << 30)
    assert node.came_true()
    assert content(here) == content(there)
    # Lost were the piece in which the cut fell, and the whole file in which the bit was flipped.
    assert node.fetched_bytes <= total - (4 << 20) + transfer.BATCH_BYTES + BIG + 50_000


async def test_fetching_is_bounded(node: MeteredNode, hashes: HashCache, tmp_path: Path) -> None:
    make_tree(Path(node.workdir) / "results")
    with pytest.raises(RemoteError, match="limit"):
        await transfer.fetch_tree(node, "results", tmp_path / "here", hashes, limit_bytes=BIG)
    picked = await transfer.fetch_tree(
        node, "results", tmp_path / "here", hashes, limit_bytes=BIG + 100, wanted=lambda name: name == "weights-1.bin"
    )
    assert (picked.files, picked.total_bytes) == (1, BIG)
    with pytest.raises(RemoteError, match="does not have"):
        await transfer.fetch_tree(node, "nothing", tmp_path / "here", hashes, limit_bytes=BIG)


def lying_node(tmp_path: Path, answers: list[object]) -> MeteredNode:
    """A node whose runner says these lines, whatever it is asked."""
    lines = [msgspec.json.encode(answer).decode() for answer in answers]
    script = tmp_path / "liar.py"
    script.write_text(f"import sys\nfor line in {lines!r}:\n    print(line, flush=True)\nsys.stdin.buffer.read()\n")
    return MeteredNode(workdir=str(tmp_path / "lies"), runner=script)


@pytest.mark.parametrize(
    "name", ["../../escaped", "/tmp/escaped", "a/../../escaped", "a//b", "", ".", "a\0b", "x" * 300]
)
async def test_a_node_cannot_write_outside_the_folder(hashes: HashCache, tmp_path: Path, name: str) -> None:
    digest = "0" * 64
    node = lying_node(tmp_path, [{"exists": True, "files": {name: [digest, 3, False]}}])
    with pytest.raises(RemoteError, match="below the folder"):
        await transfer.fetch_tree(node, "results", tmp_path / "in" / "here", hashes, limit_bytes=1 << 20)
    assert not (tmp_path / "in").exists()


@pytest.mark.parametrize(
    "answers",
    [
        [{"current": False}, {"missing": [{"sha256": "f" * 64, "have": 0}], "free_bytes": 1 << 40}],
        [{"current": False}, {"missing": "all"}],
        [{"current": False}, ["missing"]],
        [{"current": "no"}],
        [{"exists": True}],
        [],
    ],
)
async def test_answers_that_do_not_fit_are_refused(
    hashes: HashCache, tmp_path: Path, answers: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "ANSWER_S", 0.5)
    tree = make_tree(tmp_path / "tree", small=3, big=0)
    with pytest.raises(RemoteError) as caught:
        await transfer.send_tree(lying_node(tmp_path, answers), tree, "inputs", hashes)
    assert caught.value.fix


async def test_the_node_refuses_paths_that_lead_out(node: MeteredNode, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    for verb, folder, question in (
        ("tree-place", "inputs", {"files": {"../x": ["0" * 64, 1, False]}}),
        ("tree-place", "inputs", {"files": {"a": ["0" * 64, 1, False], "a/b": ["0" * 64, 1, False]}}),
        ("tree-place", "../precious", {"files": {}}),
        ("tree-place", str(tmp_path / "precious"), {"files": {}}),
        ("tree-send", "inputs", {"files": [{"path": "../../precious/file", "size": 4, "offset": 0}]}),
    ):
        with pytest.raises(RemoteError):
            await ask(node, verb, node.workdir, folder, question=question, limit_bytes=1 << 16)
    link = Path(node.workdir) / "inputs"
    link.mkdir(parents=True, exist_ok=True)
    (link / "way-out").symlink_to(tmp_path / "precious")
    question = {"files": [{"path": "way-out/file", "size": 4, "offset": 0}]}
    with pytest.raises(RemoteError, match="leads out"):
        await ask(node, "tree-send", node.workdir, "inputs", question=question, limit_bytes=1 << 16)
    assert (tmp_path / "precious" / "file").read_text() == "mine"


async def test_a_file_that_grows_while_it_is_sent_is_sent_as_it_is_then(
    node: MeteredNode, hashes: HashCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = make_tree(tmp_path / "tree", small=2, big=1)
    real, changes = transfer.pour, [b"A", b"B"]

    async def changed_first(*arguments: object) -> None:
        if changes:
            (tree / "weights-0.bin").write_bytes(changes.pop() * BIG)
        await real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(transfer, "pour", changed_first)
    await transfer.send_tree(node, tree, "inputs", hashes)
    assert (Path(node.workdir) / "inputs/weights-0.bin").read_bytes() == b"A" * BIG

    (tree / "weights-0.bin").write_bytes(b"G" * BIG)
    changes += [b"C", b"D", b"E", b"F"]
    with pytest.raises(StageFailed, match="other content"):
        await transfer.send_tree(node, tree, "inputs", hashes)
    assert (Path(node.workdir) / "inputs/weights-0.bin").read_bytes() == b"A" * BIG


async def test_hashes_are_remembered_until_a_file_changes(
    hashes: HashCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = make_tree(tmp_path / "tree", small=3, big=1)
    first = hashes.contents(tree)

    def never(path: Path) -> str:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr("jupiter_engine.cluster.contents.sha256_file", never)
    assert hashes.contents(tree).sha256 == first.sha256
    monkeypatch.undo()
    # Same size and, for all that can be seen, the same time: only the inode tells.
    data = bytearray((tree / "weights-0.bin").read_bytes())
    data[0] ^= 1
    (tree / "aside").write_bytes(data)
    (tree / "aside").rename(tree / "weights-0.bin")
    os.utime(tree / "weights-0.bin", (1.7e9, 1.7e9))
    assert hashes.contents(tree).sha256 != first.sha256


async def test_single_files_go_beside_others(node: MeteredNode, hashes: HashCache, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", small=3, big=1)
    there = Path(node.workdir) / "corpus"
    there.mkdir(parents=True)
    (there / "other").write_text("stays")
    files = {"chunks.jsonl": tree / "weights-0.bin", "sub/items.jsonl": tree / "run.sh"}
    sent = await transfer.send_tree(node, files, "corpus", hashes)
    assert sent.moved_bytes == sent.total_bytes
    assert content(there) == {
        "other": (b"stays", False),
        "chunks.jsonl": content(tree)["weights-0.bin"],
        "sub/items.jsonl": content(tree)["run.sh"],
    }
    node.streams.clear()
    again = await transfer.send_tree(node, files, "corpus", hashes)
    assert (again.moved_bytes, node.streams) == (0, ["tree-take"])
    (there / "sub/items.jsonl").write_text("changed there")
    await transfer.send_tree(node, {"sub/items.jsonl": tree / "run.sh"}, "corpus", hashes)
    assert content(there)["sub/items.jsonl"] == content(tree)["run.sh"]
    assert len(content(there)) == 3


async def test_pruning_keeps_what_is_in_use(node: MeteredNode, hashes: HashCache, tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "tree", small=3, big=2)
    await transfer.send_tree(node, tree, "inputs", hashes)
    files = list(hashes.contents(make_tree(tmp_path / "loose", small=0, big=1, seed=9)).files.values())
    await transfer.send_files(node, files)
    kept = await ask(node, "store-prune", node.workdir, "3600", limit_bytes=1 << 16)
    assert kept["removed"] == 0
    gone = await ask(node, "store-prune", node.workdir, "-1", limit_bytes=1 << 16)
    # The loose file and the pack of small ones; the large ones are links that the folder holds.
    assert gone["freed_bytes"] >= BIG
    assert gone["kept_bytes"] >= 2 * BIG
    sent = await transfer.send_tree(node, tree, "inputs", hashes)
    assert sent.moved_bytes == 0
