"""Links between machines, with real sshds: the leading one calls the others with the workspace's own key."""

from __future__ import annotations

import asyncio
import multiprocessing
import re
import socket
import stat
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jupiter_engine.cluster import link as links
from jupiter_engine.cluster.link import (
    KEY_FILE,
    LinkFiles,
    authorized_line,
    check_links,
    link,
    mark_of,
    unlink,
    workspace_key,
)
from jupiter_engine.errors import HostKeyRefused, RemoteError, StateError
from jupiter_engine.remote.host_keys import KnownHosts
from jupiter_engine.remote.port import Completed, Connection
from jupiter_engine.remote.ssh import SshConnection, connect
from jupiter_engine.remote.this_machine import LocalConnection
from jupiter_engine.settings.cluster import ClusterSettings, GroupSpec, NodeSpec
from tests.rig import Rig, needs_rig
from tests.sshd import Sshd, make_key, start_sshd

OTHERS = "# mine\nssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPVrPxmkBaxqkzb0OZp3YEmZKvZk5cXDfN3aHJdlmS9k me@laptop"


class Machines:
    """Several sshds, each with a home folder of its own, and connections to all of them."""

    def __init__(self, folder: Path, identity: Path) -> None:
        self.root = folder / "workspace"
        self.servers: dict[str, Sshd] = {}
        for number, name in enumerate(("Lead Mac", "worker", "Wörker $(x)"), 1):
            home = folder / f"home {number}"
            home.mkdir()
            self.servers[name] = start_sshd(
                folder / f"sshd{number}",
                identity=identity,
                force_env={"HOME": str(home)},
                options=[f'AuthorizedKeysFile "{folder}/sshd{number}/authorized_keys" "{home}/.ssh/authorized_keys"'],
            )
        self.known_hosts = KnownHosts(folder / "known_hosts", user=(), system=())
        lines = [server.known_hosts_line for server in self.servers.values()]
        (folder / "known_hosts").write_text("\n".join(lines) + "\n")
        nodes = tuple(
            NodeSpec(
                host=server.host,
                name=name,
                ssh_port=server.port,
                ssh_user=server.user,
                identity=str(identity),
                device_type="cpu",
                workdir="~/jupiter files",
            )
            for name, server in self.servers.items()
        )
        self.group = GroupSpec(name="all", nodes=tuple(self.servers))
        self.cluster = ClusterSettings(nodes=nodes, groups=(self.group,))
        self.connections: dict[str, SshConnection] = {}
        self.folder = folder

    def home(self, name: str) -> Path:
        return self.folder / f"home {list(self.servers).index(name) + 1}"

    def authorized(self, name: str) -> Path:
        return self.home(name) / ".ssh" / "authorized_keys"

    def text(self, file: Path | str) -> str:
        return Path(file).read_text()

    async def link(self, connections: Mapping[str, Connection] | None = None) -> LinkFiles:
        return await link(
            self.cluster,
            self.group,
            connections or self.connections,
            root=self.root,
            known_hosts=self.known_hosts,
            ssh_config=None,
        )


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_key(tmp_path_factory.mktemp("identity") / "id")


@pytest.fixture
def servers(tmp_path: Path, identity: Path) -> Iterator[Machines]:
    made = Machines(tmp_path, identity)
    yield made
    for server in made.servers.values():
        server.stop()


@pytest.fixture
async def machines(servers: Machines) -> AsyncIterator[Machines]:
    async with AsyncExitStack() as stack:
        for node in servers.cluster.nodes:
            connection = await connect(
                node, servers.cluster.connection, known_hosts=servers.known_hosts, ssh_config=None
            )
            stack.push_async_callback(connection.close)
            servers.connections[node.title()] = connection
        yield servers


def call(files: LinkFiles, node: str, *command: str, tty: bool = False) -> subprocess.CompletedProcess[str]:
    """As the launcher on the leading machine does it (which is this machine, with another home)."""
    argv = ["ssh", "-F", files.ssh_config, *(["-tt"] if tty else []), files.aliases[node], *command]
    return subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=20)


