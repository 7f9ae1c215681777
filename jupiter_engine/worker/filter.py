"""The filter stage: a verdict for each sample, with a counted reason for each rejection."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from jupiter_engine.data.filters.chain import FilterChain
from jupiter_engine.protocol.orders import FilterOrder
from jupiter_engine.protocol.rows import Chunk, Item, Sample, Verdict
from jupiter_engine.worker.context import RunContext, read_rows

_BATCH = 200


def run(context: RunContext, order: FilterOrder) -> None:
    """Judge all samples in their order; an interrupted run repeats the judging and writes only what is missing.

    Judging again gives the same verdicts (the chain has no randomness), and later
    verdicts depend on earlier samples, so the chain is always fed from the first.
    """
    chunks = read_rows(Path(order.chunks), Chunk)
    samples = read_rows(Path(order.samples), Sample)
    items = read_rows(Path(order.items), Item)
    earlier = [sample for path in order.earlier_samples for sample in read_rows(Path(path), Sample)]
    texts = {chunk.id: chunk.text for chunk in chunks}
    chain = FilterChain(order.filter, [c.text for c in chunks if c.split == "vault"], items, earlier)
    written = {verdict.id for verdict in context.existing(Verdict)}
    counts: Counter[str] = Counter()
    pending: list[Verdict] = []
    for number, sample in enumerate(samples, 1):
        verdict = chain.judge(sample, texts.get(sample.chunk, ""))
        counts[verdict.reason] += 1
        if verdict.id not in written:
            pending.append(verdict)
        if len(pending) >= _BATCH:
            context.records(pending)
            pending = []
            context.check_halt()
        context.progress(number, len(samples), "samples")
    context.records(pending)
    accepted = counts.pop("ok", 0)
    context.finish(
        {
            "accepted": accepted,
            "rejected": dict(counts.most_common()),
            "verdicts_path": str(context.results("verdicts")),
        }
    )
