"""Stage gate: read the paired scores, decide, report the decision with its evidence."""

from __future__ import annotations

from pathlib import Path

import msgspec

from jupiter_engine.files import write_json
from jupiter_engine.protocol.orders import GateOrder
from jupiter_engine.protocol.rows import Item, Score
from jupiter_engine.training.evaluation.gate import decide
from jupiter_engine.worker.context import RunContext, read_rows


def run(context: RunContext, order: GateOrder) -> None:
    """Decide on `order.scores`; nothing is kept between attempts, because deciding again gives the same bytes."""
    context.progress(0, 1, "decision")
    decision = decide(
        order.gate,
        order.candidate,
        order.incumbent,
        read_rows(Path(order.scores), Score),
        read_rows(Path(order.items), Item),
        order.look,
        order.slice,
        order.seed,
    )
    write_json(context.folder / "results" / "decision.json", decision)
    for sentence in decision.sentences:
        context.note(sentence)
    context.progress(1, 1, "decision", decision.verdict)
    context.finish({"decision": msgspec.to_builtins(decision)})
