"""A worker played in memory: it writes the facts and rows that a real one would, with settable outcomes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec

from jupiter_engine.files import ProcessIdentity, write_json
from jupiter_engine.protocol import facts
from jupiter_engine.protocol.decision import Decision, Endpoint
from jupiter_engine.protocol.orders import AnyOrder, GateOrder, GenerateOrder, ModelRef, TrainOrder
from jupiter_engine.protocol.orders import decoder as order_decoder
from jupiter_engine.protocol.rows import Chunk, Document, Row, Sample, Verdict

SAMPLES = 6


def document() -> Document:
    return Document(
        id="d1",
        source="stdlib",
        uri="stdlib:topic/assert",
        title="assert",
        kind="docs",
        license="PSF-2.0",
        bytes=11,
        sha256="0" * 64,
        cluster="c1",
        split="train",
        slice=-1,
    )


def chunk() -> Chunk:
    return Chunk(
        id="k1",
        document="d1",
        ordinal=0,
        title="assert",
        kind="docs",
        split="train",
        slice=-1,
        cluster="c1",
        text="assert text",
    )


def sample(order: GenerateOrder, number: int) -> Sample:
    return Sample(
        id=f"s{order.cycle:02d}{number:02d}",
        template="qa" if number % 2 else "rephrase",
        type="qa",
        prompt=f"What does assert do ({number})?",
        response="It checks.",
        chunk="k1",
        document="d1",
        generator=order.generator.name,
        generator_sha256=order.generator.sha256,
        request_sha256=f"{order.cycle}-{number}",
        seed=number,
        prompt_tokens=10,
        new_tokens=5,
        finish="stop",
        cycle=order.cycle,
    )


def decision(order: GateOrder, verdict: str) -> Decision:
    passed = verdict == "promote"
    endpoint = Endpoint(
        name="vault_bpb",
        role="primary",
        unit="bits per byte",
        candidate=0.8,
        incumbent=0.9,
        effect=0.1,
        low=0.05,
        high=0.15,
        threshold=0.0,
        alpha=0.03,
        p_value=0.001,
        test="document bootstrap",
        units=90,
        clusters=41,
        mde=0.01,
        passed=passed,
        sentence="played",
    )
    return Decision(
        verdict=verdict,  # type: ignore[arg-type]
        candidate=order.candidate.name,
        candidate_sha256=order.candidate.sha256,
        incumbent=order.incumbent.name,
        incumbent_sha256=order.incumbent.sha256,
        look=order.look,
        slice=order.slice,
        alpha=0.03,
        alpha_total=0.05,
        endpoints=(endpoint,),
        examples=(),
        sentences=("played",),
        seed=0,
        versions={},
        items_sha256="",
        scores_sha256="",
    )


class ScriptedWorker:
    """Callable as a ScriptedRemote's script. Settings say how the next workers behave."""

    def __init__(self) -> None:
        self.verdict = "promote"
        self.fail_stage: str | None = None
        self.die_stages: list[str] = []
        """Each entry: the next worker of that stage dies without a word."""
        self.hold_stage: str | None = None
        """This stage starts and stays at work until `release` or a halt."""
        self.orders: list[AnyOrder] = []
        self.finished: list[str] = []
        self._held: Path | None = None

    def __call__(self, folder: Path) -> bool:
        order = order_decoder.decode((folder / "spec.json").read_bytes())
        stage = str(type(order).__struct_config__.tag)
        self.orders.append(order)
        (folder / "results").mkdir(exist_ok=True)
        identity = ProcessIdentity(pid=(1 << 30) + len(self.orders) - 1, started_at=1.0)
        write_json(folder / "state.json", {"worker": identity, "attempt": 1})
        self._fact(folder, facts.Started, attempt=1, pid=identity.pid, host="scripted", versions={})
        if stage in self.die_stages:
            self.die_stages.remove(stage)
            return False
        if stage == self.hold_stage:
            self._held = folder
            return True
        if stage == self.fail_stage:
            self._fact(folder, facts.Failed, kind="CorpusEmpty", title="The corpus is empty", detail="none", fix="add")
            return False
        self._finish(folder, order)
        return False

    def release(self) -> None:
        """The held worker finishes."""
        assert self._held is not None
        self._finish(self._held, order_decoder.decode((self._held / "spec.json").read_bytes()))
        self._held, self.hold_stage = None, None

    def halt(self) -> None:
        """The held worker stops at a safe point."""
        assert self._held is not None
        self._fact(self._held, facts.Halted)
        self._held, self.hold_stage = None, None

    @staticmethod
    def _fact(folder: Path, fact: type[facts.Fact], /, **fields: Any) -> None:
        path = folder / "events.jsonl"
        seq = 1 + (path.read_bytes().count(b"\n") if path.exists() else 0)
        with path.open("ab") as file:
            file.write(msgspec.json.encode(fact(seq=seq, at=time.time(), **fields)) + b"\n")

    def _rows(self, folder: Path, table: str, rows: list[Row]) -> None:
        path = folder / "results" / f"{table}.jsonl"
        offset = path.stat().st_size if path.exists() else 0
        data = b"".join(msgspec.json.encode(row) + b"\n" for row in rows)
        with path.open("ab") as file:
            file.write(data)
        self._fact(folder, facts.Records, table=table, offset_bytes=offset, length_bytes=len(data), count=len(rows))

    def _finish(self, folder: Path, order: AnyOrder) -> None:
        stage = str(type(order).__struct_config__.tag)
        self.finished.append(folder.name)
        results = folder / "results"
        result: dict[str, Any] = {}
        match stage:
            case "prepare":
                model = ModelRef(name="smollm2-135m-instruct", folder="/base", sha256="b" * 64)
                result = {"model": model, "parameters": 135, "vocab_size": 49152}
            case "collect":
                self._rows(folder, "documents", [document()])
                self._rows(folder, "chunks", [chunk()])
                result = {"documents": 1, "chunks": 1, "items": 0, "bytes": 11, "vault_bytes": 0, "reused": False}
                result |= {f"{t}_path": str(results / f"{t}.jsonl") for t in ("documents", "chunks", "items")}
            case "generate":
                assert isinstance(order, GenerateOrder)
                for number in range(0, SAMPLES, 3):
                    self._rows(folder, "samples", [sample(order, number + i) for i in range(3)])
                    self._fact(
                        folder,
                        facts.Progress,
                        done=number + 3,
                        total=SAMPLES,
                        unit="samples",
                        rate_per_s=1.0,
                        eta_s=1.0,
                    )
                result = {"samples": SAMPLES, "new_tokens": 30, "tokens_per_s": 9.0, "reused": 0}
                result["samples_path"] = str(results / "samples.jsonl")
            case "filter":
                verdicts: list[Row] = [
                    Verdict(
                        id=f"s{order.cycle:02d}{number:02d}",
                        accepted=number != 0,
                        reason="ok" if number else "too_short",
                        scores={"words": 2.0},
                    )
                    for number in range(SAMPLES)
                ]
                self._rows(folder, "verdicts", verdicts)
                result = {"accepted": SAMPLES - 1, "rejected": {"too_short": 1}}
            case "queue":
                result = {"snapshot": "/snapshot", "sequences": 2, "tokens": 512, "mix": {"real_docs": 1.0}}
            case "train":
                assert isinstance(order, TrainOrder)
                name = Path(order.target).name
                model = ModelRef(name=name, folder=order.target, sha256=name.rjust(64, "0"))
                result = {"model": model, "steps": 2, "tokens": 512, "first_loss": 3.0, "last_loss": 2.0}
                result["tokens_per_s"] = 400.0
            case "evaluate":
                result = {"scores_path": str(results / "scores.jsonl"), "units": {"vault_bpb": 90}, "cached": 0}
            case "gate":
                assert isinstance(order, GateOrder)
                result = {"decision": decision(order, self.verdict)}
        self._fact(folder, facts.Finished, result=msgspec.to_builtins(result))
