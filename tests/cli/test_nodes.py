"""`jupiter nodes` against real sshds: what is asked, what is written, what is refused."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jupiter_engine.cli.main import main
from jupiter_engine.cluster.link import KEY_FILE, authorized_line, has_leave
from jupiter_engine.errors import ExitCode
from jupiter_engine.settings.cluster import GroupSpec, load_cluster
from tests.sshd import Sshd, make_key, start_sshd

Capture = pytest.CaptureFixture[str]


class Place:
    """A workspace, a home folder without any ssh settings, and machines to call."""

    def __init__(self, folder: Path, capsys: Capture) -> None:
        self.folder, self._capsys = folder, capsys
        self.root = folder / "workspace"
        self.identity = make_key(folder / "id")
        self.servers: list[Sshd] = []

    def machine(self, name: str, again: Sshd | None = None) -> Sshd:
        home = self.folder / name
        home.mkdir(exist_ok=True)
        keys = f'AuthorizedKeysFile "{self.folder}/sshd-{name}/authorized_keys" "{home}/.ssh/authorized_keys"'
        server = start_sshd(
            self.folder / f"sshd-{name}",
            identity=self.identity,
            force_env={"HOME": str(home)},
            options=[keys],
            port=again.port if again is not None else None,
            host_key=again.folder / "host_key" if again is not None else None,
        )
        self.servers.append(server)
        return server

    def run(self, *argv: str) -> tuple[int, str, str]:
        try:
            status = main(["nodes", *argv, "--workspace", str(self.root)])
        except SystemExit as error:
            status = int(error.code or 0)
        out, err = self._capsys.readouterr()
        return status, out, err

    def json(self, *argv: str, status: int = ExitCode.DONE) -> Any:
        got, out, err = self.run(*argv, "--json")
        assert got == status, err
        return json.loads(out)

    def add(self, server: Sshd, name: str, *more: str) -> tuple[int, str, str]:
        reach = ["--port", str(server.port), "--identity", str(self.identity), "--workdir", "~/j", "--name", name]
        return self.run("add", f"{server.user}@{server.host}", *reach, "--python", sys.executable, *more)

    @property
    def text(self) -> str:
        return (self.root / "config" / "cluster.yaml").read_text()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Iterator[Place]:
    (tmp_path / "me").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    made = Place(tmp_path, capsys)
    yield made
    for server in made.servers:
        server.stop()


def fingerprint(server: Sshd) -> str:
    import asyncssh

    return asyncssh.import_public_key(server.public_key).get_fingerprint()


def answers(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A person at a terminal who types this."""
    terminal = io.StringIO(text)
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdin", terminal)


