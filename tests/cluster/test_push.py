"""Environments on nodes, built for real: carried or from an index, one round trip when nothing changed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jupiter_engine.cluster import conversation, project_wheel, push, targets, wheels
from jupiter_engine.cluster.contents import HashCache
from jupiter_engine.cluster.push import Environment, Wanted, push_environment
from jupiter_engine.cluster.targets import Kind, Target
from jupiter_engine.cluster.wheels import Lock, NothingFits, Wheelhouse
from jupiter_engine.errors import DiskFull, JupiterError, RemoteError, StageFailed
from jupiter_engine.protocol.fleet import Transfer
from jupiter_engine.settings.cluster import ClusterSettings, NodeSpec
from tests.cluster.metered_node import Fault, MeteredNode

SMALL = Wanted(("msgspec", "psutil>=6"), ("msgspec", "psutil"))
REMOTE = NodeSpec(host="node.example", name="node")


def small(_: Kind) -> Wanted:
    return SMALL


@pytest.fixture(autouse=True, scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the package, so that nobody changes it while tests compare what was made of it."""
    copy = tmp_path_factory.mktemp("package") / "jupiter_engine"
    shutil.copytree(Path(push.__file__).parent.parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(project_wheel, "package", lambda: copy)
        yield copy


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose wheelhouse has what SMALL needs for this machine's Python: fetched once, reused by all."""
    root = tmp_path_factory.mktemp("wheels")
    node = MeteredNode.at(tmp_path_factory.mktemp("first"))
    try:
        asyncio.run(push_small(node, root, mode="carried"))
    except StageFailed as error:
        pytest.skip(f"no package index here: {error.detail}")
    return root


@pytest.fixture
def root(house: Path, tmp_path: Path) -> Path:
    """A workspace of one's own with those wheels."""
    shutil.copytree(house / ".jupiter" / "wheels", tmp_path / "workspace" / ".jupiter" / "wheels")
    shutil.rmtree(tmp_path / "workspace" / ".jupiter" / "wheels" / "nodes")
    return tmp_path / "workspace"


@pytest.fixture
def node(tmp_path: Path) -> MeteredNode:
    (tmp_path / "there").mkdir()
    return MeteredNode.at(tmp_path / "there")


async def push_small(node: MeteredNode, root: Path, **options: Any) -> Environment:
    spec = options.pop("spec", NodeSpec(host=REMOTE.host, name=REMOTE.name, python=sys.executable))
    hashes = HashCache(root / ".jupiter" / "hashes.db")
    return await push_environment(node, spec, root=root, hashes=hashes, wanted=small, **options)


def said_by(environment: Environment, code: str) -> str:
    """What the environment's Python prints, from a folder and with variables that are not ours."""
    variables = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **environment.env}
    done = subprocess.run([environment.python, "-c", code], env=variables, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def ready(node: MeteredNode) -> set[str]:
    return {path.parent.name for path in Path(node.workdir).glob("environments/*/ready.json")}


WHERE = "import jupiter_engine, msgspec, psutil, sys; print(jupiter_engine.__file__, msgspec.__file__, sys.prefix)"


async def test_an_environment_is_built_and_then_costs_one_round_trip(node: MeteredNode, root: Path) -> None:
    told: list[Transfer] = []
    environment = await push_small(node, root, on_transfer=told.append)
    work = Path(node.workdir)
    code, packages, prefix = said_by(environment, WHERE).split()
    assert code.startswith(f"{work}/code/")
    assert packages.startswith(f"{work}/bases/")
    assert prefix == f"{work}/environments/{environment.hash}"
    assert environment.env == {}
    assert said_by(environment, "import importlib.metadata as m; print(m.version('jupiter'))") == "0.1.0"
    assert {"sending", "verifying"} <= {transfer.step for transfer in told}
    assert any(transfer.step.startswith("installing") for transfer in told)
    assert (work / "environments" / "current").read_text().strip() == environment.hash
    # Nothing of this machine's own packages may be seen there.
    with pytest.raises(AssertionError, match="No module named 'textual'"):
        said_by(environment, "import textual")

    node.streams.clear()
    node.sent_bytes = 0
    assert await push_small(node, root) == environment
    assert (node.streams, node.sent_bytes) == (["environment-state"], 0)


async def test_changed_code_sends_only_code(node: MeteredNode, root: Path, package: Path) -> None:
    before = await push_small(node, root)
    (package / "fresh.py").write_text("HERE = 1\n")
    node.streams.clear()
    node.sent_bytes = 0
    after = await push_small(node, root)
    assert after.hash != before.hash
    assert said_by(after, "import jupiter_engine.fresh as f; print(f.HERE)") == "1"
    assert node.sent_bytes < 3 << 20
    assert len(list((Path(node.workdir) / "bases").glob("*/ready.json"))) == 1
    assert node.streams == [
        "environment-state", "store-have", "store-receive", "environment-build", "environment-prune",
        "store-prune",
    ]  # fmt: skip
    # The way back is still there, at one round trip.
    (package / "fresh.py").unlink()
    node.streams.clear()
    assert await push_small(node, root) == before
    assert node.streams == ["environment-state"]


def test_the_wheel_of_the_project_depends_on_nothing_but_its_files(tmp_path: Path) -> None:
    package = tmp_path / "jupiter_engine"
    package.mkdir()
    (package / "__init__.py").write_text("one = 1\n")
    first = project_wheel.pack(package)
    os.utime(package / "__init__.py", (1, 1))
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "x.pyc").write_bytes(b"x")
    assert project_wheel.pack(package) == first
    (package / "__init__.py").write_text("one = 2\n")
    assert project_wheel.pack(package) != first
    # pip agrees that it is a wheel.
    wheel = tmp_path / "jupiter-0.1.0-py3-none-any.whl"
    wheel.write_bytes(first)
    argv = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(tmp_path / "to")]
    subprocess.run([*argv, str(wheel)], check=True, capture_output=True)
    assert (tmp_path / "to" / "jupiter_engine" / "__init__.py").read_text() == "one = 1\n"


