"""Processes by identity, the two ways of reading them, and where a runner is put out of a login's reach."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from jupiter_engine.node import identity
from tests.node.kept import Node, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def test_an_identity_is_what_others_say_it_is() -> None:
    found = identity.of(os.getpid())
    assert abs(found["started_at"] - psutil.Process().create_time()) < 0.1
    assert identity.living(found)
    without_mark = {"pid": found["pid"], "started_at": psutil.Process().create_time()}
    assert identity.living(without_mark), "as msgspec records of this project hold it"
    assert not identity.living({**found, "mark": "1"})
    assert not identity.living({**found, "boot_id": "another"})
    assert not identity.living({**without_mark, "started_at": found["started_at"] - 5})
    assert not identity.living({})


def test_a_name_with_parentheses_and_blanks_is_no_field(tmp_path: Path) -> None:
    program = tmp_path / "a) S 1 (b c"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([str(program), "30"]) as child:
        until(lambda: b"a)" in Path(f"/proc/{child.pid}/stat").read_bytes())
        row = identity.row(child.pid)
        assert row
        assert row.parent == os.getpid()
        child.kill()


def test_the_dead_do_not_live() -> None:
    with subprocess.Popen(["sleep", "30"]) as child:
        known = identity.of(child.pid)
        child.kill()
        until(lambda: (identity.row(child.pid) or row_none()).state == "Z")
        assert identity.living(known) is None, "uncollected, but dead"
        assert not identity.send(known, 0)
    assert identity.living(known) is None


def row_none() -> identity.Row:
    return identity.Row(0, 0, 0, "", 0.0, "")


@pytest.mark.skipif(not Path("/bin/ps").exists(), reason="needs ps")
def test_ps_tells_the_same_as_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sleep", "30"], start_new_session=True) as child:
        until(lambda: (identity.row(child.pid) or row_none()).state == "S")
        by_proc = identity.row(child.pid)
        monkeypatch.setattr(identity, "LINUX", False)
        by_ps = identity.row(child.pid)
        everyone = identity.rows()
        child.kill()
    assert by_proc
    assert by_ps
    assert (by_ps.pid, by_ps.parent, by_ps.session) == (by_proc.pid, by_proc.parent, by_proc.session)
    assert by_ps.state in "SD"
    assert abs(by_ps.started_at - by_proc.started_at) <= 2.0
    assert everyone[child.pid].mark == by_ps.mark
    assert identity.row(child.pid) is None


def test_descendants_at_any_depth() -> None:
    rows = {pid: identity.Row(pid, parent, 0, "S", 0.0, "") for pid, parent in ((2, 1), (3, 2), (4, 3), (5, 1), (6, 9))}
    assert identity.descendants(rows, {2}) == {3, 4}
    assert identity.descendants(rows, {1}) == {2, 3, 4, 5}


SYSTEMD_RUN = """#!/bin/sh
echo "$@" >> {log}
while [ "$1" != -- ]; do shift; done
shift
{exit}
exec "$@"
"""

START = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from jupiter_node import keep
from jupiter_node.keep_folder import KeepFolder
keep.SYSTEMD, keep.LINGERING = Path(sys.argv[3]), Path(sys.argv[4])
keep.start_runner(KeepFolder(Path(sys.argv[2])))
"""


@pytest.mark.parametrize("case", ["works", "does not linger", "refuses", "no systemd"])
def test_systemd_keeps_a_runner_only_where_it_really_can(node: Node, case: str) -> None:
    tools, log = node.folder / "tools", node.folder / "systemd.log"
    for folder in ("tools", "systemd", "linger"):
        (node.folder / folder).mkdir()
    (tools / "systemd-run").write_text(SYSTEMD_RUN.format(log=log, exit="exit 1" if case == "refuses" else ""))
    (tools / "systemd-run").chmod(0o755)
    if case != "does not linger":
        (node.folder / "linger" / "tester").touch()
    node.order(node.process("worker", "sleep 60"))
    systemd = node.folder / ("nothing" if case == "no systemd" else "systemd")
    subprocess.run(
        [node.python, "-I", "-S", "-c", START, node.file, node.keep_folder, systemd, node.folder / "linger"],
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "LOGNAME": "tester"},
        check=True,
        timeout=30,
    )
    assert node.state()["runner"]["alive"], "with or without systemd"
    calls = log.read_text().splitlines() if log.exists() else []
    assert len([call for call in calls if "keep-run" in call]) == (case == "works")
    node.tell(id="x", do="kill")
    until(lambda: not node.of_ours())


def test_looking_after_a_process_costs_next_to_nothing(node: Node) -> None:
    node.order(node.process("worker", "sleep 60 & sleep 60"))
    node.keep()
    pid = node.state()["runner"]["pid"]
    time.sleep(1)
    before = psutil.Process(pid).cpu_times()
    time.sleep(3)
    after = psutil.Process(pid).cpu_times()
    spent = after.user + after.system - before.user - before.system
    # Half a percent is the aim; the processor clock of the system has ticks of 10 ms.
    assert spent / 3 < 0.02
    node.tell(id="x", do="kill")
