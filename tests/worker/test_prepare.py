"""Stage prepare: the base model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from jupiter_engine.checkpoints.model_folder import folder_sha256, verify
from jupiter_engine.errors import ModelInvalid
from jupiter_engine.protocol import facts
from jupiter_engine.protocol.orders import PrepareOrder
from jupiter_engine.training.model.text import TextCodec
from jupiter_engine.worker import prepare
from jupiter_engine.worker.context import RunContext


def carry_out(folder: Path, order: PrepareOrder) -> tuple[dict[str, Any], list[facts.Fact]]:
    folder.mkdir(exist_ok=True)
    (folder / "spec.json").write_bytes(msgspec.json.encode(order))
    context = RunContext(folder)
    try:
        prepare.run(context, order)
    finally:
        context.close()
    seen = [facts.decoder.decode(line) for line in (folder / "events.jsonl").read_bytes().splitlines()]
    last = seen[-1]
    assert isinstance(last, facts.Finished)
    return last.result, list(seen)


def order_of(target: Path, kind: Any = "nano", source: Path | None = None) -> PrepareOrder:
    return PrepareOrder(
        run="d-0000-prepare", domain="d", cycle=0, kind=kind, target=str(target), source=str(source) if source else None
    )


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("nano")
    result, _ = carry_out(root / "run", order_of(root / "model"))
    return root / "model", result


def test_nano_is_a_whole_chat_model(nano: tuple[Path, dict[str, Any]]) -> None:
    target, result = nano
    info = verify(target)
    assert result["model"] == {"name": "model", "folder": str(target), "sha256": folder_sha256(target)}
    assert result["parameters"] == info.parameters == 1_049_728
    assert result["vocab_size"] == info.vocab_size == 2048
    codec = TextCodec(target)
    assert codec.has_chat_template
    text = 'The "for" statement\n\n   for x in range(10):\n       print(x)\n'
    assert codec.decode(codec.encode(text)) == text
    assert codec.bytes_per_token(codec.encode(text)) > 1.5
    assert [path.name for path in target.parent.iterdir() if path.name not in ("run", "model")] == []


def test_nano_is_the_same_every_time(nano: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    prepare.make_nano(tmp_path / "again", seed=prepare.NANO_SEED)
    prepare.make_nano(tmp_path / "other", seed=prepare.NANO_SEED + 1)
    assert folder_sha256(tmp_path / "again") == nano[1]["model"]["sha256"] != folder_sha256(tmp_path / "other")


def test_a_whole_model_is_left_alone(nano: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    before = (nano[0] / "model.safetensors").stat().st_mtime_ns
    result, seen = carry_out(tmp_path / "run", order_of(nano[0]))
    assert (nano[0] / "model.safetensors").stat().st_mtime_ns == before
    assert result["model"] == nano[1]["model"]
    assert any(isinstance(fact, facts.Note) and "already there" in fact.text for fact in seen)


def test_a_damaged_model_is_made_anew(nano: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    target = tmp_path / "model"
    carry_out(tmp_path / "run", order_of(target, "folder", nano[0]))
    weights = target / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result, seen = carry_out(tmp_path / "again", order_of(target, "folder", nano[0]))
    assert result["model"]["sha256"] == nano[1]["model"]["sha256"], "a copy is the same model"
    progress = [fact for fact in seen if isinstance(fact, facts.Progress)]
    assert progress[-1].done == progress[-1].total


def test_a_source_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelInvalid, match=r"config\.json is missing"):
        carry_out(tmp_path / "run", order_of(tmp_path / "model", "folder", tmp_path / "empty"))
    assert not (tmp_path / "model").exists()
    with pytest.raises(ModelInvalid, match="no model folder was named"):
        carry_out(tmp_path / "run2", order_of(tmp_path / "model", "folder"))
