"""The evaluate stage: same units for both models, nothing measured twice, killed and continued at any point."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jupiter_engine.backends.contract import Completion, GenerateRequest, GenerateStats, ScoreRequest
from jupiter_engine.errors import ModelInvalid
from jupiter_engine.files import write_json
from jupiter_engine.protocol import facts
from jupiter_engine.protocol.orders import EvaluateOrder, GateOrder, ModelRef
from jupiter_engine.protocol.rows import Chunk, Item, Score
from jupiter_engine.protocol.specs import EvaluationSpec, FilterSpec, GateSpec, GenerationSpec, TemplateSpec
from jupiter_engine.worker import evaluate
from jupiter_engine.worker import gate as gate_stage
from jupiter_engine.worker.context import Halt, RunContext, read_rows

CANDIDATE = ModelRef(name="cand", folder="/models/cand", sha256="c" * 64)
INCUMBENT = ModelRef(name="base", folder="/models/base", sha256="b" * 64)
SPEC = EvaluationSpec(windows=24, window_bytes=300, context_bytes=60, mcq_known=20, mcq_vault=12, fitness_chunks=6)
COUNTS = {"vault_bpb": 24, "mcq_known": 20, "mcq_vault": 12, "yield": 6}
GENERATION = GenerationSpec(
    templates=(TemplateSpec(id="qa", type="qa"), TemplateSpec(id="explain", type="explanation")), max_new_tokens=40
)


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the product may catch it."""


@dataclass
class Machine:
    """Fake backends and what they were asked to do. `kill_at`: die at the n-th piece of work."""

    loads: list[tuple[str, str]] = field(default_factory=list)
    scored: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    written: list[tuple[str, int]] = field(default_factory=list)
    kill_at: int | None = None
    halt: Path | None = None

    def work(self) -> None:
        if self.kill_at is not None:
            self.kill_at -= 1
            if self.kill_at < 0:
                raise Killed


@dataclass
class FakeScorer:
    machine: Machine
    model: str

    def logprobs(
        self,
        requests: Sequence[ScoreRequest],
        *,
        batch_tokens: int = 4096,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[float]]:
        """A pseudo-random price a token; the candidate pays a tenth less."""
        self.machine.work()
        scale = 0.9 if self.model == "cand" else 1.0
        found = []
        for request in requests:
            self.machine.scored.append((self.model, tuple(request.tokens)))
            scored = request.tokens[request.first :]
            noise = zlib.crc32(bytes(byte % 256 for byte in request.tokens) + self.model.encode()) % 100 / 1000
            found.append([-(0.7 + noise) * scale for _ in scored])
        return found


@dataclass
class FakeGenerator:
    machine: Machine
    model: str
    stats: GenerateStats = field(default_factory=GenerateStats)

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        *,
        temperature: float,
        top_p: float,
        batch_size: int,
        stop_ids: Sequence[int],
    ) -> Iterator[Completion]:
        """Copies part of the prompt, last request first."""
        for index in reversed(range(len(requests))):
            self.machine.work()
            self.machine.written.append((self.model, requests[index].seed))
            yield Completion(index=index, tokens=requests[index].prompt[-300:-60], finish="stop")


class ByteCodec:
    eos_ids = (256,)

    def __init__(self, _folder: Path) -> None:
        pass

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return self.encode("\n".join(message["content"] for message in messages))


@dataclass(frozen=True)
class _Info:
    context: int = 4096


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    names = {Path(model.folder): model for model in (CANDIDATE, INCUMBENT)}

    def loader(kind: str, made: Any) -> Callable[..., Any]:
        def load(_twin: str, folder: Path, **_options: object) -> Any:
            machine.loads.append((kind, names[folder].name))
            return made(machine, names[folder].name)

        return load

    monkeypatch.setattr(evaluate, "load_scorer", loader("scorer", FakeScorer))
    monkeypatch.setattr(evaluate, "load_generator", loader("generator", FakeGenerator))
    monkeypatch.setattr(evaluate, "TextCodec", ByteCodec)
    monkeypatch.setattr(evaluate, "verify", lambda _folder: _Info())
    monkeypatch.setattr(evaluate, "folder_sha256", lambda folder: names[folder].sha256)
    return machine


def text_of(document: str) -> str:
    return "".join(f"{document} explains thing{index} and how value{index * 7} is used there.\n" for index in range(30))


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[Path, Path]:
    """24 vault documents and 24 train documents with questions on each."""
    chunks: list[Chunk] = []
    items: list[Item] = []
    for number in range(48):
        vault = number % 2 == 0
        name = f"doc{number:02d}"
        place = {"document": name, "cluster": f"k{name}", "slice": 0 if vault else -1}
        chunk = Chunk(
            id=f"{name}-0", ordinal=0, title=name, kind="docs", split="vault" if vault else "train",
            text=text_of(name), **place,  # type: ignore[arg-type]
        )  # fmt: skip
        chunks.append(chunk)
        items.append(
            Item(
                id=f"item{number:02d}",
                pool="vault" if vault else "known",
                maker="test",
                chunk=chunk.id,
                question=f"What does {name} explain?",
                options=(f"thing{number}", "nothing", "all"),
                answer=0,
                evidence="thing",
                **place,  # type: ignore[arg-type]
            )
        )
    paths = (tmp_path / "chunks.jsonl", tmp_path / "items.jsonl")
    paths[0].write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in chunks))
    paths[1].write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in items))
    return paths


