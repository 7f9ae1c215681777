"""The queue stage: train chunks and accepted samples become one immutable snapshot of training rows.

Before that, where the recipe asks for it, the tokenizer of a from-scratch model is trained on the train documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jupiter_engine.data.queue import pack
from jupiter_engine.data.queue.snapshot import MANIFEST, read_snapshot, write_snapshot
from jupiter_engine.errors import NotEnoughData, StateError
from jupiter_engine.files import sha256_file
from jupiter_engine.protocol.orders import QueueOrder
from jupiter_engine.protocol.rows import Chunk, Document, Sample
from jupiter_engine.protocol.specs import MixSpec
from jupiter_engine.training.model.text import TextCodec
from jupiter_engine.training.model.tokenizer import publish_tokenizer, train_tokenizer
from jupiter_engine.worker.context import RunContext, read_rows


def run(context: RunContext, order: QueueOrder) -> None:
    """Write the snapshot, or verify the one that an interrupted attempt finished (its manifest is written last)."""
    target = Path(order.target)
    tokenizer = _tokenizer(context, order)
    if not (target / MANIFEST).exists():
        _write(context, order, target, tokenizer)
    snapshot = read_snapshot(target)
    manifest = snapshot.manifest
    if manifest.tokenizer_sha256 != sha256_file(tokenizer / "tokenizer.json"):
        raise StateError(
            f"{target} was encoded with another tokenizer than {tokenizer}/tokenizer.json",
            fix="remove the folder and run the queue stage again",
        )
    repeated = {name: passes for name, passes in manifest.epochs.items() if passes > 1.0}
    if repeated:
        told = ", ".join(f"{name} {passes:.1f} times" for name, passes in repeated.items())
        context.note(f"fewer distinct tokens than wanted: {told}", "warning" if max(repeated.values()) > 4 else "info")
    useful = 1 - manifest.padding_tokens / manifest.input_tokens
    if useful < 0.99:
        context.note(
            f"{1 - useful:.1%} of the rows is padding: the samples do not fill rows of {order.sequence_tokens} tokens. "
            "Longer training.sequence_tokens waste less",
            "warning",
        )
    if manifest.cut_samples:
        context.note(
            f"samples longer than {order.sequence_tokens} tokens were cut, {manifest.cut_samples} in all. "
            "Longer training.sequence_tokens keep them whole",
            "warning",
        )
    context.finish(
        {
            "snapshot": str(target),
            "tokenizer": str(tokenizer),
            "sha256": snapshot.sha256,
            "sequences": manifest.sequences,
            "tokens": manifest.tokens,
            "input_tokens": manifest.input_tokens,
            "padding_tokens": manifest.padding_tokens,
            "useful_share": round(useful, 5),
            "cut_samples": manifest.cut_samples,
            "held_out_sequences": manifest.held_out.sequences if manifest.held_out is not None else 0,
            "distinct_tokens": manifest.distinct_tokens,
            "mix": manifest.mix,
            "epochs": manifest.epochs,
            "sample_ids": manifest.sample_ids,
        }
    )


def _tokenizer(context: RunContext, order: QueueOrder) -> Path:
    """The folder of the tokenizer that encodes the snapshot; an own one is trained here, on train documents only.

    A folder that stands is whole (it was renamed into place), and the same documents would give the same bytes.
    """
    own = order.own_tokenizer
    if own is None:
        return Path(order.tokenizer)
    target = Path(own.target)
    if not target.exists():
        context.progress(0, order.sequences, "sequences", "training the tokenizer")
        train = [chunk for chunk in read_rows(Path(order.chunks), Chunk) if chunk.split == "train"]
        tokenizer = train_tokenizer(documents(train), vocab_size=own.vocabulary)
        publish_tokenizer(target, tokenizer, context=own.context)
        found = tokenizer.get_vocab_size()
        if found < own.vocabulary:
            context.note(f"the documents gave a vocabulary of {found} tokens, {own.vocabulary} were wanted", "warning")
    return target


def documents(chunks: Sequence[Chunk]) -> Iterator[str]:
    """The text of one document after the other, in order of their ids."""
    ordered = sorted(chunks, key=lambda chunk: (chunk.document, chunk.ordinal))
    for _, parts in itertools.groupby(ordered, key=lambda chunk: chunk.document):
        yield "".join(chunk.text for chunk in parts)


def _write(context: RunContext, order: QueueOrder, target: Path, tokenizer: Path) -> None:
    context.progress(0, order.sequences, "sequences", "reading chunks")
    codec = TextCodec(tokenizer)
    chunks = read_rows(Path(order.chunks), Chunk)
    context.check_halt()
    packed = _packed(order, codec, [chunk for chunk in chunks if chunk.split == "train"])
    held_out = None
    if order.held_out is not None:
        held_out = pack.held_out_rows(
            chunks,
            codec,
            slice_number=order.held_out.slice,
            sequences=order.held_out.sequences,
            sequence_tokens=order.sequence_tokens,
            seed=order.seed,
        )
    context.progress(order.sequences, order.sequences, "sequences", "writing")
    write_snapshot(
        target,
        packed,
        held_out=held_out,
        held_out_slice=order.held_out.slice if order.held_out is not None else 0,
        describe={
            "tokenizer_sha256": sha256_file(tokenizer / "tokenizer.json"),
            "vocab_size": codec.vocab_size,
            "padding_tokens": packed.padding_tokens,
            "cut_samples": packed.cut_samples,
            "distinct_tokens": packed.distinct_tokens,
            "mix": packed.mix,
            "epochs": packed.epochs,
            "sample_ids": packed.sample_ids,
            "seed": order.seed,
        },
    )


def _packed(order: QueueOrder, codec: TextCodec, train: list[Chunk]) -> pack.Packed:
    samples = _accepted(order)
    mix = order.mix
    units: dict[pack.Class, list[Callable[[], pack.Unit]]] = {}
    if order.method == "sft":
        if not samples:
            raise NotEnoughData(
                "there is no accepted sample to fine-tune on",
                fix="generate more, loosen the filters, or train with `method: continued`",
            )
        mix = MixSpec(real_docs=0.0, real_code=0.0, synthetic=1.0, real_floor=0.0)
    else:
        units = pack.real_units(
            train,
            codec,
            weights={source.id: source.weight for source in order.sources},
            document_source=_document_sources(Path(order.chunks)),
            seed=order.seed,
        )
    units["synthetic"] = pack.synthetic_units(samples, codec, seed=order.seed)
    return pack.pack(
        units,
        mix,
        sequences=order.sequences,
        sequence_tokens=order.sequence_tokens,
        end_id=codec.eos_ids[0],
    )


def _accepted(order: QueueOrder) -> list[Sample]:
    path = Path(order.accepted)
    return read_rows(path, Sample) if path.exists() else []


def _document_sources(chunks_path: Path) -> dict[str, str]:
    """Document id -> source id, from the documents table that lies beside the chunks ({} if it does not)."""
    path = chunks_path.with_name("documents.jsonl")
    return {row.id: row.source for row in read_rows(path, Document)} if path.exists() else {}
