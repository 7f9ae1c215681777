"""The cache of finished scores: durable, torn lines tolerated, damage named."""

from __future__ import annotations

from pathlib import Path

import pytest

from jupiter_engine.errors import StateError
from jupiter_engine.training.evaluation.score_cache import CachedScore, ScoreCache, content_key


def test_scores_are_found_again_by_a_new_process(tmp_path: Path) -> None:
    first = ScoreCache(tmp_path / "cache", "a" * 64)
    first.add([CachedScore(key="k1", value=1.5), CachedScore(key="k2", value=0.0, answer="text")])
    again = ScoreCache(tmp_path / "cache", "a" * 64)
    assert len(again) == 2
    assert again.get("k2") == CachedScore(key="k2", value=0.0, answer="text")
    assert again.get("k3") is None
    assert len(ScoreCache(tmp_path / "cache", "b" * 64)) == 0


def test_a_line_torn_by_a_kill_is_dropped_and_writing_goes_on(tmp_path: Path) -> None:
    ScoreCache(tmp_path, "a" * 64).add([CachedScore(key="k1", value=1.0)])
    path = tmp_path / f"{'a' * 64}.jsonl"
    path.write_bytes(path.read_bytes() + b'{"key":"k2","va')
    again = ScoreCache(tmp_path, "a" * 64)
    again.add([CachedScore(key="k3", value=3.0)])
    assert [ScoreCache(tmp_path, "a" * 64).get(key) is not None for key in ("k1", "k2", "k3")] == [True, False, True]


def test_two_users_of_one_cache_do_not_lose_each_others_lines(tmp_path: Path) -> None:
    one, other = ScoreCache(tmp_path, "a" * 64), ScoreCache(tmp_path, "a" * 64)
    one.add([CachedScore(key="k1", value=1.0)])
    other.add([CachedScore(key="k2", value=2.0)])
    assert len(ScoreCache(tmp_path, "a" * 64)) == 2


def test_a_damaged_line_names_file_and_line(tmp_path: Path) -> None:
    (tmp_path / f"{'a' * 64}.jsonl").write_text('{"key":"k1","value":1.0}\nnonsense\n')
    with pytest.raises(StateError, match=r"a\.jsonl, line 2"):
        ScoreCache(tmp_path, "a" * 64)


def test_keys_depend_on_every_part() -> None:
    keys = {content_key("mcq", 1, "q", ("a", "b")), content_key("mcq", 2, "q", ("a", "b")), content_key("mcq", 1, "qa")}
    assert len(keys) == 3
