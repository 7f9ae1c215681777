"""The guides name the doctor's checks by their right names, and every check has its heading."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jupiter_engine.cluster.doctor import CHECKS

DOCS = Path(__file__).parents[2] / "docs"


def headings() -> set[str]:
    lines = (DOCS / "troubleshooting.md").read_text().splitlines()
    return {line.removeprefix("### ").strip() for line in lines if line.startswith("### ")}


@pytest.mark.parametrize("guide", ["mac_cluster.md", "nvidia.md"])
def test_a_guide_names_checks_that_there_are(guide: str) -> None:
    text = (DOCS / guide).read_text()
    named = {
        name
        for found in re.finditer(r"doctor:((?:\s*`[a-z0-9-]+`,?)+)", text)
        for name in re.findall(r"`([a-z0-9-]+)`", found.group(1))
    }
    assert len(named) >= 8
    assert named <= {check.slug for check in CHECKS}
    assert named <= headings()


def test_every_check_is_explained() -> None:
    assert {check.slug for check in CHECKS} <= headings()
