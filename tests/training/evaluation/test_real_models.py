"""The evaluate and gate workers as programs, on real (tiny) models: a trained one, and its copy damaged by noise."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

import msgspec
import pytest

from jupiter_engine.checkpoints.model_folder import folder_sha256
from jupiter_engine.data.chunks import cut
from jupiter_engine.files import sha256_text, write_json
from jupiter_engine.protocol import facts
from jupiter_engine.protocol.orders import EvaluateOrder, GateOrder, ModelRef
from jupiter_engine.protocol.rows import Chunk, Item, Score
from jupiter_engine.protocol.specs import (
    ChunkSpec,
    EvaluationSpec,
    FilterSpec,
    GateSpec,
    GenerationSpec,
    TemplateSpec,
)
from jupiter_engine.training.model.text import TextCodec
from jupiter_engine.worker.context import read_rows
from jupiter_engine.worker.prepare import make_nano

pytestmark = pytest.mark.slow

STEPS = 80
UNITS = 48 + 60 + 60 + 12
"""Of one model."""
EVALUATION = EvaluationSpec(
    windows=48, window_bytes=500, context_bytes=100, mcq_known=60, mcq_vault=60, fitness_chunks=12
)
GENERATION = GenerationSpec(
    templates=(TemplateSpec(id="qa", type="qa"),), max_new_tokens=24, batch_size=8, context_bytes=600
)
# Models of this size guess: their questions and samples only have to be measured, the text decides.
GATE = GateSpec(primary="vault_bpb", margin_mcq=0.4, margin_yield=0.4)


@dataclass(frozen=True)
class World:
    root: Path
    trained: ModelRef
    damaged: ModelRef
    chunks: Path
    items: Path

    def evaluate_order(self, run: str, cache: str) -> EvaluateOrder:
        return EvaluateOrder(
            run=run,
            domain="topics",
            cycle=1,
            evaluation=EVALUATION,
            filter=FilterSpec(),
            generation=GENERATION,
            models=(self.trained, self.damaged),
            chunks=str(self.chunks),
            items=str(self.items),
            slice=0,
            cache=str(self.root / cache),
            twin="torch",
            threads=1,
        )

    def gate_order(self, run: str, candidate: ModelRef, incumbent: ModelRef, scores: str) -> GateOrder:
        return GateOrder(
            run=run,
            domain="topics",
            cycle=1,
            gate=GATE,
            candidate=candidate,
            incumbent=incumbent,
            scores=scores,
            items=str(self.items),
            look=1,
            slice=0,
        )


def write_corpus(root: Path) -> tuple[Path, Path]:
    """Every topic of the language reference is a document; every second one is vault."""
    chunks: list[Chunk] = []
    items: list[Item] = []
    names = sorted(topics.topics)
    for number, name in enumerate(names):
        vault = number % 2 == 0
        pieces = cut(topics.topics[name], "docs", ChunkSpec())
        chunks += [
            Chunk(
                id=f"{name}-{ordinal}",
                document=name,
                ordinal=ordinal,
                title=name,
                kind="docs",
                split="vault" if vault else "train",
                slice=0 if vault else -1,
                cluster=name,
                text=piece.text,
            )
            for ordinal, piece in enumerate(pieces)
        ]
        items += [
            Item(
                id=f"item-{name}-{copy}",
                pool="vault" if vault else "known",
                maker="title",
                document=name,
                chunk=f"{name}-0",
                cluster=name,
                slice=0 if vault else -1,
                question=f"Which topic begins with: {topics.topics[name][:60]!r}?",
                options=(name, *(names[(number + 7 * copy + step) % len(names)] for step in (3, 11, 19))),
                answer=0,
                evidence=topics.topics[name][:60],
            )
            for copy in (1, 2)
        ]
    paths = (root / "chunks.jsonl", root / "items.jsonl")
    paths[0].write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in chunks))
    paths[1].write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in items))
    return paths


def train(folder: Path, texts: list[str]) -> None:
    """A few plain AdamW steps in place: enough to leave chance far behind."""
    import torch

    from jupiter_engine.backends.torch.model import load_model, save_model

    torch.manual_seed(0)
    model = load_model(folder, "float32")
    ids = torch.tensor(TextCodec(folder).encode("\n".join(texts)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(STEPS):
        starts = torch.randint(0, len(ids) - 129, (8,)).tolist()
        rows = torch.stack([ids[start : start + 129] for start in starts])
        logits = model(rows[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_model(model, folder)


def damage(folder: Path) -> None:
    """Noise as large as one and a half times each matrix's own spread."""
    import torch

    from jupiter_engine.backends.torch.model import load_model, save_model

    generator = torch.Generator().manual_seed(1)
    model = load_model(folder, "float32")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter += 1.5 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    save_model(model, folder)


