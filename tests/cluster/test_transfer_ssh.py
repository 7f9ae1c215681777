"""Transfers and pushes through a real sshd, by the connection and the node runner that the product uses."""

from __future__ import annotations

import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from jupiter_engine.cluster import push
from jupiter_engine.cluster.contents import HashCache
from jupiter_engine.cluster.runner import NodeRunner
from jupiter_engine.cluster.targets import Kind
from jupiter_engine.cluster.transfer import fetch_tree, send_tree
from jupiter_engine.errors import RemoteError, StageFailed
from jupiter_engine.protocol.fleet import Transfer
from jupiter_engine.remote.ssh import connect
from jupiter_engine.settings.cluster import ConnectionSettings
from tests.cluster.test_transfer import content, make_tree
from tests.sshd import Sshd, require_sshd, start_sshd

LARGE = 24 << 20


@pytest.fixture
def server(tmp_path: Path) -> Sshd:
    require_sshd()
    folder = tmp_path / "sshd"
    folder.mkdir()
    return start_sshd(folder)


@asynccontextmanager
async def on_node(server: Sshd, tmp_path: Path) -> AsyncIterator[NodeRunner]:
    connection = await connect(
        server.node(), ConnectionSettings(), known_hosts=server.trusted(tmp_path / "known"), ssh_config=None
    )
    try:
        runner = NodeRunner(connection, str(tmp_path / "work dir"), sys.executable)
        await runner.ensure()
        yield runner
    finally:
        await connection.close()


async def test_a_tree_survives_cut_connections_and_comes_back(server: Sshd, tmp_path: Path) -> None:
    try:
        tree = make_tree(tmp_path / "tree", small=30, big=1)
        (tree / "model.bin").write_bytes(random.Random(3).randbytes(LARGE))
        hashes = HashCache(tmp_path / "hashes.db")

        def cut(transfer: Transfer) -> None:
            if transfer.sent_bytes > LARGE // 2:
                server.cut()

        async with on_node(server, tmp_path) as node:
            with pytest.raises(RemoteError):
                await send_tree(node, tree, "in put", hashes, cut)
        assert not (tmp_path / "work dir" / "in put").exists()
        async with on_node(server, tmp_path) as node:
            sent = await send_tree(node, tree, "in put", hashes)
            assert content(tmp_path / "work dir" / "in put") == content(tree)
            # The window of ssh and pipes hold a few MB that the node had not written when it was cut.
            assert sent.moved_bytes < sent.total_bytes - LARGE // 8
            assert (await send_tree(node, tree, "in put", hashes)).moved_bytes == 0
            back = await fetch_tree(node, "in put", tmp_path / "back", hashes, limit_bytes=1 << 30)
            assert content(tmp_path / "back") == content(tree)
            assert back.total_bytes == sent.total_bytes
    finally:
        server.stop()


async def test_an_environment_is_pushed_and_runs_there(server: Sshd, tmp_path: Path) -> None:
    def few(_: Kind) -> push.Wanted:
        return push.Wanted(("msgspec",), ("msgspec",))

    try:
        async with on_node(server, tmp_path) as node:
            hashes, spec = HashCache(tmp_path / "hashes.db"), server.node(host="10.255.255.1", python=sys.executable)
            try:
                made = await push.push_environment(node, spec, root=tmp_path, hashes=hashes, wanted=few, mode="carried")
            except StageFailed as error:
                pytest.skip(f"no package index here: {error.detail}")
            code = "import jupiter_engine, msgspec; print(jupiter_engine.__version__, msgspec.__name__)"
            done = await node.connection.run([made.python, "-c", code])
            assert (done.exit_status, done.stdout) == (0, b"0.1.0 msgspec\n"), done.stderr
    finally:
        server.stop()