def order(tmp_path: Path, corpus: tuple[Path, Path], **changes: Any) -> EvaluateOrder:
    made = EvaluateOrder(
        run="r", domain="d", cycle=1, evaluation=SPEC, filter=FilterSpec(), generation=GENERATION,
        models=(CANDIDATE, INCUMBENT), chunks=str(corpus[0]), items=str(corpus[1]), slice=0,
        cache=str(tmp_path / "cache"), twin="torch", seed=3,
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def start(folder: Path, made: EvaluateOrder | GateOrder) -> RunContext:
    folder.mkdir(exist_ok=True)
    write_json(folder / "spec.json", made)
    return RunContext(folder)


def finished(folder: Path) -> dict[str, Any]:
    last = facts.decoder.decode((folder / "events.jsonl").read_bytes().splitlines()[-1])
    assert isinstance(last, facts.Finished)
    return last.result


def evaluated(folder: Path, made: EvaluateOrder) -> dict[str, Any]:
    with closing(start(folder, made)) as context:
        evaluate.run(context, made)
    return finished(folder)


def test_both_models_are_measured_on_the_same_units(
    tmp_path: Path, corpus: tuple[Path, Path], machine: Machine
) -> None:
    result = evaluated(tmp_path / "run", order(tmp_path, corpus))
    rows = read_rows(Path(result["scores_path"]), Score)
    assert result["units"] == COUNTS
    assert result["cached"] == 0
    for task, count in COUNTS.items():
        ours = {row.unit for row in rows if row.task == task and row.model == "cand"}
        assert ours == {row.unit for row in rows if row.task == task and row.model == "base"}
        assert len(ours) == count
    asked = {model: [tokens for name, tokens in machine.scored if name == model] for model in ("cand", "base")}
    assert asked["cand"] == asked["base"]
    assert [seed for name, seed in machine.written if name == "cand"] == [
        seed for name, seed in machine.written if name == "base"
    ]
    assert machine.loads == [("scorer", "cand"), ("generator", "cand"), ("scorer", "base"), ("generator", "base")]


def test_bits_per_byte_are_the_scorers_nats_over_the_scored_bytes(
    tmp_path: Path, corpus: tuple[Path, Path], machine: Machine
) -> None:
    result = evaluated(tmp_path / "run", order(tmp_path, corpus))
    rows = [row for row in read_rows(Path(result["scores_path"]), Score) if row.task == "vault_bpb"]
    for name in ("cand", "base"):
        mine = [row for row in rows if row.model == name]
        level = sum(row.value for row in mine) / math.log(2) / sum(row.weight for row in mine)
        assert result["summary"][name]["vault_bpb"] == pytest.approx(level, rel=1e-12)
        # One token a byte at 0.7 .. 0.8 nats (the candidate a tenth less).
        assert all(0.63 <= row.value / row.weight <= 0.8 for row in mine)
        assert all(200 <= row.weight <= 300 for row in mine)


def test_a_second_evaluation_loads_no_model(tmp_path: Path, corpus: tuple[Path, Path], machine: Machine) -> None:
    first = evaluated(tmp_path / "run1", order(tmp_path, corpus))
    machine.loads.clear()
    renamed = msgspec.structs.replace(INCUMBENT, name="old-base")
    second = evaluated(tmp_path / "run2", order(tmp_path, corpus, models=(CANDIDATE, renamed)))
    assert machine.loads == []
    assert second["cached"] == 2 * sum(COUNTS.values())
    assert second["summary"]["cand"] == first["summary"]["cand"]
    assert second["summary"]["old-base"] == first["summary"]["base"]
    one, two = (read_rows(Path(result["scores_path"]), Score) for result in (first, second))
    assert {(row.id, row.value, row.weight, row.answer) for row in one} == {
        (row.id, row.value, row.weight, row.answer) for row in two
    }


def test_changed_sampling_or_filters_only_repeat_what_they_touch(
    tmp_path: Path, corpus: tuple[Path, Path], machine: Machine
) -> None:
    evaluated(tmp_path / "run1", order(tmp_path, corpus))
    machine.loads.clear()
    evaluated(tmp_path / "run2", order(tmp_path, corpus, filter=FilterSpec(min_words=5)))
    assert machine.loads == [("generator", "cand"), ("generator", "base")]
    machine.loads.clear()
    evaluated(tmp_path / "run3", order(tmp_path, corpus, twin="mlx"))
    assert len(machine.loads) == 4


@pytest.mark.parametrize("kill_at", [0, 1, 3, 5, 7, 9, 12, 20])
def test_killed_anywhere_nothing_is_lost_and_nothing_is_measured_twice(
    tmp_path: Path, corpus: tuple[Path, Path], machine: Machine, kill_at: int
) -> None:
    made = order(tmp_path, corpus)
    reference = evaluated(tmp_path / "reference", msgspec.structs.replace(made, cache=str(tmp_path / "cache2")))
    machine.scored.clear()
    machine.written.clear()
    machine.kill_at = kill_at
    with closing(start(tmp_path / "run", made)) as context, pytest.raises(Killed):
        evaluate.run(context, made)
    with (tmp_path / "run" / "results" / "scores.jsonl").open("ab") as file:
        file.write(b'{"id":"torn')
    machine.kill_at = None
    result = evaluated(tmp_path / "run", made)
    rows, expected = (read_rows(Path(one["scores_path"]), Score) for one in (result, reference))
    assert sorted(rows, key=lambda row: row.id) == sorted(expected, key=lambda row: row.id)
    assert len(machine.written) == len(set(machine.written)) == 2 * COUNTS["yield"]
    assert len(machine.scored) == len(set(machine.scored))
    assert result["summary"] == reference["summary"]


def test_a_halt_stops_between_batches_with_everything_done_on_disk(
    tmp_path: Path, corpus: tuple[Path, Path], machine: Machine
) -> None:
    made = order(tmp_path, corpus)
    with closing(start(tmp_path / "run", made)) as context:
        (tmp_path / "run" / "inbox" / "halt").touch()
        with pytest.raises(Halt):
            evaluate.run(context, made)
    assert machine.loads == []


def test_progress_rises_to_a_hundred_percent_and_names_what_runs(
    tmp_path: Path, corpus: tuple[Path, Path], machine: Machine
) -> None:
    evaluated(tmp_path / "run", order(tmp_path, corpus))
    lines = (tmp_path / "run" / "events.jsonl").read_bytes().splitlines()
    seen = [fact for line in lines if isinstance(fact := facts.decoder.decode(line), facts.Progress)]
    assert [fact.done for fact in seen] == sorted(fact.done for fact in seen)
    assert (seen[-1].done, seen[-1].total, seen[-1].unit) == (100.0, 100.0, "percent")
    assert seen[0].note == "cand: unseen text, 16 of 124 units"
    assert seen[-1].note == "base: fitness as a generator, 124 of 124 units"


def test_a_model_folder_that_changed_is_refused_before_its_scores_are_kept(
    tmp_path: Path, corpus: tuple[Path, Path], machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "folder_sha256", lambda _folder: "d" * 64)
    made = order(tmp_path, corpus)
    refusal = pytest.raises(ModelInvalid, match="holds dddddddddddd, the order names cand as cccccccccccc")
    with closing(start(tmp_path / "run", made)) as context, refusal:
        evaluate.run(context, made)
    assert machine.loads == []


def test_the_same_model_twice_is_measured_once(tmp_path: Path, corpus: tuple[Path, Path], machine: Machine) -> None:
    twin = msgspec.structs.replace(INCUMBENT, name="copy")
    result = evaluated(tmp_path / "run", order(tmp_path, corpus, models=(twin, INCUMBENT)))
    assert machine.loads == [("scorer", "base"), ("generator", "base")]
    assert result["summary"]["copy"] == result["summary"]["base"]


def test_a_task_counted_zero_is_not_measured(tmp_path: Path, corpus: tuple[Path, Path], machine: Machine) -> None:
    spec = msgspec.structs.replace(SPEC, mcq_vault=0, fitness_chunks=0)
    result = evaluated(tmp_path / "run", order(tmp_path, corpus, evaluation=spec))
    assert result["units"] == {"vault_bpb": 24, "mcq_known": 20, "mcq_vault": 0, "yield": 0}
    assert set(result["summary"]["cand"]) == {"vault_bpb", "mcq_known"}
    assert ("generator", "cand") not in machine.loads


def test_the_gate_stage_decides_on_what_evaluate_wrote(
    tmp_path: Path, corpus: tuple[Path, Path], machine: Machine
) -> None:
    scores = evaluated(tmp_path / "run", order(tmp_path, corpus))["scores_path"]
    gate = GateSpec(primary="vault_bpb", min_windows=20, min_items=10, min_documents=10)
    made = GateOrder(
        run="g", domain="d", cycle=1, gate=gate, candidate=CANDIDATE, incumbent=INCUMBENT, scores=scores,
        items=str(corpus[1]), look=1, slice=0,
    )  # fmt: skip
    with closing(start(tmp_path / "gate", made)) as context:
        gate_stage.run(context, made)
    decision = finished(tmp_path / "gate")["decision"]
    text = next(one for one in decision["endpoints"] if one["name"] == "vault_bpb")
    assert text["passed"] is True
    assert text["effect"] > 0.05
    assert (tmp_path / "gate" / "results" / "decision.json").exists()
    notes = [
        fact.text
        for line in (tmp_path / "gate" / "events.jsonl").read_bytes().splitlines()
        if isinstance(fact := facts.decoder.decode(line), facts.Note)
    ]
    assert notes == decision["sentences"]