@pytest.mark.parametrize("after", [1000, 150_000, 900_000])
async def test_a_push_that_was_cut_goes_on(node: MeteredNode, root: Path, after: int) -> None:
    node.fault = Fault(cut_after_bytes=after)
    with pytest.raises(RemoteError):
        await push_small(node, root)
    assert ready(node) == set()
    sent = node.sent_bytes
    node.sent_bytes = 0
    environment = await push_small(node, root)
    assert said_by(environment, "import msgspec; print('there')") == "there"
    assert node.sent_bytes + sent < 2 * sum(path.stat().st_size for path in (root / ".jupiter/wheels/files").iterdir())


async def test_a_build_that_was_killed_leaves_nothing_that_looks_ready(node: MeteredNode, root: Path) -> None:
    environment = await push_small(node, root)
    work = Path(node.workdir)
    base = next((work / "bases").glob("*/ready.json")).parent
    # As a kill in the middle leaves it: files, no mark.
    (base / "ready.json").unlink()
    shutil.rmtree(next(base.glob("lib/python3.*/site-packages/msgspec")))
    again = await push_small(node, root)
    assert again == environment
    assert said_by(again, "import msgspec; print('there')") == "there"


async def test_code_that_was_written_to_is_put_right(node: MeteredNode, root: Path) -> None:
    environment = await push_small(node, root)
    module = next((Path(node.workdir) / "code").glob("*/jupiter_engine/units.py"))
    module.write_text("broken = True\n")
    again = await push_small(node, root)
    assert again == environment
    assert said_by(again, "import jupiter_engine.units as u; print(u.KIB)") == "1024"


async def test_two_pushes_at_once_build_once(node: MeteredNode, root: Path) -> None:
    first, second = await asyncio.gather(push_small(node, root), push_small(node, root))
    assert first == second
    assert said_by(first, "import psutil; print('there')") == "there"