async def test_the_leading_machine_calls_the_others(machines: Machines) -> None:
    files = await machines.link()
    assert files.aliases == {"worker": "worker", "Wörker $(x)": "w-rker-x"}
    folder = Path(files.ssh_config).parent
    assert folder.parent == machines.home("Lead Mac") / "jupiter files" / "links"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {
        "id": 0o600,
        "known_hosts": 0o600,
        "ssh_config": 0o600,
    }
    for name in files.aliases:
        done = await asyncio.to_thread(call, files, name, 'printf %s "$HOME"')
        assert (done.returncode, done.stdout) == (0, str(machines.home(name))), done.stderr
        # mlx.launch asks for a terminal.
        assert (await asyncio.to_thread(call, files, name, "tty", tty=True)).stdout.startswith("/dev/")
    assert await check_links(machines.connections["Lead Mac"], files) == {"worker": "", "Wörker $(x)": ""}
    assert not machines.authorized("Lead Mac").exists()
    assert stat.S_IMODE((machines.root / KEY_FILE).stat().st_mode) == 0o600


async def test_the_line_allows_no_forwarding(machines: Machines) -> None:
    files = await machines.link()
    line = machines.authorized("worker").read_text().strip()
    assert line.startswith("restrict,pty ssh-ed25519 ")
    assert line.endswith(mark_of(machines.root))
    target = machines.servers["Lead Mac"]
    argv = ["ssh", "-F", files.ssh_config, "-W", f"{target.host}:{target.port}", files.aliases["worker"]]
    done = await asyncio.to_thread(
        subprocess.run, argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=20
    )
    assert done.returncode != 0
    assert "SSH-2.0" not in done.stdout


async def test_linking_again_changes_nothing_and_unlinking_takes_exactly_our_line(machines: Machines) -> None:
    file = machines.authorized("worker")
    file.parent.mkdir(mode=0o700)
    file.write_text(OTHERS)  # without a newline at its end
    file.chmod(0o640)
    files = await machines.link()
    once = file.read_text()
    assert once.startswith(OTHERS + "\n")
    assert once.count("\n") == 3
    assert await machines.link() == files
    assert file.read_text() == once
    assert await unlink(machines.cluster, machines.group, machines.connections, root=machines.root) == {}
    assert file.read_text() == OTHERS + "\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert [path.name for path in file.parent.iterdir()] == ["authorized_keys"]
    assert not Path(files.ssh_config).parent.exists()
    said = await check_links(machines.connections["Lead Mac"], files)
    assert all(said.values())
    assert await unlink(machines.cluster, machines.group, machines.connections, root=machines.root) == {}


async def test_authorized_keys_that_is_a_link_stays_one(machines: Machines) -> None:
    real = machines.folder / "dotfiles"
    real.write_text(OTHERS + "\n")
    file = machines.authorized("worker")
    file.parent.mkdir(mode=0o700)
    file.symlink_to(real)
    await machines.link()
    assert real.read_text().count("\n") == 3
    await unlink(machines.cluster, machines.group, machines.connections, root=machines.root)
    assert file.is_symlink()
    assert real.read_text() == OTHERS + "\n"


@pytest.mark.parametrize("old", ["no-pty {public}", "restrict,pty ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGZvcm1lcg"])
async def test_a_line_with_other_restrictions_or_a_former_key_is_replaced(machines: Machines, old: str) -> None:
    _, public = workspace_key(machines.root)
    file = machines.authorized("worker")
    file.parent.mkdir(mode=0o700)
    file.write_text(f"{OTHERS}\n{old.format(public=public)} {mark_of(machines.root)}\n")
    await machines.link()
    assert file.read_text() == f"{OTHERS}\n{authorized_line(machines.root)}\n"


class Wrapped:
    """A connection with another host, or with another ssh program on the machine."""

    def __init__(self, inner: SshConnection, *, host: str = "", ssh: str = "") -> None:
        self._inner, self._ssh = inner, ssh
        self.name, self.host = inner.name, host or inner.host

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def run(self, argv: Sequence[str], **options: Any) -> Completed:
        return await self._inner.run(("sh", "-c", self._ssh) if self._ssh and argv[0] == "ssh" else argv, **options)