def reference(folder: Path) -> ModelRef:
    return ModelRef(name=folder.name, folder=str(folder), sha256=folder_sha256(folder))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    import torch

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("real")
    make_nano(root / "trained", seed=0)
    texts = [topics.topics[name] for number, name in enumerate(sorted(topics.topics)) if number % 2]
    train(root / "trained", texts)
    shutil.copytree(root / "trained", root / "damaged")
    damage(root / "damaged")
    chunks, items = write_corpus(root)
    return World(root, reference(root / "trained"), reference(root / "damaged"), chunks, items)


def start(folder: Path, order: EvaluateOrder | GateOrder) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    if not (folder / "spec.json").exists():
        write_json(folder / "spec.json", order)
    with (folder / "worker.log").open("ab") as log:
        argv = [sys.executable, "-m", "jupiter_engine.worker", str(folder)]
        return subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)


def carried_out(folder: Path, order: EvaluateOrder | GateOrder) -> dict[str, Any]:
    assert start(folder, order).wait(timeout=240) == 0, (folder / "worker.log").read_text()
    last = facts.decoder.decode((folder / "events.jsonl").read_bytes().splitlines()[-1])
    assert isinstance(last, facts.Finished)
    return last.result


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.fixture(scope="module")
def measured(world: World) -> dict[str, Any]:
    """Both models measured by a worker that is killed twice on the way (kill -9, at 40 and 200 finished units)."""
    folder = world.root / "evaluate"
    order = world.evaluate_order("evaluate", "cache")
    for enough in (40, 200):
        worker = start(folder, order)
        while lines_of(folder / "results" / "scores.jsonl") < enough and worker.poll() is None:
            time.sleep(0.02)
        assert worker.poll() is None, (folder / "worker.log").read_text()
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait(timeout=30)
    return carried_out(folder, order)


def test_a_worker_killed_twice_measures_every_unit_once(world: World, measured: dict[str, Any]) -> None:
    rows = read_rows(Path(measured["scores_path"]), Score)
    assert measured["units"] == {"vault_bpb": 48, "mcq_known": 60, "mcq_vault": 60, "yield": 12}
    assert len(rows) == len({row.id for row in rows}) == 2 * UNITS
    for model in (world.trained, world.damaged):
        lines = (world.root / "cache" / f"{model.sha256}.jsonl").read_bytes().splitlines()
        assert len(lines) == len({msgspec.json.decode(line)["key"] for line in lines}) == UNITS
    # Random guessing over bytes costs 8 bits; this much training brings text well below 4.
    assert 1.0 < measured["summary"]["trained"]["vault_bpb"] < 4.0
    assert measured["summary"]["damaged"]["vault_bpb"] > 1.02 * measured["summary"]["trained"]["vault_bpb"]


def test_killed_and_uninterrupted_evaluations_agree(world: World, measured: dict[str, Any]) -> None:
    again = carried_out(world.root / "whole", world.evaluate_order("whole", "other-cache"))
    interrupted, whole = (
        {row.id: row for row in read_rows(Path(result["scores_path"]), Score)} for result in (measured, again)
    )
    assert interrupted.keys() == whole.keys()
    # Batches end elsewhere after a kill, and bfloat16 sums round with the batch they are in.
    for key, row in whole.items():
        if row.task == "vault_bpb":
            assert interrupted[key].value == pytest.approx(row.value, rel=0.01)
            assert (interrupted[key].weight, interrupted[key].cluster) == (row.weight, row.cluster)


def test_a_second_look_at_the_same_units_needs_no_model(world: World, measured: dict[str, Any]) -> None:
    moved = msgspec.structs.replace(
        world.evaluate_order("cached", "cache"),
        models=tuple(msgspec.structs.replace(model, folder="/gone") for model in (world.trained, world.damaged)),
    )
    result = carried_out(world.root / "cached", moved)
    assert result["cached"] == 2 * UNITS
    assert result["summary"] == measured["summary"]


def test_the_better_model_is_promoted(world: World, measured: dict[str, Any]) -> None:
    order = world.gate_order("up", world.trained, world.damaged, measured["scores_path"])
    decision = carried_out(world.root / "up", order)["decision"]
    assert decision["verdict"] == "promote", decision["sentences"]
    text = decision["endpoints"][0]
    assert (text["name"], text["role"], text["units"]) == ("vault_bpb", "primary", 48)
    assert text["low"] > 0
    assert text["p_value"] <= 0.0304


def test_the_damaged_model_is_refused_as_worse(world: World, measured: dict[str, Any]) -> None:
    order = world.gate_order("down", world.damaged, world.trained, measured["scores_path"])
    decision = carried_out(world.root / "down", order)["decision"]
    assert decision["verdict"] == "worse", decision["sentences"]
    assert decision["endpoints"][0]["high"] < 0
    assert "measurably worse (unseen text)" in decision["sentences"][0]


def test_deciding_again_gives_the_same_bytes(world: World, measured: dict[str, Any]) -> None:
    for run in ("once", "twice"):
        carried_out(world.root / run, world.gate_order(run, world.trained, world.damaged, measured["scores_path"]))
    hashes = [
        sha256_text((world.root / run / "results" / "decision.json").read_text("utf-8")) for run in ("once", "twice")
    ]
    assert hashes[0] == hashes[1]
