"""A workspace as a real cycle leaves it, written entry by entry: what the console's tests look at."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Literal

import msgspec

from jupiter_engine.api import EngineInfo, Workspace
from jupiter_engine.errors import JupiterError, UsageError
from jupiter_engine.files import ProcessIdentity
from jupiter_engine.orchestrator.database import Database
from jupiter_engine.orchestrator.handlers import CommandHandlers
from jupiter_engine.protocol import journal as j
from jupiter_engine.protocol.commands import AnyCommand
from jupiter_engine.protocol.decision import Decision, Endpoint, Example
from jupiter_engine.protocol.facts import Metric, Progress
from jupiter_engine.protocol.orders import ModelRef
from jupiter_engine.protocol.rows import Chunk, Row, Sample, Verdict
from jupiter_engine.settings.domain import load_domain
from jupiter_engine.settings.workspace import create, domain_file
from tests.tui.played_fleet import PlayedMachines, several

Until = Literal["empty", "review", "train", "decision", "finished", "failed"]

ESCAPES = "\x1b]52;c;cm0gLXJm\x07\x1b[2J\x1b[31mred\x1b[0m \x1bP1$r\x1b\\ \x9b31m \u202ereversed"
SAMPLES = 12


class RecordedWorkspace(Workspace):
    """The real front door with the engine's own command handlers, but no process behind it."""

    def __init__(
        self,
        root: Path,
        commands: list[AnyCommand],
        *,
        engine: bool = True,
        machines: PlayedMachines | None = None,
    ) -> None:
        super().__init__(root)
        self.commands = commands
        self._engine = engine
        self._machines = machines or PlayedMachines(several())

    def fleet(self) -> PlayedMachines:  # type: ignore[override]
        return self._machines

    def perform(self, command: AnyCommand, *, timeout_s: float = 30.0) -> None:
        self.refresh()
        self.commands.append(command)
        try:
            entries = CommandHandlers(self.root, self._database).carry_out(command, self.state)
        except JupiterError as error:
            raise UsageError(error.sentence(), title="Refused") from error
        for entry in entries:
            self._database.append(entry)

    def engine(self) -> EngineInfo | None:
        identity = ProcessIdentity(pid=4242, started_at=time.time() - 60)
        return EngineInfo(identity=identity, version="0.0.0-recorded") if self._engine else None

    def ensure_engine(self) -> EngineInfo:
        self._engine = True
        found = self.engine()
        assert found is not None
        return found