async def test_the_address_that_we_reached_stands_in_for_a_name_the_leader_does_not_know(machines: Machines) -> None:
    wrapped = Wrapped(machines.connections["worker"], host="nowhere.invalid")
    files = await machines.link({**machines.connections, "worker": cast(Connection, wrapped)})
    assert await check_links(machines.connections["Lead Mac"], files) == {"worker": "", "Wörker $(x)": ""}
    text = machines.text(files.ssh_config)
    assert "nowhere.invalid" not in text
    assert text.count("HostName 127.0.0.1") == 2


async def test_hosts_of_our_own_ssh_config_are_written_out_for_the_leader(machines: Machines) -> None:
    server = machines.servers["worker"]
    config = machines.folder / "ssh_config"
    lines = [
        "Host mine",
        "HostName 127.0.0.1",
        f"Port {server.port}",
        "HostKeyAlias it",
        f"IdentityFile {server.identity}",
    ]
    config.write_text("\n".join(lines) + "\n")
    trusted = machines.text(machines.known_hosts.own) + f"[it]:{server.port} {server.public_key}\n"
    machines.known_hosts.own.write_text(trusted)
    node = NodeSpec(host="mine", device_type="cpu")
    group = GroupSpec(name="two", nodes=("Lead Mac", "mine"))
    cluster = ClusterSettings(nodes=(machines.cluster.nodes[0], node), groups=(group,))
    mine = await connect(node, cluster.connection, known_hosts=machines.known_hosts, ssh_config=config)
    try:
        files = await link(
            cluster,
            group,
            {"Lead Mac": machines.connections["Lead Mac"], "mine": mine},
            root=machines.root,
            known_hosts=machines.known_hosts,
            ssh_config=config,
        )
    finally:
        await mine.close()
    assert await check_links(machines.connections["Lead Mac"], files) == {"mine": ""}
    assert f"  HostName 127.0.0.1\n  Port {server.port}\n" in machines.text(files.ssh_config)


async def test_an_unknown_machine_is_not_vouched_for(machines: Machines) -> None:
    machines.known_hosts.own.write_text(machines.servers["Lead Mac"].known_hosts_line + "\n")
    with pytest.raises(HostKeyRefused, match="is not known yet"):
        await machines.link()
    assert not machines.authorized("worker").exists()


async def test_the_leader_takes_no_other_key_for_a_member(machines: Machines) -> None:
    files = await machines.link()
    known = Path(files.ssh_config).with_name("known_hosts")
    lines = known.read_text().splitlines()
    # The two machines' keys exchanged: as if another machine answered in each one's place.
    swapped = [
        f"{lines[0].split()[0]} {lines[1].split(' ', 1)[1]}",
        f"{lines[1].split()[0]} {lines[0].split(' ', 1)[1]}",
    ]
    known.write_text("\n".join(swapped) + "\n")
    said = await check_links(machines.connections["Lead Mac"], files)
    assert all("verification failed" in text for text in said.values()), said


async def test_a_member_that_the_leader_cannot_call_is_named(machines: Machines) -> None:
    """As behind a firewall."""
    said = "echo 'ssh: connect to host x port 22: No route to host' >&2; exit 255"
    lead = Wrapped(machines.connections["Lead Mac"], ssh=said)
    with pytest.raises(RemoteError, match=r"cannot call worker \(ssh: connect.*No route to host\), Wörker") as caught:
        await machines.link({**machines.connections, "Lead Mac": cast(Connection, lead)})
    assert "reach each other directly" in caught.value.fix


async def test_unlinking_does_what_can_be_done(machines: Machines) -> None:
    await machines.link()
    connections = {name: connection for name, connection in machines.connections.items() if name != "worker"}
    said = await unlink(machines.cluster, machines.group, connections, root=machines.root)
    assert said == {"worker": "it is not connected"}
    assert machines.authorized("worker").read_text()
    assert machines.authorized("Wörker $(x)").read_text() == ""