async def test_a_damaged_wheel_here_is_fetched_anew(node: MeteredNode, root: Path) -> None:
    files = root / ".jupiter" / "wheels" / "files"
    wheel = max((path for path in files.iterdir() if len(path.name) == 64), key=lambda path: path.stat().st_size)
    data = bytearray(wheel.read_bytes())
    data[len(data) // 2] ^= 1
    wheel.write_bytes(data)
    environment = await push_small(node, root)
    assert said_by(environment, "import psutil; print('there')") == "there"


async def test_a_node_with_an_index_gets_packages_itself_and_one_without_is_sent_them(
    node: MeteredNode, root: Path, tmp_path: Path
) -> None:
    # Only the locks are known: nothing was fetched here yet.
    stored = {path.name: path for path in (root / ".jupiter" / "wheels" / "files").iterdir()}
    lock = next(iter((root / ".jupiter" / "wheels" / "locks").glob("*.json")))
    index = tmp_path / "index"
    index.mkdir()
    for wheel in json.loads(lock.read_bytes())["wheels"]:
        stored[wheel["sha256"]].rename(index / wheel["filename"])
    node.env = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index)}
    environment = await push_small(node, root)
    assert "environment-download" in node.streams
    assert said_by(environment, "import psutil; print('there')") == "there"
    # Jupiter's own code and no package.
    assert node.sent_bytes < 6 << 20
    assert not any((root / ".jupiter" / "wheels" / "files" / path.stem).exists() for path in index.iterdir())

    cut_off = MeteredNode.at(tmp_path)
    cut_off.workdir = str(tmp_path / "cut-off")
    cut_off.env = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    carried = await push_small(cut_off, root)
    assert cut_off.streams.count("environment-download") == 1
    assert said_by(carried, "import psutil; print('there')") == "there"
    alone = MeteredNode.at(tmp_path)
    alone.workdir, alone.env = str(tmp_path / "alone"), cut_off.env
    with pytest.raises(StageFailed, match="own index"):
        await push_small(alone, root, mode="index")