def test_a_machine_is_asked_about_looked_at_and_written_down(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    server = place.machine("box")
    answers(monkeypatch, "what?\nyes\n")
    status, out, err = place.add(server, "box", "--role", "trainer")
    assert status == ExitCode.DONE, err
    assert out.startswith("box is a node now: cpu, ")
    assert fingerprint(server) in err
    assert "ssh-keygen -lf" in err
    assert err.count("Is it the same?") == 2
    node = load_cluster(place.root / "config" / "cluster.yaml").value.nodes[1]
    assert (node.host, node.ssh_user, node.ssh_port, node.role) == (server.host, server.user, server.port, "trainer")
    assert node.device_type == "cpu"
    assert node.chip
    assert node.memory_gb is not None
    assert node.memory_gb > 0.5
    # The shipped file's comments are all there.
    assert "# Machines are best added with `jupiter nodes add HOST`" in place.text
    # Known from now on: nobody is asked again.
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert place.run("trust", "box")[:2] == (0, f"box is trusted already, with ssh-ed25519 {fingerprint(server)}\n")


def test_no_means_no(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    server = place.machine("box")
    for said in ("no\n", ""):
        answers(monkeypatch, said)
        status, _, err = place.add(server, "box")
        assert status == ExitCode.STAGE_FAILED
        assert "is not known yet" in err
    assert "box" not in place.text
    assert not (place.root / ".jupiter" / "known_hosts").exists()


def test_without_a_terminal_the_fingerprint_decides(place: Place) -> None:
    server = place.machine("box")
    status, _, err = place.add(server, "box", "--yes")
    assert status == ExitCode.STAGE_FAILED
    assert f"--fingerprint {fingerprint(server)}" in err
    status, _, err = place.add(server, "box", "--yes", "--fingerprint", "SHA256:" + "A" * 43)
    assert status == ExitCode.STAGE_FAILED
    assert "which is not the given fingerprint" in err
    assert "box" not in place.text
    added = place.add(server, "box", "--yes", "--fingerprint", fingerprint(server), "--json")
    assert added[0] == ExitCode.DONE, added[2]
    assert json.loads(added[1])["node"]["name"] == "box"


@pytest.fixture
def with_box(place: Place) -> Sshd:
    server = place.machine("box")
    status, _, err = place.add(server, "box", "--role", "trainer", "--fingerprint", fingerprint(server))
    assert status == ExitCode.DONE, err
    return server


def test_the_list_says_what_each_node_is_and_what_is_wrong(place: Place, with_box: Sshd) -> None:
    status, out, _ = place.run("list")
    assert status == ExitCode.DONE
    head, here, box = out.splitlines()
    assert head.split()[:4] == ["NODE", "HOST", "ROLE", "STATE"]
    assert here.startswith("this machine")
    assert "trainer  online" in box
    nodes = place.json("list")
    assert [(node["name"], node["state"]) for node in nodes] == [("this machine", "online"), ("box", "online")]
    assert nodes[1]["facts"]["cores"] >= 1
    assert nodes[1]["facts"]["raw"] == {}
    with_box.stop()
    status, out, _ = place.run("list")
    assert status == ExitCode.NO_NODE
    assert "!! box: " in out
    assert " -> " in out


def test_a_changed_key_needs_replace_and_a_decision(place: Place, with_box: Sshd) -> None:
    with_box.stop()
    changed = start_sshd(
        place.folder / "other", identity=place.identity, port=with_box.port, host_key=make_key(place.folder / "new_key")
    )
    place.servers.append(changed)
    for more in ([], ["--fingerprint", fingerprint(changed)], ["--replace"]):
        status, _, err = place.run("trust", "box", *more)
        assert status == ExitCode.STAGE_FAILED
        assert fingerprint(changed) in err
    assert "HAS CHANGED" in place.run("trust", "box")[2]
    status, out, err = place.run("trust", "box", "--replace", "--fingerprint", fingerprint(changed))
    assert (status, out) == (0, f"box is trusted with ssh-ed25519 {fingerprint(changed)} from now on\n"), err
    assert place.json("trust", "box")["new"] is False


def test_a_machine_that_is_no_node_yet_can_be_trusted(place: Place) -> None:
    server = place.machine("gate")
    name = f"{server.user}@{server.host}:{server.port}"
    key = place.json("trust", name, "--fingerprint", fingerprint(server))
    assert (key["new"], key["key"]["fingerprint"]) == (True, fingerprint(server))
    status, _, err = place.run("trust", "this machin")
    assert status == ExitCode.USAGE
    assert 'did you mean "this machine"?' in err


def test_the_key_of_a_jump_host_is_asked_about_too(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, box = place.machine("gate"), place.machine("box")
    (place.folder / "me" / ".ssh").mkdir()
    settings = f"Host gate\n  HostName {gate.host}\n  Port {gate.port}\n  IdentityFile {place.identity}\n"
    (place.folder / "me" / ".ssh" / "config").write_text(settings)
    answers(monkeypatch, "yes\nyes\n")
    status, _, err = place.add(box, "box", "--jump", "gate")
    assert status == ExitCode.DONE, err
    assert err.index(fingerprint(gate)) < err.index(fingerprint(box))
    assert load_cluster(place.root / "config" / "cluster.yaml").value.nodes[1].jump == "gate"


def test_a_removed_node_is_gone(place: Place, with_box: Sshd) -> None:
    assert place.json("remove", "BOX") == {"removed": "box", "stays": []}
    assert "name: box" not in place.text
    status, _, err = place.run("remove", "box")
    assert status == ExitCode.USAGE
    assert 'there is no node "box"' in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["add", "localhost"], "is this machine, which needs no ssh"),
        (["add", "me@a", "--user", "you"], "the user is given twice"),
        (["add", "a b"], "no host name or address"),
        (["add", "a", "--jump", "-oProxyCommand=x"], "expected one argument"),
        (["add", "a", "--jump=-oProxyCommand=x"], "no host name"),
        (["add", "a", "--name", "this machine"], "is called already"),
        (["add", "a", "--environment", "own"], "name it with `python"),
        (["add", "a", "--port", "99999"], "from 1 to 65535"),
        (["link"], "there is no group"),
        (["link", "--group", "x"], "there is no group 'x' (there: none)"),
        (["fly"], "invalid choice"),
    ],
)
def test_wrong_use(place: Place, argv: list[str], said: str) -> None:
    status, _, err = place.run(*argv)
    assert status == ExitCode.USAGE, err
    assert said in err
    assert "Traceback" not in err


