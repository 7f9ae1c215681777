"""The ranks of a run, read from what its launcher left: other machines can leave anything there."""

from __future__ import annotations

from pathlib import Path

import pytest

from jupiter_engine.api import Workspace


@pytest.mark.parametrize("hosts", [b'{"a":"b"}', b'{"-1":"b"}', b'{"0":3}', b'{"0":"\xff"}', b"[]", b'{"0":"b'])
def test_a_list_of_ranks_that_is_none_is_passed_over(hosts: bytes, tmp_path: Path) -> None:
    with Workspace(tmp_path) as workspace:
        ranks = workspace.run_folder("r") / "ranks"
        for launch in ("1", "2", "\N{SUPERSCRIPT TWO}"):
            (ranks / launch).mkdir(parents=True)
        assert workspace.ranks("r") == []
        (ranks / "2" / "hosts.json").write_bytes(hosts)
        assert workspace.ranks("r") == []
        (ranks / "1" / "hosts.json").write_text('{"10": "c", "2": "b\x1b[2J", "0": "a"}'.replace("\x1b", "\\u001b"))
        assert [(one.rank, one.host) for one in workspace.ranks("r")] == [(0, "a"), (2, "b"), (10, "c")]
        assert workspace.log("r", rank=5) == ([], 0)
