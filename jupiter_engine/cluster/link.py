"""How the leading machine of a group reaches the others: an ssh key of the workspace and files that say where to.

The key is made once. Its public half goes into the others' authorized_keys as one line of its own, marked with the
workspace and without any forwarding; the leading machine gets the private half, an ssh_config and the host keys
that were verified from here. It never accepts a key by itself. Ranks talk to each other directly, so the leading
machine must reach the others directly as well: jump hosts are for the way from here only.

Whether a group may do so is for a person to say, group by group: .jupiter/linked.json remembers it. `link` only does
what it is told and is repeated before each launch; who calls it for others asks `has_leave` first.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import itertools
import os
import posixpath
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from jupiter_engine.cluster.site import workspace_id
from jupiter_engine.errors import RemoteError, UsageError
from jupiter_engine.files import read_json, write_atomic, write_json
from jupiter_engine.remote import host_keys
from jupiter_engine.remote.host_keys import KnownHosts
from jupiter_engine.remote.port import Connection
from jupiter_engine.remote.ssh_call import SSH_CONFIG
from jupiter_engine.settings.cluster import ClusterSettings, GroupSpec, NodeSpec, group_nodes, node_by_name
from jupiter_engine.units import plain_text

KEY_FILE: Final = Path(".jupiter") / "keys" / "cluster_ed25519"
LINKED_FILE: Final = Path(".jupiter") / "linked.json"
CHECK_S: Final = 20.0
"""How long the leading machine may take to reach another one; a name that nobody answers takes longest."""
_CONNECT_S: Final = 8
# No forwarding of any kind; a terminal, because mlx.launch asks for one.
_RESTRICTION: Final = "restrict,pty"
_OWN_HOST_KEYS: Final = tuple(Path(f"/etc/ssh/ssh_host_{kind}_key.pub") for kind in ("ed25519", "ecdsa", "rsa"))

# $1: the line, $2: its mark. What stands in the file stays as it is; a link stays a link.
_AUTHORISE: Final = """
umask 077
d="$HOME/.ssh"; f="$d/authorized_keys"
mkdir -p "$d" || exit 1
if [ -f "$f" ] && grep -qxF -e "$1" "$f"; then echo present; exit 0; fi
if [ -s "$f" ] && [ -n "$(tail -c 1 "$f")" ]; then echo >>"$f" || exit 1; fi
printf '%s\\n' "$1" >>"$f" || exit 1
echo added
"""
_WITHDRAW: Final = """
umask 077
f="$HOME/.ssh/authorized_keys"
if [ ! -f "$f" ] || ! grep -qF -e " $1" "$f"; then echo absent; exit 0; fi
t="$f.jupiter.$$"
trap 'rm -f "$t"' EXIT
cp -p "$f" "$t" || exit 1
grep -v -e " $1\\$" "$f" >"$t"
[ $? -le 1 ] || exit 1
if [ -L "$f" ]; then cat "$t" >"$f" || exit 1; else mv -f "$t" "$f" || exit 1; fi
echo removed
"""
_ABOUT: Final = 'printf "%s\\n" "$HOME" "$(id -un)" "$SSH_CONNECTION"'
_PREPARE: Final = 'umask 077; mkdir -p "$1" && chmod 700 "$1" && command -v ssh >/dev/null'
_CLEAR: Final = 'rm -f "$1/id" "$1/ssh_config" "$1/known_hosts"; if [ -d "$1" ]; then rmdir "$1"; fi'


class LinkFiles(msgspec.Struct, frozen=True, kw_only=True):
    """What a launcher on the leading machine needs."""

    ssh_config: str
    """Path on the leading machine, for `ssh -F`; empty for a group of one machine."""
    aliases: dict[str, str]
    """Node -> its name in `ssh_config`; the leading machine itself is not in it."""


class _Member(msgspec.Struct, kw_only=True):
    """Another machine of the group, as it is told to the leading one."""

    node: NodeSpec
    alias: str = ""
    user: str
    host_key: str
    """`ssh-ed25519 AAAA...`, verified from here."""
    places: list[tuple[str, int]]
    """Addresses and ports to try, the likeliest first."""


class _About(msgspec.Struct, frozen=True):
    home: str
    user: str
    client: str
    """Address that our connection comes from, as the machine sees it; empty for this machine."""
    server: tuple[str, int] | None
    """Its own address and port that our connection has reached."""


# -- the workspace's key -------------------------------------------------------------------------------
def workspace_key(root: Path) -> tuple[bytes, str]:
    """The private half and the public one (`ssh-ed25519 AAAA...`); the pair is made on first use."""
    import asyncssh

    file = root / KEY_FILE
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        key = asyncssh.generate_private_key("ssh-ed25519")
        mine = file.with_name(f"{file.name}.{os.getpid()}")
        write_atomic(mine, key.export_private_key("openssh"), mode=0o600)
        try:
            with contextlib.suppress(FileExistsError):  # another process was first: its pair is the workspace's
                file.hardlink_to(mine)
        finally:
            mine.unlink()
    private = file.read_bytes()
    public = asyncssh.import_private_key(private).export_public_key("openssh").decode().split()
    return private, " ".join(public[:2])


def mark_of(root: Path) -> str:
    """The comment behind the workspace's line in authorized_keys."""
    return f"jupiter:{workspace_id(root / '.jupiter')}"