@given(st.lists(st.text(min_size=1, max_size=12), unique_by=str.lower, max_size=6))
@example(["a-2", "a", "a!", "ä", "-oProxyCommand=x", "$(x);\n"])
def test_aliases_are_words_of_any_shell_and_differ(titles: list[str]) -> None:
    aliases = links._aliases([NodeSpec(host="h", name=title) for title in titles])
    assert len(set(aliases.values())) == len(titles)
    assert all(re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", alias) for alias in aliases.values())


async def test_one_machine_needs_no_links(tmp_path: Path) -> None:
    node = NodeSpec(host="a", device_type="cpu")
    group = GroupSpec(name="g", nodes=("a",))
    files = await link(
        ClusterSettings(nodes=(node,)), group, {}, root=tmp_path, known_hosts=KnownHosts(tmp_path / "known")
    )
    assert files == LinkFiles(ssh_config="", aliases={})
    assert not (tmp_path / KEY_FILE).exists()


def public_of(root: str) -> str:
    return workspace_key(Path(root))[1]


def test_the_pair_is_made_once_by_whoever_is_first(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        made = pool.map(public_of, [str(tmp_path)] * 8)
    assert len(set(made)) == 1
    assert [file.name for file in (tmp_path / KEY_FILE).parent.iterdir()] == [KEY_FILE.name]


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig(2) as made:
        for host in made.hosts:
            config = host.disk / "etc" / "sshd_config"
            text = config.read_text()
            config.write_text(text.replace("/ssh/authorized_keys\n", "/ssh/authorized_keys .ssh/authorized_keys\n"))
            host.power_off()
            host.boot()
        yield made


@needs_rig
async def test_hosts_of_a_network_with_this_machine_among_them(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """node1 leads, and calls node2 and this machine: where our own connection to it comes from."""
    home = tmp_path / "home"
    home.mkdir()
    own = start_sshd(
        tmp_path / "sshd",
        host=rig.gateway,
        port=22,
        identity=rig.identity,
        options=[f"AuthorizedKeysFile {home}/.ssh/authorized_keys"],
    )
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(links, "_OWN_HOST_KEYS", (own.folder / "none.pub", own.folder / "host_key.pub"))
    nodes = tuple(NodeSpec(host=host.name, device_type="cpu") for host in rig.hosts)
    here = NodeSpec(host="localhost", name="here", device_type="cpu")
    group = GroupSpec(name="all", nodes=("node1", "node2", "here"))
    cluster = ClusterSettings(nodes=(*nodes, here), groups=(group,))
    known_hosts = KnownHosts(tmp_path / "known_hosts", user=[rig.known_hosts], system=())
    async with AsyncExitStack() as stack:
        connections: dict[str, Connection] = {"here": LocalConnection("here")}
        for node in nodes:
            connection = await connect(node, cluster.connection, known_hosts=known_hosts, ssh_config=rig.ssh_config)
            stack.push_async_callback(connection.close)
            connections[node.title()] = connection
        files = await link(
            cluster, group, connections, root=tmp_path, known_hosts=known_hosts, ssh_config=rig.ssh_config
        )
        assert await check_links(connections["node1"], files) == {"node2": "", "here": ""}
        for alias, name in (("node2", "node2"), ("here", socket.gethostname())):
            done = await connections["node1"].run(["ssh", "-F", files.ssh_config, files.aliases[alias], "hostname"])
            assert done.stdout.decode().strip() == name
        # Nobody needs to call the leading machine.
        assert not (rig["node1"].home / ".ssh" / "authorized_keys").exists()
        assert await unlink(cluster, group, connections, root=tmp_path) == {}
        assert (home / ".ssh" / "authorized_keys").read_text() == ""
    own.stop()


def a_group(*names: str, called: str = "all") -> GroupSpec:
    return GroupSpec(name=called, nodes=names)


def test_leave_is_of_one_group_and_of_the_machines_that_it_had(tmp_path: Path) -> None:
    nodes = tuple(NodeSpec(host=f"10.0.0.{number}", name=name) for number, name in enumerate(("Lead", "b", "c")))
    cluster = ClusterSettings(nodes=nodes)
    workspace_key(tmp_path)
    assert not links.has_leave(tmp_path, a_group("Lead", "b")), "a key alone is no leave"
    links.give_leave(tmp_path, cluster, a_group("lead", "10.0.0.1"))
    assert stat.S_IMODE((tmp_path / links.LINKED_FILE).stat().st_mode) == 0o600
    assert links.has_leave(tmp_path, a_group("Lead", "b"))
    assert links.has_leave(tmp_path, a_group("10.0.0.1", "LEAD")), "as the file calls them, in any order"
    assert links.has_leave(tmp_path, a_group("b")), "one of them is away"
    assert not links.has_leave(tmp_path, a_group("Lead", "b", "c")), "a machine came in later"
    assert not links.has_leave(tmp_path, a_group("Lead", "b", called="other"))
    links.forget(tmp_path, nodes[1])
    assert links.groups_with(tmp_path, nodes[1]) == ()
    assert not links.has_leave(tmp_path, a_group("Lead", "b")), "out and in again is another machine"
    assert links.has_leave(tmp_path, a_group("Lead"))
    links.withdraw_leave(tmp_path, "all")
    assert not links.has_leave(tmp_path, a_group("Lead"))
    assert not (tmp_path / KEY_FILE).exists()


def test_a_damaged_record_gives_no_leave(tmp_path: Path) -> None:
    (tmp_path / ".jupiter").mkdir()
    (tmp_path / links.LINKED_FILE).write_text('{"groups": {"all": "everything"}}')
    with pytest.raises(StateError, match=r"linked\.json"):
        links.has_leave(tmp_path, a_group("b"))


def give(arguments: tuple[str, int]) -> None:
    root, number = arguments
    node = NodeSpec(host=f"h{number}")
    links.give_leave(Path(root), ClusterSettings(nodes=(node,)), a_group(node.host, called=f"g{number}"))


def test_two_processes_lose_no_leave(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        pool.map(give, [(str(tmp_path), number) for number in range(24)])
    assert set(links.linked(tmp_path).groups) == {f"g{number}" for number in range(24)}


async def test_unlinking_one_group_leaves_the_other_its_machines(machines: Machines) -> None:
    other = a_group("worker", "Lead Mac", called="other")
    cluster = msgspec.structs.replace(machines.cluster, groups=(machines.group, other))
    files = await machines.link()
    for group in (machines.group, other):
        links.give_leave(machines.root, cluster, group)
    before = machines.authorized("worker").read_text()
    assert await unlink(cluster, machines.group, machines.connections, root=machines.root) == {}
    assert machines.authorized("worker").read_text() == before
    assert machines.authorized("Wörker $(x)").read_text() == "", "no other group has it"
    assert not Path(files.ssh_config).parent.exists()
    assert (machines.root / KEY_FILE).exists()
    assert not links.has_leave(machines.root, machines.group)
    assert links.has_leave(machines.root, other)
    assert await unlink(cluster, other, machines.connections, root=machines.root) == {}
    assert machines.authorized("worker").read_text() == ""
    assert not (machines.root / KEY_FILE).exists()


async def test_a_machine_that_led_for_a_while_keeps_no_key(machines: Machines) -> None:
    turned = msgspec.structs.replace(machines.group, nodes=("worker", "Lead Mac", "Wörker $(x)"))
    files = await link(
        machines.cluster,
        turned,
        machines.connections,
        root=machines.root,
        known_hosts=machines.known_hosts,
        ssh_config=None,
    )
    assert Path(files.ssh_config).is_relative_to(machines.home("worker"))
    assert machines.authorized("Lead Mac").read_text()
    assert await unlink(machines.cluster, machines.group, machines.connections, root=machines.root) == {}
    assert not Path(files.ssh_config).parent.exists()
    assert machines.authorized("Lead Mac").read_text() == ""