async def test_own_python_gets_code_only_and_must_have_the_packages(
    node: MeteredNode, root: Path, tmp_path: Path
) -> None:
    spec = NodeSpec(host=REMOTE.host, name="own", environment="own", python=sys.executable)
    environment = await push_small(node, root, spec=spec)
    assert environment.python == sys.executable
    assert list(environment.env) == ["PYTHONPATH"]
    assert not list((Path(node.workdir) / "bases").iterdir())
    node.streams.clear()
    assert await push_small(node, root, spec=spec) == environment
    assert node.streams == ["environment-state"]

    venv.create(tmp_path / "bare", with_pip=False, symlinks=True)
    bare = NodeSpec(host=REMOTE.host, name="bare", environment="own", python=str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(RemoteError, match="msgspec is missing; psutil is missing"):
        await push_small(node, root, spec=bare)


async def test_a_node_without_a_usable_python_is_told_so(node: MeteredNode, root: Path, tmp_path: Path) -> None:
    old = tmp_path / "python3"
    facts = {"path": "x", "version": [3, 9, 18], "release": True, "implementation": "cpython", "free_threaded": False}
    old.write_text(f"#!/bin/sh\necho '{json.dumps({**facts, 'venv': True})}'\n")
    old.chmod(0o755)
    spec = NodeSpec(host=REMOTE.host, python=str(old))
    with pytest.raises(StageFailed, match=r"found: .*is Python 3.9, older than 3.11") as caught:
        await push_small(node, root, spec=spec)
    assert "brew install" in caught.value.fix
    with pytest.raises(StageFailed, match="is not there"):
        await push_small(node, root, spec=NodeSpec(host=REMOTE.host, python="/nowhere/python3"))


async def test_other_machines_without_packages_and_clocks_that_are_wrong(
    node: MeteredNode, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = conversation.ask

    def changed(**facts: Any) -> None:
        async def answer(*arguments: Any, **options: Any) -> dict[str, Any]:
            found = await real(*arguments, **options)
            found["facts"].update(facts)
            return found

        monkeypatch.setattr(push, "ask", answer)

    intel = {"path": "/usr/local/bin/python3", "version": [3, 12, 1], "system": "Darwin", "machine": "x86_64"}
    changed(pythons=[{**intel, "macos": "14.5", "libc": ["", ""]}])
    with pytest.raises(NothingFits, match="Intel"):
        await push_small(node, root)
    changed(pythons=[{**intel, "system": "Linux", "libc": ["musl", "1.2"]}])
    with pytest.raises(NothingFits, match="glibc"):
        await push_small(node, root)
    changed(pythons=[{"path": 3}])
    with pytest.raises(RemoteError, match="answered"):
        await push_small(node, root)
    changed(at=0.0)
    with pytest.raises(StageFailed, match="clock"):
        await push_small(node, root)


def test_too_small_a_disk_is_said_with_numbers(node: MeteredNode) -> None:
    # The check as the node makes it, with a wheel that says it unpacks to more than any disk has.
    script = (
        "import sys, zipfile, pathlib; sys.path.insert(0, sys.argv[1]); from jupiter_node import building\n"
        "path = pathlib.Path(sys.argv[2]); archive = zipfile.ZipFile(path, 'w'); archive.writestr('x', b'x')\n"
        "archive.infolist()[0].file_size = 1 << 60; archive.close = lambda: None\n"
        "building.zipfile.ZipFile = lambda path: archive\n"
        "try: building._require_room(path.parent, [path])\n"
        "except building.NodeError as error: print(error.kind, error.detail)"
    )
    argv = [sys.executable, "-c", script, str(node.runner), str(node.runner.with_name("x.whl"))]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("DiskFull")
    assert "bytes are free" in done.stdout


async def test_old_environments_go_and_those_in_use_stay(node: MeteredNode, root: Path) -> None:
    environment = await push_small(node, root)
    work = Path(node.workdir)
    made: list[str] = []
    for i in range(4):
        name = f"{i:032x}"
        made.append(name)
        shutil.copytree(work / "environments" / environment.hash, work / "environments" / name, symlinks=True)
        os.utime(work / "environments" / name / "ready.json", (1.7e9 + i, 1.7e9 + i))
    python = str(work / "environments" / made[0] / "bin" / "python")
    runner = await asyncio.create_subprocess_exec(python, "-c", "input()", stdin=subprocess.PIPE)
    keep = work / "workspaces" / "w" / "runs" / "r" / "node"
    keep.mkdir(parents=True)
    (keep / "keep.json").write_text(json.dumps({"argv": [f"{work}/environments/{made[1]}/bin/python"]}))
    try:
        answer = await conversation.ask(node, "environment-prune", node.workdir, "2", limit_bytes=1 << 20)
        # Newest two, the one of a living process; the run of `made[1]` has no runner that lives.
        assert ready(node) == {environment.hash, made[3], made[0]}, answer
        assert runner.returncode is None
    finally:
        await runner.communicate(b"\n")
    assert said_by(environment, "import msgspec; print('there')") == "there"


@pytest.mark.parametrize(
    "ready",
    [{"python": "relative/python", "env": {}}, {"python": "/bin/python", "env": {"LD_PRELOAD": "/tmp/x.so"}}, {}],
)
async def test_a_node_does_not_choose_what_is_run_elsewhere(root: Path, tmp_path: Path, ready: dict[str, Any]) -> None:
    script = tmp_path / "liar.py"
    script.write_text(f"print({json.dumps({'ready': ready})!r}, flush=True)\n")
    node = MeteredNode(workdir=str(tmp_path / "lies"), runner=script)
    with pytest.raises(RemoteError, match="answered"):
        await push_small(node, root)


async def test_all_nodes_at_once_each_with_its_own_end(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push, "_wanted", small)
    nodes: dict[str, MeteredNode] = {}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        nodes[name] = MeteredNode.at(tmp_path / name)

    forgotten = tmp_path / "one" / "work" / "store" / ("ab" * 32)
    forgotten.parent.mkdir(parents=True)
    forgotten.write_bytes(bytes(100_000))
    os.utime(forgotten, (1e9, 1e9))

    class Three:
        async def runner(self, name: str) -> MeteredNode:
            if name not in nodes:
                raise RemoteError("nobody answers", host=name)
            return nodes[name]

    names = ["one", "two", "three"]
    specs = tuple(NodeSpec(host=f"{name}.example", name=name, python=sys.executable) for name in names)
    told: dict[str, Transfer] = {}
    found = await push.push_all(Three(), ClusterSettings(nodes=specs), root, names, told.__setitem__)
    assert list(found) == names
    assert isinstance(found["one"], Environment)
    assert isinstance(found["two"], Environment)
    assert isinstance(found["three"], JupiterError)
    assert set(told) == {"one", "two"}
    assert not forgotten.exists()


def test_locks_name_what_a_platform_takes() -> None:
    linux = Target(system="Linux", machine="x86_64", python="3.12.4", platform=(2, 28))
    assert linux.tags()[0] == "manylinux_2_28_x86_64"
    assert {"manylinux2014_x86_64", "manylinux_2_17_x86_64", "linux_x86_64"} <= set(linux.tags())
    assert "manylinux_2_29_x86_64" not in linux.tags()
    mac = Target(system="Darwin", machine="arm64", python="3.12.4", platform=(15, 1))
    assert mac.tags() == ("macosx_15_0_arm64",)
    assert mac.markers()["platform_system"] == "Darwin"


def test_nodes_get_what_is_installed_here_but_never_a_build_that_is_of_no_use_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = {"torch": "2.13.0+cpu", "numpy": "2.4.6"}
    monkeypatch.setattr(wheels, "installed_versions", lambda _: here)
    exact, public, free = wheels.constraints("cpu", ("torch",))
    assert (exact, public, free) == (("numpy==2.4.6", "torch==2.13.0+cpu"), ("numpy==2.4.6", "torch==2.13.0"), ())
    assert wheels.constraints("nvidia", ("torch",)) == [
        ("numpy==2.4.6", "torch==2.13.0", "torch!=2.13.0+cpu"),
        ("torch!=2.13.0+cpu",),
    ]


def test_what_a_kind_needs_follows_from_the_extras() -> None:
    mac, cpu = targets.requirements("mac"), targets.requirements("cpu")
    names = [{line.partition(">")[0] for line in lines} for lines in (mac, cpu)]
    assert {"mlx", "mlx-lm", "msgspec", "psutil", "numpy", "tokenizers"} <= names[0]
    assert "torch" in names[1] - names[0]
    assert not {"textual==8.2.8", "asyncssh", "zeroconf", "pytest", "gguf", "jupiter"} & (names[0] | names[1])
    assert targets.lowest_versions(mac)["mlx"] == "0.32.1"
    for kind in (mac, cpu):
        assert all("[" not in line and ";" not in line for line in kind)


async def test_a_lock_for_a_mac_has_the_parts_that_only_a_mac_needs(tmp_path: Path) -> None:
    house = Wheelhouse(tmp_path)
    mac = Target(system="Darwin", machine="arm64", python="3.12.4", platform=(15, 1))
    try:
        lock = await house.lock(mac, ("mlx>=0.32",), ())
    except NothingFits:
        raise
    except StageFailed as error:
        pytest.skip(f"no package index here: {error.detail}")
    names = {wheel.name for wheel in lock.wheels}
    assert names == {"mlx", "mlx-metal"}
    assert all("macosx" in wheel.filename for wheel in lock.wheels)
    # Asked again it is the same, without an index.
    again = await house.lock(mac, ("mlx>=0.32",), ())
    assert isinstance(again, Lock)
    assert again == lock


async def test_without_room_here_or_an_index_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    target = Target(system="Linux", machine="aarch64", python="3.12.4", platform=(2, 28))
    with pytest.raises(NothingFits, match=r"Python 3.12.4 on aarch64 \(glibc 2.28\).*msgspec") as caught:
        await Wheelhouse(tmp_path / "house").lock(target, ("msgspec",), ())
    assert "environment: own" in caught.value.fix
    full = wheels._pip_error(target, "ERROR: Could not install: [Errno 28] No space left on device")
    assert "full" in full.detail
    assert not isinstance(full, DiskFull)