def authorized_line(root: Path) -> str:
    _, public = workspace_key(root)
    return f"{_RESTRICTION} {public} {mark_of(root)}"


# -- leave ---------------------------------------------------------------------------------------------
class Linked(msgspec.Struct, frozen=True, kw_only=True):
    """linked.json: which machines a person has let call each other with the workspace's key."""

    groups: dict[str, tuple[str, ...]] = {}
    """Group -> its machines at that time, by title and as the group called them."""
    version: int = 1


def linked(root: Path) -> Linked:
    """StateError for a damaged file."""
    path = root / LINKED_FILE
    if not path.exists():
        return Linked()
    found = read_json(path, Linked)
    assert isinstance(found, Linked)
    return found


def has_leave(root: Path, group: GroupSpec) -> bool:
    """Whether a person has linked this group with all the machines that are in it now (some of them may be away)."""
    known = {name.casefold() for name in linked(root).groups.get(group.name, ())}
    return bool(known) and all(name.casefold() in known for name in group.nodes)


def give_leave(root: Path, cluster: ClusterSettings, group: GroupSpec) -> None:
    """A person has said that the machines of the group may call each other. Takes the place of what was said before."""
    titles = (node.title() for node in group_nodes(cluster, group))
    with _rewriting(root) as groups:
        groups[group.name] = tuple(dict.fromkeys((*titles, *group.nodes)))


def withdraw_leave(root: Path, name: str) -> None:
    """No more leave for this group; without any group the workspace's key goes, too."""
    with _rewriting(root) as groups:
        groups.pop(name, None)
        if not groups:
            (root / KEY_FILE).unlink(missing_ok=True)


def forget(root: Path, node: NodeSpec) -> None:
    """A machine is no node any more: should it come back, it needs leave anew."""
    with _rewriting(root) as groups:
        for name, members in list(groups.items()):
            groups[name] = tuple(member for member in members if not _is(node, member))


def groups_with(root: Path, node: NodeSpec) -> tuple[str, ...]:
    """The linked groups in which a machine was when they were linked."""
    return tuple(name for name, members in linked(root).groups.items() if any(_is(node, one) for one in members))


def as_linked(root: Path, cluster: ClusterSettings, name: str, group: GroupSpec | None) -> GroupSpec:
    """A group with every node that it has now, or had when it was linked and that is a node still."""
    had = linked(root).groups.get(name, ())
    nodes = dict.fromkeys(node.title() for node in group_nodes(cluster, group)) if group is not None else {}
    return GroupSpec(name=name, nodes=tuple(nodes | dict.fromkeys(node.title() for node in _still(cluster, had))))


def _is(node: NodeSpec, name: str) -> bool:
    return name.casefold() in (node.title().casefold(), node.host.casefold())


def _still(cluster: ClusterSettings, names: Iterable[str]) -> list[NodeSpec]:
    found: list[NodeSpec] = []
    for name in names:
        with contextlib.suppress(UsageError):  # it is no node any more
            found.append(node_by_name(cluster, name))
    return found


