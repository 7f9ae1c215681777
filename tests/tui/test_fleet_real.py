"""A real machine (sshd) taken in, looked at, distrusted, trusted again and taken out, by keys alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from jupiter_engine.api import Workspace
from jupiter_engine.settings.workspace import create
from jupiter_tui.app import ConsoleApp
from tests.sshd import Sshd, make_key, start_sshd
from tests.tui.conftest import Session
from tests.tui.played_fleet import PlayedMachines

PATIENCE_S = 30.0


@pytest.fixture
def studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sshd]:
    """A server that ssh's config of this user names `studio`; its home and ours are folders of the test."""
    home, there = tmp_path / "home", tmp_path / "there"
    (home / ".ssh").mkdir(parents=True)
    there.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    server = start_sshd(tmp_path / "studio", force_env={"HOME": str(there)})
    config = server.ssh_config("studio", home / ".ssh" / "config").read_text()
    kept = [line for line in config.splitlines() if "KnownHosts" not in line]
    (home / ".ssh" / "config").write_text("\n".join(kept) + "\n")
    yield server
    server.stop()


async def shows(c: Session, *parts: str) -> str:
    deadline = asyncio.get_running_loop().time() + PATIENCE_S
    while asyncio.get_running_loop().time() < deadline:
        await c.pilot.pause()
        if all(part in c.screen() for part in parts):
            return c.screen()
        await asyncio.sleep(0.05)
    raise AssertionError(f"never shown: {parts}\n{c.screen()}")


def again_with_another_key(server: Sshd, folder: Path) -> Sshd:
    server.stop()
    (folder / "studio" / "authorized_keys").chmod(0o600)
    return start_sshd(
        folder / "studio",
        port=server.port,
        identity=server.identity,
        host_key=make_key(folder / "another_key"),
        force_env={"HOME": str(folder / "there")},
    )


@pytest.mark.slow
async def test_a_machine_joins_changes_its_key_and_leaves(studio: Sshd, tmp_path: Path) -> None:
    root = tmp_path / "w"
    create(root)
    app = ConsoleApp(opener=lambda _: Workspace(root))
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        c = Session(app, pilot, root, machines=PlayedMachines())
        await _takes_it_in(c, studio)
        await _examines_it(c)
        other = again_with_another_key(studio, tmp_path)
        try:
            await _trusts_it_again(c)
        finally:
            await _removes_it(c)
            other.stop()
    assert Workspace(root).cluster().value.nodes[0].is_local()


async def _takes_it_in(c: Session, studio: Sshd) -> None:
    await c.until(lambda: c.app.desk.picture.loaded, "read")
    await c.press("1")
    await shows(c, "> ok this machine", "localhost", "1 of 1 answer")
    await c.press("n")
    await shows(c, "Add a node", f"{studio.host} port {studio.port}")
    await c.press("down")
    await shows(c, "> studio")
    await c.press("tab", "tab", "tab", "tab", "right", "right", "enter")
    await shows(c, "Is this its key?", "SHA256:")
    await c.press("y")
    await shows(c, "studio is a node now", "ok studio", "2 of 2 answer")
    node = next(node for node in Workspace(c.root).cluster().value.nodes if node.title() == "studio")
    assert (node.host, node.role, node.ssh_port, node.device_type) == ("studio", "trainer", None, "cpu")
    assert "trainer" in c.screen()


async def _examines_it(c: Session) -> None:
    await c.press("d")
    await shows(c, "the doctor has looked")
    await c.until(lambda: c.app.desk.picture.fleet.findings_at > 0, "findings")
    found = c.app.desk.picture.fleet.findings
    assert any(one.check == "unreachable" and one.severity == "ok" for one in found)
    assert any("studio" in one.nodes for one in found)


async def _trusts_it_again(c: Session) -> None:
    await c.press("G")
    await shows(c, "!! studio", "> !! studio")
    await c.press("w")
    await shows(c, "cannot be used")
    await c.press("t")
    await shows(c, "THE KEY OF studio HAS CHANGED", "known until now", "Type  studio")
    await c.type("studio")
    await shows(c, "studio is trusted from now on")
    await shows(c, "2 of 2 answer")


async def _removes_it(c: Session) -> None:
    await c.press("x")
    await shows(c, "studio shall be no node any more")
    await c.type("studio")
    await shows(c, "1 of 1 answer", "> ok this machine")
