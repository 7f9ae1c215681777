"""docs/troubleshooting.md has a heading for every check and no other, each with symptom, cause and way out."""

from __future__ import annotations

import re
from pathlib import Path

from jupiter_engine.cluster.doctor import CHECKS

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "troubleshooting.md").read_text()


def sections() -> dict[str, str]:
    parts = re.split(r"^### (.+)$", TEXT, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_a_heading_for_every_check_and_no_other() -> None:
    assert set(sections()) == {check.slug for check in CHECKS}


def test_each_says_what_is_seen_why_and_what_to_do() -> None:
    for slug, text in sections().items():
        for part in ("**Symptom.**", "**Why.**", "**What to do.**"):
            assert text.count(part) == 1, (slug, part)