@contextlib.contextmanager
def _rewriting(root: Path) -> Iterator[dict[str, tuple[str, ...]]]:
    """The groups of linked.json, to be changed; one process at a time."""
    home = root / ".jupiter"
    home.mkdir(parents=True, exist_ok=True)
    lock = os.open(home, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = linked(root)
        groups = dict(before.groups)
        yield groups
        if groups != before.groups:
            write_json(root / LINKED_FILE, Linked(groups=groups), mode=0o600)
    finally:
        os.close(lock)


# -- making and removing links -------------------------------------------------------------------------
async def link(
    cluster: ClusterSettings,
    group: GroupSpec,
    connections: Mapping[str, Connection],
    *,
    root: Path,
    known_hosts: KnownHosts,
    ssh_config: Path | None = SSH_CONFIG,
) -> LinkFiles:
    """Let the first machine of the group call the others, and make sure that it really can. Idempotent.

    `connections`: title of each node of the group -> an open connection. `root`: the workspace. Raises
    RemoteError naming every machine that the leading one does not reach, HostKeyRefused for a machine whose
    key is not trusted from here.
    """
    nodes = group_nodes(cluster, group)
    leader = nodes[0]
    if len(nodes) == 1:
        return LinkFiles(ssh_config="", aliases={})
    private, _ = workspace_key(root)
    about = dict(zip(nodes, await asyncio.gather(*(_about(connections[node.title()]) for node in nodes)), strict=True))
    aliases = _aliases(nodes[1:])
    members = await asyncio.gather(
        *(
            _member(cluster, node, connections[node.title()], about[node], about[leader], known_hosts, ssh_config)
            for node in nodes[1:]
        )
    )
    for member in members:
        member.alias = aliases[member.node.title()]
    line = authorized_line(root)
    await asyncio.gather(*(_authorise(connections[member.node.title()], line) for member in members))
    folder = _folder(leader, about[leader].home, root, group.name)
    await _place(connections[leader.title()], folder, private, members)
    await _reach(connections[leader.title()], folder, members)
    return LinkFiles(ssh_config=f"{folder}/ssh_config", aliases=aliases)


async def made(cluster: ClusterSettings, group: GroupSpec, leader: Connection, *, root: Path) -> LinkFiles | None:
    """The files of a link that was made before; None: there is none. Only looks."""
    nodes = group_nodes(cluster, group)
    if len(nodes) == 1 or not (root / KEY_FILE).exists():
        return None
    path = f"{_folder(nodes[0], (await _about(leader)).home, root, group.name)}/ssh_config"
    if not await leader.read(path):
        return None
    return LinkFiles(ssh_config=path, aliases=_aliases(nodes[1:]))


async def check_links(leader: Connection, files: LinkFiles) -> dict[str, str]:
    """Whether the leading machine reaches each of the others: node -> what ssh said; empty: it does."""
    names = list(files.aliases)
    said = await asyncio.gather(*(_call(leader, files.ssh_config, files.aliases[name]) for name in names))
    return dict(zip(names, said, strict=True))


async def unlink(
    cluster: ClusterSettings, group: GroupSpec, connections: Mapping[str, Connection], *, root: Path
) -> dict[str, str]:
    """Withdraw a group's leave: the workspace's line is taken out of the authorized_keys of machines that no other
    linked group has, the group's files off those that may have led it; after the last group the key itself goes.

    Does what can be done: the result names the machines where it could not, each with the reason. Nodes without
    an entry in `connections` are among them. Can be repeated for those.
    """
    problems: dict[str, str] = {}
    elsewhere = {
        node.title()
        for name, members in linked(root).groups.items()
        if name != group.name
        for node in _still(cluster, members)
    }

    async def withdraw(node: NodeSpec) -> None:
        connection = connections.get(node.title())
        if connection is None:
            problems[node.title()] = "it is not connected"
            return
        try:
            await withdraw_from(connection, node, root=root, groups=[group.name], line=node.title() not in elsewhere)
        except RemoteError as error:
            problems[node.title()] = error.detail

    await asyncio.gather(*(withdraw(node) for node in group_nodes(cluster, group)))
    withdraw_leave(root, group.name)
    return problems


async def withdraw_from(
    connection: Connection, node: NodeSpec, *, root: Path, groups: Collection[str], line: bool = True
) -> None:
    """Take off a machine what links have put there: the files of a leading machine for each of `groups`, and with
    `line` the workspace's line in authorized_keys. RemoteError if that fails."""
    home = (await _about(connection)).home
    # Whichever machine was there has led in its turn, so all are looked at.
    for group in groups:
        await _shell(connection, _CLEAR, _folder(node, home, root, group))
    if line:
        await _shell(connection, _WITHDRAW, mark_of(root))


def what_stays(root: Path, node: NodeSpec) -> str:
    """What links may have left on a machine that cannot be asked, for the person who has to take it away there."""
    key = root / KEY_FILE
    line = f"the line `{authorized_line(root)}`" if key.exists() else f"the line that ends with {mark_of(root)}"
    return (
        f"{line} may stay in ~/.ssh/authorized_keys of {node.title()}, and the private key for the others in "
        f"{node.workdir}/links there; `jupiter nodes unlink`, then `jupiter nodes link`, gives them another key"
    )


# -- parts ---------------------------------------------------------------------------------------------
async def _shell(connection: Connection, script: str, *arguments: str, timeout_s: float = 30.0) -> str:
    """Output of a POSIX script; RemoteError with its words if it fails."""
    argv = ("/bin/sh", "-c", script, "sh", *arguments)
    done = await connection.run(argv, timeout_s=timeout_s, limit_bytes=1 << 20)
    if done.exit_status != 0:
        said = " ".join(plain_text(done.stderr.decode("utf-8", "replace")).split())[-400:]
        raise RemoteError(
            f"{connection.name}: {said or 'a command failed'}",
            host=connection.host,
            argv=argv,
            exit_status=done.exit_status,
        )
    return plain_text(done.stdout.decode("utf-8", "replace"))


async def _about(connection: Connection) -> _About:
    home, user, ssh = (await _shell(connection, _ABOUT)).split("\n")[:3]
    parts = ssh.split()
    if not home.startswith("/") or not re.fullmatch(r"[A-Za-z0-9_.-]+", user):
        raise RemoteError(
            f"{connection.name} gave no usable home folder and user ({home[:80]!r}, {user[:40]!r})",
            host=connection.host,
        )
    if len(parts) == 4 and parts[3].isdecimal():
        return _About(home, user, parts[0], (parts[2], int(parts[3])))
    return _About(home, user, "", None)


def _aliases(nodes: Sequence[NodeSpec]) -> dict[str, str]:
    """Names that are safe as a word of any shell and tell people who is meant."""
    found: dict[str, str] = {}
    for node in nodes:
        word = re.sub(r"[^a-z0-9]+", "-", node.title().lower()).strip("-")[:40] or "node"
        choices = itertools.chain([word], (f"{word}-{number}" for number in itertools.count(2)))
        found[node.title()] = next(choice for choice in choices if choice not in found.values())
    return found


async def _member(
    cluster: ClusterSettings,
    node: NodeSpec,
    connection: Connection,
    about: _About,
    leader: _About,
    known_hosts: KnownHosts,
    ssh_config: Path | None,
) -> _Member:
    if node.is_local():
        # The leading machine sees where our connection to it comes from.
        places = [(leader.client, 22)] if leader.client else []
        return _Member(node=node, user=about.user, host_key=_own_host_key(), places=places)
    # Loaded here: only this way of reaching a machine needs the library.
    from jupiter_engine.remote.ssh import offered_key

    key = await offered_key(node, cluster.connection, known_hosts=known_hosts, ssh_config=ssh_config)
    if key.standing != "known":
        raise host_keys.refused(key, name=node.title())
    places = [(connection.host, key.port), *([about.server] if about.server else [])]
    return _Member(
        node=node,
        user=about.user,
        host_key=key.line.split(" ", 1)[1],
        places=list(dict.fromkeys(places)),
    )


def _own_host_key() -> str:
    for file in _OWN_HOST_KEYS:
        try:
            return " ".join(file.read_text().split()[:2])
        except OSError:
            continue
    raise RemoteError(
        "this machine has no ssh host key, so the group's leading machine cannot call it",
        host="localhost",
        fix="switch on Remote Login (macOS: System Settings, General, Sharing; Linux: the ssh server), "
        "or let this machine lead: name it first in the group",
    )


async def _authorise(connection: Connection, line: str) -> None:
    mark = line.rpartition(" ")[2]
    present = await _shell(connection, 'grep -F -e "$1" "$HOME/.ssh/authorized_keys" 2>/dev/null || :', f" {mark}")
    if any(other != line for other in present.splitlines()):  # with the restrictions of another version
        await _shell(connection, _WITHDRAW, mark)
    await _shell(connection, _AUTHORISE, line)


def _folder(leader: NodeSpec, home: str, root: Path, group: str) -> str:
    workdir = leader.workdir
    absolute = posixpath.join(home, workdir[2:]) if workdir.startswith("~/") else workdir
    identity = hashlib.sha256(f"{mark_of(root)}\0{group}".encode()).hexdigest()[:12]
    return posixpath.join(absolute, "links", identity)


async def _place(leader: Connection, folder: str, private: bytes, members: Sequence[_Member]) -> None:
    """The files on the leading machine, with every member's likeliest address."""
    try:
        await _shell(leader, _PREPARE, folder)
    except RemoteError as error:
        raise RemoteError(
            f"{leader.name} has no ssh client, or {folder} cannot be made: {error.detail}",
            host=leader.host,
            fix="install the OpenSSH client there",
        ) from error
    known = "".join(f"{member.alias} {member.host_key}\n" for member in members)
    await leader.write(f"{folder}/id", private, mode=0o600)
    await leader.write(f"{folder}/known_hosts", known.encode(), mode=0o600)
    await leader.write(f"{folder}/ssh_config", _config(folder, members).encode(), mode=0o600)


async def _reach(leader: Connection, folder: str, members: Sequence[_Member]) -> None:
    """Try the addresses of each member until one answers with the right key; RemoteError for those where none does."""
    path, said = f"{folder}/ssh_config", {member.alias: "it has no address that could be tried" for member in members}
    left = [member for member in members if member.places]
    while left:
        answers = await asyncio.gather(*(_call(leader, path, member.alias) for member in left))
        said |= {member.alias: answer for member, answer in zip(left, answers, strict=True)}
        left = [member for member in left if said[member.alias] and len(member.places) > 1]
        for member in left:
            member.places = member.places[1:]
        if left:
            await leader.write(path, _config(folder, members).encode(), mode=0o600)
    failed = [f"{member.node.title()} ({said[member.alias]})" for member in members if said[member.alias]]
    if failed:
        raise RemoteError(
            f"{leader.name} leads the group but cannot call {', '.join(failed)}",
            host=leader.host,
            fix="the machines of a group must reach each other directly: look at their network and firewalls; "
            "`sshd -T` there shows whether authorized_keys is read",
        )


async def _call(leader: Connection, ssh_config: str, alias: str) -> str:
    """What ssh says if the leading machine cannot call; empty if it can."""
    argv = ("ssh", "-F", ssh_config, "-n", alias, "true")
    try:
        done = await leader.run(argv, timeout_s=CHECK_S, limit_bytes=1 << 20)
    except RemoteError as error:
        return error.detail
    if done.exit_status == 0:
        return ""
    lines = plain_text(done.stderr.decode("utf-8", "replace")).strip().splitlines()
    return " ".join(lines[-1].split())[:300] if lines else f"ssh ended with {done.exit_status or done.signal}"


def _quoted(path: str) -> str:
    """A path in an ssh_config: in quotes, with % doubled, for ssh expands %d and the like."""
    return '"' + path.replace("%", "%%") + '"'


def _config(folder: str, members: Sequence[_Member]) -> str:
    lines = ["# Written by Jupiter; `jupiter nodes link` writes it anew."]
    for member in members:
        host, port = member.places[0] if member.places else (member.node.host, 22)
        lines += [
            f"Host {member.alias}",
            f"  HostName {host.replace('%', '%%')}",
            f"  Port {port}",
            f"  User {member.user}",
            f"  HostKeyAlias {member.alias}",
        ]
    return "\n".join(
        [
            *lines,
            "Host *",
            f"  IdentityFile {_quoted(folder + '/id')}",
            "  IdentitiesOnly yes",
            "  IdentityAgent none",
            "  PreferredAuthentications publickey",
            "  BatchMode yes",
            "  StrictHostKeyChecking yes",
            f"  UserKnownHostsFile {_quoted(folder + '/known_hosts')}",
            "  GlobalKnownHostsFile /dev/null",
            "  UpdateHostKeys no",
            "  CheckHostIP no",
            "  ForwardAgent no",
            "  ForwardX11 no",
            "  ControlMaster no",
            "  ControlPath none",
            f"  ConnectTimeout {_CONNECT_S}",
            "  ServerAliveInterval 5",
            "  ServerAliveCountMax 3",
            "  LogLevel ERROR",
            "",
        ]
    )