class Recorder:
    """Writes cycles into a workspace."""

    def __init__(self, root: Path, *, domain: str = "python") -> None:
        create(root)
        self.root, self.domain = root, domain
        self.db = Database(root / ".jupiter" / "jupiter.db")
        # A recording need not survive a power cut, and there are many.
        self.db._connection.execute("PRAGMA synchronous=OFF")
        self.settings: dict[str, Any] = msgspec.to_builtins(load_domain(domain_file(root, domain)).value)
        self.number = 0

    @property
    def cycle(self) -> str:
        return f"{self.domain}-{self.number:04d}"

    def run(self, stage: str) -> str:
        return f"{self.cycle}-{stage}"

    def stage(self, stage: str, result: dict[str, Any] | None = None, *, log: str = "") -> Path:
        """Start a stage and, with a result, finish it; returns its run folder."""
        run = self.run(stage)
        folder = self.root / ".jupiter" / "runs" / run
        folder.mkdir(parents=True, exist_ok=True)
        if log:
            (folder / "worker.log").write_text(log)
        self.db.add_run(run, self.domain, self.number, stage)
        self.db.append(j.StageStarted(cycle=self.cycle, stage=stage, run=run, attempt=1))
        if result is not None:
            self.db.append(j.StageFinished(cycle=self.cycle, stage=stage, run=run, result=result))
        return folder

    def rows(self, table: str, stage: str, rows: list[Row], counts: dict[str, int]) -> None:
        lines = [msgspec.json.encode(row) for row in rows]
        self.db.add_rows(table, self.domain, self.number, self.run(stage), lines)
        self.db.append(j.RowsAdded(cycle=self.cycle, stage=stage, table=table, count=len(rows), counts=counts))

    def progress(self, stage: str, done: float, total: float, unit: str) -> None:
        fact = Progress(
            seq=9, at=time.time(), done=done, total=total, unit=unit, rate_per_s=0.5, eta_s=(total - done) / 0.5
        )
        self.db.set_progress(self.run(stage), fact)

    # -- the stages ------------------------------------------------------------------------------
    def begin(self, *, review: str = "manual") -> None:
        self.number += 1
        settings = {**self.settings, "review": {"mode": review, "share": 0.1}}
        if self.number == 1:
            self.db.append(j.EngineStarted(pid=4242, version="0.0.0"))
        entry = j.CycleCreated(
            cycle=self.cycle,
            domain=self.domain,
            number=self.number,
            mode="interactive",
            remaining=0,
            settings=settings,
            by="user",
        )
        self.db.append(entry)

    def prepare(self) -> None:
        base = ModelRef(name="base", folder=str(self.root / "base"), sha256="b" * 64)
        self.stage("prepare", {"model": msgspec.to_builtins(base), "parameters": 134_515_008, "vocab_size": 49152})
        if self.number == 1:
            self.db.append(j.GeneratorRegistered(domain=self.domain, name="base", model=base, parent=None, cycle=None))
            self.db.append(j.GeneratorActivated(domain=self.domain, name="base", reason="base", by="engine"))

    def collect(self) -> None:
        chunk = Chunk(
            id=f"chunk-{self.number}",
            document="doc-1",
            ordinal=3,
            title="The assert statement",
            kind="docs",
            split="train",
            slice=-1,
            cluster="c1",
            text="Assert statements are a convenient way to insert debugging assertions.\n\n    assert x > 0",
        )
        self.stage("collect")
        self.rows("chunks", "collect", [chunk], {"docs": 1})
        result = {"documents": 2513, "chunks": 8120, "items": 940, "bytes": 5_976_884, "reused": self.number > 1}
        self.db.append(j.StageFinished(cycle=self.cycle, stage="collect", run=self.run("collect"), result=result))

    def generate(self) -> None:
        self.stage("generate", log="loading the generator\ngenerating\n")
        samples: list[Row] = [
            Sample(
                id=f"s{self.number}-{i:02d}-abcdef",
                template="qa",
                type="qa",
                prompt=f"Question {i}: what does assert do?",
                response=f"Answer {i}: it inserts debugging assertions [bold]not markup[/bold].",
                chunk=f"chunk-{self.number}",
                document="doc-1",
                generator="base",
                generator_sha256="b" * 64,
                request_sha256=f"{i}",
                seed=i,
                prompt_tokens=200,
                new_tokens=40 + i,
                finish="stop",
                cycle=self.number,
            )
            for i in range(1, SAMPLES + 1)
        ]
        self.rows("samples", "generate", samples, {"qa": SAMPLES})
        result = {"samples": SAMPLES, "new_tokens": 600, "tokens_per_s": 150.0}
        self.db.append(j.StageFinished(cycle=self.cycle, stage="generate", run=self.run("generate"), result=result))

    def filter(self) -> None:
        self.stage("filter")
        verdicts: list[Row] = []
        for i in range(1, SAMPLES + 1):
            reason = "ok" if i % 3 else ("copy" if i % 2 else "too_short")
            scores = {"grounding": 0.71, "copy": 0.12, "words": 31.0}
            verdicts.append(
                Verdict(id=f"s{self.number}-{i:02d}-abcdef", accepted=reason == "ok", reason=reason, scores=scores)
            )
        self.rows("verdicts", "filter", verdicts, {"ok": 8, "copy": 2, "too_short": 2})
        result = {"accepted": 8, "rejected": {"copy": 2, "too_short": 2}}
        self.db.append(j.StageFinished(cycle=self.cycle, stage="filter", run=self.run("filter"), result=result))

    def wait_for_review(self) -> None:
        self.stage("review")
        self.db.append(j.CycleWaits(cycle=self.cycle, what="review"))

    def train(self, steps: int = 60, *, done: bool = True) -> None:
        self.stage("queue", {"sequences": 480, "tokens": 121_344, "mix": {"real_docs": 0.5, "synthetic": 0.5}})
        folder = self.stage("train", log=train_log(steps))
        write_metrics(folder, steps)
        self.progress("train", steps, 60, "steps")
        if done:
            model = {"name": f"python-{self.number:04d}", "folder": str(self.root / "candidate"), "sha256": "c" * 64}
            result = {
                "model": model,
                "steps": steps,
                "tokens": 120_000,
                "first_loss": 3.1,
                "last_loss": 2.35,
                "tokens_per_s": 377.0,
            }
            self.db.append(j.StageFinished(cycle=self.cycle, stage="train", run=self.run("train"), result=result))

    def measure(self, verdict: Literal["promote", "worse", "inconclusive"] = "promote") -> None:
        self.stage("evaluate", {"units": {"vault_bpb": 90}, "cached": 90})
        self.stage("gate")
        decision = decision_of(f"python-{self.number:04d}", verdict)
        self.db.append(j.DecisionMade(cycle=self.cycle, decision=decision))
        self.db.append(j.StageFinished(cycle=self.cycle, stage="gate", run=self.run("gate"), result={}))

    def wait_for_decision(self) -> None:
        self.stage("promote")
        self.db.append(j.CycleWaits(cycle=self.cycle, what="decision"))

    def end(self, answer: Literal["promote", "keep"] = "promote") -> None:
        name = f"python-{self.number:04d}"
        self.db.append(j.DecisionAnswered(cycle=self.cycle, answer=answer, by="user", override=False))
        if answer == "promote":
            model = ModelRef(name=name, folder=str(self.root / name), sha256="c" * 64)
            self.db.append(
                j.GeneratorRegistered(domain=self.domain, name=name, model=model, parent="base", cycle=self.cycle)
            )
            self.db.append(j.GeneratorActivated(domain=self.domain, name=name, reason="promotion", by="user"))
        self.stage("promote", {"answer": answer, "by": "user"})
        report = self.root / ".jupiter" / "runs" / self.run("report") / "report.md"
        self.stage("report")
        report.write_text(f"# Cycle {self.number} of python\n\nThe candidate {name} was measured on 90 windows.\n")
        self.db.append(
            j.StageFinished(cycle=self.cycle, stage="report", run=self.run("report"), result={"report": str(report)})
        )
        outcome: Literal["promoted", "kept"] = "promoted" if answer == "promote" else "kept"
        self.db.append(j.CycleFinished(cycle=self.cycle, outcome=outcome, report=str(report)))

    def whole(self, answer: Literal["promote", "keep"] = "promote") -> None:
        self.begin()
        for part in (self.prepare, self.collect, self.generate, self.filter):
            part()
        self.stage("review", {"accepted": 8, "rejected": 4, "reviewed": 3})
        self.train()
        self.measure()
        self.end(answer)


