"""The collect stage: documents, split, chunks and items of a domain; unchanged sources are not read again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from jupiter_engine.data import items, knowledge, split
from jupiter_engine.data.chunks import Piece, cut
from jupiter_engine.data.collectors import sources
from jupiter_engine.data.collectors.document import RawDocument
from jupiter_engine.errors import StateError
from jupiter_engine.files import read_json, sha256_text, write_json
from jupiter_engine.protocol.orders import CollectOrder
from jupiter_engine.protocol.rows import Chunk, Document, Item, Row
from jupiter_engine.worker.context import RunContext, read_rows

_BATCH = 2_000
_RECORD = "collection.json"


class Collection(msgspec.Struct, frozen=True, kw_only=True):
    """What a collection gave; kept in its run folder for the next one (and returned as the stage's result)."""

    documents: int
    chunks: int
    items: int
    bytes: int
    train_bytes: int
    vault_bytes: int
    clusters: int
    reused: bool
    fingerprint: str
    chunks_path: str
    items_path: str
    documents_path: str


def run(context: RunContext, order: CollectOrder) -> None:
    """Collect, split, cut and make items; or point to the previous collection if its fingerprint still holds."""
    settings = {
        "chunk": msgspec.to_builtins(order.chunk),
        "vault_share": order.evaluation.vault_share,
        "slices": order.evaluation.slices,
        "keywords": list(order.keywords),
        "negative_keywords": list(order.negative_keywords),
        "seed": order.seed,
    }
    fingerprint = sources.fingerprint(order.sources, settings)
    previous = _previous(order)
    if previous is not None and previous.fingerprint == fingerprint:
        context.note("the sources have not changed: the last collection is used again")
        collection = msgspec.structs.replace(previous, reused=True)
    else:
        _claim(context.folder, fingerprint)
        collection = _collect(context, order, fingerprint, previous)
    write_json(context.folder / _RECORD, collection)
    context.finish(msgspec.to_builtins(collection))


def _previous(order: CollectOrder) -> Collection | None:
    if order.previous is None or not (Path(order.previous) / _RECORD).exists():
        return None
    found = read_json(Path(order.previous) / _RECORD, Collection)
    assert isinstance(found, Collection)
    paths = (found.chunks_path, found.items_path, found.documents_path)
    return found if all(Path(path).exists() for path in paths) else None


def _claim(folder: Path, fingerprint: str) -> None:
    """Tie the run folder to the state of the sources: rows of two states must not mix in it.

    As long as it holds no row (the sources were empty, say) it follows them.
    """
    path = folder / "fingerprint"
    rows = any(file.stat().st_size for file in (folder / "results").glob("*.jsonl"))
    if rows and path.exists() and path.read_text("utf-8") != fingerprint:
        raise StateError(
            f"the sources changed while {folder.name} was interrupted",
            fix=f"remove {folder} and run the same command again",
        )
    path.write_text(fingerprint, "utf-8")


def _collect(context: RunContext, order: CollectOrder, fingerprint: str, previous: Collection | None) -> Collection:
    documents, reports = sources.collect(
        order.sources,
        keywords=order.keywords,
        negative_keywords=order.negative_keywords,
        seed=order.seed,
        on_source=lambda done, total, name: context.progress(done, total, "sources", f"reading {name}"),
    )
    for report in reports:
        context.note(report.sentence())
    context.check_halt()
    context.progress(0, len(documents), "documents", "comparing documents")
    places = split.split(
        documents,
        vault_share=order.evaluation.vault_share,
        slices=order.evaluation.slices,
        seed=order.seed,
        previous=_places(previous),
        facts=[_facts(document) for document in documents],
    )
    context.check_halt()
    made: list[items.Source] = []
    for number, (document, place) in enumerate(zip(documents, places, strict=True), 1):
        row = _document(document, place)
        chunks = [_chunk(row, n, piece) for n, piece in enumerate(cut(document.text, document.kind, order.chunk))]
        made.append(items.Source(row, document.text, chunks))
        context.progress(number, len(documents), "documents", "cutting chunks")
    context.check_halt()
    context.progress(0, 1, "items", "making items")
    found, report_items = items.make(made, seed=order.seed)
    context.progress(1, 1, "items", f"{len(found)} items from {report_items.drafts} drafts")
    _store(context, made, found)
    return _summary(context, made, found, fingerprint)


def _places(previous: Collection | None) -> dict[str, split.Place]:
    if previous is None:
        return {}
    rows = read_rows(Path(previous.documents_path), Document)
    return {row.uri: split.Place(row.cluster, row.split, row.slice) for row in rows}


def _facts(document: RawDocument) -> int:
    """How many callables a document describes: an even spread of them gives every slice about as many items."""
    return len(knowledge.callables(document.text, document.kind, document.title)) if document.kind == "docs" else 0


def _document(raw: RawDocument, place: split.Place) -> Document:
    return Document(
        id=sha256_text(f"{raw.source}\0{raw.uri}\0{raw.sha256}")[:16],
        source=raw.source,
        uri=raw.uri,
        title=raw.title,
        kind=raw.kind,
        license=raw.license,
        bytes=raw.size_bytes,
        sha256=raw.sha256,
        cluster=place.cluster,
        split=place.split,
        slice=place.slice,
    )


def _chunk(document: Document, ordinal: int, piece: Piece) -> Chunk:
    return Chunk(
        id=sha256_text(f"{document.id}\0{ordinal}\0{piece.text}")[:16],
        document=document.id,
        ordinal=ordinal,
        title=subject(document.title, piece.heading),
        kind=document.kind,
        split=document.split,
        slice=document.slice,
        cluster=document.cluster,
        text=piece.text,
    )


def subject(title: str, heading: str) -> str:
    """What a chunk is about in a few words: `textwrap.shorten`, `textwrap: Wrapping`, or the document's title."""
    plain = heading.removeprefix("class ").partition("(")[0].strip().strip("`*").rstrip(":")
    if not plain or plain == title:
        return title
    if plain.startswith(f"{title}."):
        return plain
    return f"{title}.{plain}" if plain.isidentifier() and title.replace(".", "").isidentifier() else f"{title}: {plain}"


def _store(context: RunContext, made: Sequence[items.Source], found: Sequence[Item]) -> None:
    """Append what an earlier attempt of this run has not yet written."""
    _append(context, Document, [source.document for source in made])
    _append(context, Chunk, [chunk for source in made for chunk in source.chunks])
    _append(context, Item, found)


def _append(context: RunContext, kind: type[Row], rows: Sequence[Row]) -> None:
    written = {row.id for row in context.existing(kind)}
    missing = [row for row in rows if row.id not in written]
    for batch in _batches(missing):
        context.records(batch)
        context.check_halt()
    if not rows:
        context.results(f"{kind.__name__.lower()}s").touch()  # readers find an empty table rather than none


def _batches(rows: Sequence[Row]) -> Iterator[Sequence[Row]]:
    for first in range(0, len(rows), _BATCH):
        yield rows[first : first + _BATCH]


def _summary(context: RunContext, made: Sequence[items.Source], found: Sequence[Item], fingerprint: str) -> Collection:
    train = sum(source.document.bytes for source in made if source.document.split == "train")
    total = sum(source.document.bytes for source in made)
    return Collection(
        documents=len(made),
        chunks=sum(len(source.chunks) for source in made),
        items=len(found),
        bytes=total,
        train_bytes=train,
        vault_bytes=total - train,
        clusters=len({source.document.cluster for source in made}),
        reused=False,
        fingerprint=fingerprint,
        chunks_path=str(context.results("chunks")),
        items_path=str(context.results("items")),
        documents_path=str(context.results("documents")),
    )