def test_a_key_file_is_meant_from_where_the_command_is_given(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    server = place.machine("box")
    monkeypatch.chdir(place.folder)
    status, _, err = place.add(server, "box", "--identity", "id", "--fingerprint", fingerprint(server))
    assert status == ExitCode.DONE, err
    assert load_cluster(place.root / "config" / "cluster.yaml").value.nodes[1].identity == str(place.identity)


def test_a_machine_that_cannot_be_called_is_not_written_down(place: Place) -> None:
    server = place.machine("box")
    server.stop()
    before = place.text if (place.root / "config").exists() else ""
    status, _, err = place.add(server, "box")
    assert status == ExitCode.STAGE_FAILED
    assert f"{server.host}:{server.port}" in err
    assert "name: box" not in place.text
    assert before in place.text


def test_hosts_that_ssh_knows_are_offered(place: Place, with_box: Sshd) -> None:
    (place.folder / "me" / ".ssh").mkdir()
    (place.folder / "me" / ".ssh" / "config").write_text(f"Host mini\n  User ada\nHost b\n  HostName {with_box.host}\n")
    found = {offer["host"]: offer for offer in place.json("discover")}
    assert (found["mini"]["user"], found["mini"]["source"], found["mini"]["node"]) == ("ada", "ssh config", "")
    assert found["b"]["node"] == "box"


def test_an_environment_of_its_own_is_used_as_it_is(place: Place) -> None:
    server = place.machine("box")
    added = place.add(server, "box", "--environment", "own", "--fingerprint", fingerprint(server))
    assert added[0] == ExitCode.DONE, added[2]
    status, out, err = place.run("push")
    assert (status, out) == (0, f"ok box: {sys.executable}\n"), err
    assert place.json("push", "this machine", "box")["box"]["python"] == sys.executable
    server.stop()
    status, out, _ = place.run("push")
    assert status == ExitCode.STAGE_FAILED
    assert out.startswith("!! box: A machine cannot be used: ")


def test_links_are_made_shown_and_taken_back(place: Place, with_box: Sshd) -> None:
    other = place.machine("other")
    assert place.add(other, "other", "--fingerprint", fingerprint(other))[0] == ExitCode.DONE
    file = place.root / "config" / "cluster.yaml"
    file.write_text(file.read_text() + "groups: [{name: two, nodes: [box, other], backend: gloo}]\n")
    status, out, err = place.run("link")
    assert (status, out) == (0, "two: box leads and calls other\n"), err
    assert place.json("link", "--group", "two") == {"two": {"leader": "box", "calls": ["other"]}}
    assert has_leave(place.root, GroupSpec(name="two", nodes=("box", "other")))
    assert "restrict,pty" in (place.folder / "other" / ".ssh" / "authorized_keys").read_text()
    (plan,) = place.json("topology", status=place.run("topology")[0])
    assert (plan["name"], plan["nodes"], plan["backend"]) == ("two", ["box", "other"], "gloo")
    out = place.run("topology")[1]
    assert "two: 2 node(s), torch, backend gloo, launcher torchrun" in out
    assert place.json("unlink") == {"two": {}}
    assert (place.folder / "other" / ".ssh" / "authorized_keys").read_text() == ""
    assert not (place.root / KEY_FILE).exists()
    assert not has_leave(place.root, GroupSpec(name="two", nodes=("box", "other")))
    assert place.run("link")[0] == ExitCode.DONE
    other.stop()
    status, out, _ = place.run("unlink")
    assert status == ExitCode.STAGE_FAILED
    assert "!! other: " in out
    assert "refuses connections" in out
    # It is on again: what was left there can be taken back even now.
    place.machine("other", other)
    assert place.json("unlink") == {"two": {}}
    assert (place.folder / "other" / ".ssh" / "authorized_keys").read_text() == ""


@pytest.fixture
def linked(place: Place, with_box: Sshd) -> Sshd:
    """A group of three; the one that is handed out is neither its first nor its last."""
    servers = {name: place.machine(name) for name in ("middle", "last")}
    for name, server in servers.items():
        assert place.add(server, name, "--fingerprint", fingerprint(server))[0] == ExitCode.DONE
    file = place.root / "config" / "cluster.yaml"
    file.write_text(file.read_text() + "groups: [{name: three, nodes: [box, middle, last]}]\n")
    assert place.run("link")[0] == ExitCode.DONE
    return servers["middle"]


def test_a_removed_node_gives_back_what_links_had_put_there(place: Place, linked: Sshd) -> None:
    keys = place.folder / "middle" / ".ssh" / "authorized_keys"
    assert "jupiter:" in keys.read_text()
    assert place.json("remove", "middle") == {"removed": "middle", "stays": []}
    assert keys.read_text() == ""
    assert has_leave(place.root, GroupSpec(name="three", nodes=("box", "last")))
    assert not has_leave(place.root, GroupSpec(name="three", nodes=("box", "middle", "last")))
    # The one that leads has a private key.
    folders = list((place.folder / "box" / "j" / "links").iterdir())
    assert len(folders) == 1
    assert place.json("remove", "box")["stays"] == []
    assert not folders[0].exists()


def test_a_removed_node_that_is_away_is_told_about(place: Place, linked: Sshd) -> None:
    linked.stop()
    line = authorized_line(place.root)
    status, out, err = place.run("remove", "middle")
    assert status == ExitCode.DONE
    assert out.startswith("middle is no node any more")
    assert f"the line `{line}` may stay in ~/.ssh/authorized_keys of middle" in err
    assert line == (place.folder / "middle" / ".ssh" / "authorized_keys").read_text().strip()
    assert not has_leave(place.root, GroupSpec(name="three", nodes=("box", "middle")))


def test_a_group_that_the_file_no_longer_has_is_unlinked_too(place: Place, linked: Sshd) -> None:
    file = place.root / "config" / "cluster.yaml"
    file.write_text(file.read_text().replace("groups: [{name: three, nodes: [box, middle, last]}]", "groups: []"))
    assert place.json("unlink", "--group", "three") == {"three": {}}
    assert (place.folder / "last" / ".ssh" / "authorized_keys").read_text() == ""
    assert not (place.root / KEY_FILE).exists()