def train_log(steps: int) -> str:
    lines = [f"step={i} loss={loss_at(i):.4f} lr=1.0e-04" for i in range(1, steps + 1)]
    lines.insert(3, f"hostile {ESCAPES} end")
    lines.insert(5, "WARNING: the tokenizer has no chat template")
    return "\n".join(lines) + "\n"


def loss_at(step: int) -> float:
    return 2.3 + 0.8 * math.exp(-step / 20) + 0.05 * math.sin(step * 1.7)


def write_metrics(folder: Path, steps: int) -> None:
    metrics = [
        Metric(
            step=i,
            tokens=2048 * i,
            loss=loss_at(i),
            learning_rate=1e-4,
            grad_norm=0.8,
            tokens_per_s=370.0 + i % 7,
            seconds=5.4,
            at=time.time(),
            rank_seconds=(5.4,),
        )
        for i in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_bytes(b"".join(msgspec.json.encode(m) + b"\n" for m in metrics))


def decision_of(candidate: str, verdict: Literal["promote", "worse", "inconclusive"]) -> Decision:
    def endpoint(
        name: str, role: Literal["primary", "guard", "report"], effect: float, *, passed: bool | None
    ) -> Endpoint:
        return Endpoint(
            name=name,
            role=role,
            unit="bits per byte" if "bpb" in name else "accuracy",
            candidate=0.785,
            incumbent=0.785 + effect,
            effect=effect,
            low=effect - 0.02,
            high=effect + 0.02,
            threshold=0.0 if role == "primary" else -0.05,
            alpha=0.025,
            p_value=0.001,
            test="paired cluster bootstrap",
            units=90,
            clusters=41,
            mde=0.012,
            passed=passed,
            sentence=f"{name} was measured on 90 units.",
        )

    good = verdict == "promote"
    return Decision(
        verdict=verdict,
        candidate=candidate,
        candidate_sha256="c" * 64,
        incumbent="base",
        incumbent_sha256="b" * 64,
        look=1,
        slice=0,
        alpha=0.025,
        alpha_total=0.05,
        endpoints=(
            endpoint("vault_bpb", "primary", 0.178 if good else -0.05, passed=good),
            endpoint("mcq_known", "guard", 0.01, passed=True),
            endpoint("yield", "guard", -0.2, passed=None),
            endpoint("mcq_vault", "report", 0.0, passed=None),
        ),
        examples=(
            Example(
                task="mcq_known",
                question="What does assert do?",
                right="B",
                candidate="B",
                incumbent="C",
                winner="candidate",
            ),
            Example(
                task="mcq_vault",
                question="What does yield return?",
                right="A",
                candidate="D",
                incumbent="A",
                winner="incumbent",
            ),
        ),
        sentences=("The candidate compresses held-out text better.", "Every guard that could be decided holds."),
        seed=1,
        versions={"jupiter": "0"},
        items_sha256="1" * 64,
        scores_sha256="2" * 64,
    )


def record(root: Path, until: Until, *, verdict: Literal["promote", "worse", "inconclusive"] = "promote") -> Path:
    """A workspace with one finished cycle (unless `empty`) and a second one up to `until`."""
    recorder = Recorder(root)
    if until != "empty":
        recorder.whole()
    if until not in ("empty", "finished"):
        recorder.begin()
        for part in (recorder.prepare, recorder.collect, recorder.generate, recorder.filter):
            part()
        if until == "review":
            recorder.wait_for_review()
        else:
            recorder.stage("review", {"accepted": 8, "rejected": 4, "reviewed": 12})
            recorder.train(steps=40 if until in ("train", "failed") else 60, done=until == "decision")
        if until == "failed":
            failure = j.StageFailed(
                cycle=recorder.cycle,
                stage="train",
                run=recorder.run("train"),
                kind="Diverged",
                title="Training diverged",
                detail="the loss is not finite at step 41",
                fix="lower training.optimizer.learning_rate",
            )
            recorder.db.append(failure)
        if until == "decision":
            recorder.measure(verdict)
            recorder.wait_for_decision()
        recorder.db.append(j.Noted(cycle=recorder.cycle, stage="train", level="warning", text=f"a note {ESCAPES}"))
    recorder.db.close()
    return root
