"""The queue stage: train chunks and accepted samples become one immutable snapshot of training rows."""

from __future__ import annotations

from pathlib import Path

from jupiter_engine.data.queue import pack
from jupiter_engine.data.queue.snapshot import MANIFEST, read_snapshot, write_snapshot
from jupiter_engine.files import sha256_file
from jupiter_engine.protocol.orders import QueueOrder
from jupiter_engine.protocol.rows import Chunk, Document, Sample
from jupiter_engine.training.model.text import TextCodec
from jupiter_engine.worker.context import RunContext, read_rows


def run(context: RunContext, order: QueueOrder) -> None:
    """Write the snapshot, or verify the one that an interrupted attempt finished (its manifest is written last)."""
    target = Path(order.target)
    if not (target / MANIFEST).exists():
        _write(context, order, target)
    snapshot = read_snapshot(target)
    manifest = snapshot.manifest
    repeated = {name: passes for name, passes in manifest.epochs.items() if passes > 1.0}
    if repeated:
        told = ", ".join(f"{name} {passes:.1f} times" for name, passes in repeated.items())
        context.note(f"fewer distinct tokens than wanted: {told}", "warning" if max(repeated.values()) > 4 else "info")
    context.finish(
        {
            "snapshot": str(target),
            "sha256": snapshot.sha256,
            "sequences": manifest.sequences,
            "tokens": manifest.tokens,
            "distinct_tokens": manifest.distinct_tokens,
            "mix": manifest.mix,
            "epochs": manifest.epochs,
            "sample_ids": manifest.sample_ids,
        }
    )


def _write(context: RunContext, order: QueueOrder, target: Path) -> None:
    context.progress(0, order.sequences, "sequences", "reading chunks")
    codec = TextCodec(Path(order.tokenizer))
    train = [chunk for chunk in read_rows(Path(order.chunks), Chunk) if chunk.split == "train"]
    samples = _accepted(order)
    units = pack.real_units(
        train,
        codec,
        weights={source.id: source.weight for source in order.sources},
        document_source=_document_sources(Path(order.chunks)),
        seed=order.seed,
    )
    units["synthetic"] = pack.synthetic_units(samples, codec, seed=order.seed)
    context.check_halt()
    packed = pack.pack(
        units,
        order.mix,
        sequences=order.sequences,
        sequence_tokens=order.sequence_tokens,
        end_id=codec.eos_ids[0],
    )
    context.progress(order.sequences, order.sequences, "sequences", "writing")
    write_snapshot(
        target,
        packed.tokens,
        packed.loss_mask,
        packed.segments,
        describe={
            "tokenizer_sha256": sha256_file(Path(order.tokenizer) / "tokenizer.json"),
            "vocab_size": codec.vocab_size,
            "distinct_tokens": packed.distinct_tokens,
            "mix": packed.mix,
            "epochs": packed.epochs,
            "sample_ids": packed.sample_ids,
            "seed": order.seed,
        },
    )


def _accepted(order: QueueOrder) -> list[Sample]:
    path = Path(order.accepted)
    return read_rows(path, Sample) if path.exists() else []


def _document_sources(chunks_path: Path) -> dict[str, str]:
    """Document id -> source id, from the documents table that lies beside the chunks ({} if it does not)."""
    path = chunks_path.with_name("documents.jsonl")
    return {row.id: row.source for row in read_rows(path, Document)} if path.exists() else {}
