"""Why is this here? Everything the workspace knows about a document, chunk, item or sample."""

from __future__ import annotations

import msgspec

from jupiter_engine.errors import UsageError
from jupiter_engine.orchestrator.database import Database, SampleView
from jupiter_engine.orchestrator.plan import run_name
from jupiter_engine.protocol.rows import Chunk, Document, Item
from jupiter_engine.protocol.state import State


class Lineage(msgspec.Struct, frozen=True, kw_only=True):
    """A row with its ancestors; absent parts are None."""

    id: str
    what: str
    """document | chunk | item | sample"""
    domain: str
    document: Document | None = None
    chunk: Chunk | None = None
    item: Item | None = None
    sample: SampleView | None = None
    trained_in: tuple[str, ...] = ()
    """Cycles whose snapshot was drawn from data that includes it."""
    sentences: tuple[str, ...] = ()


def trace(database: Database, state: State, prefix: str) -> Lineage:
    """The lineage of the row whose id starts with `prefix`; UsageError if none or several do."""
    sample = database.sample(prefix)
    if sample is not None:
        return _of_sample(database, state, sample)
    for table, what in (("items", "item"), ("chunks", "chunk"), ("documents", "document")):
        found = database.find(table, prefix)
        exact = [pair for pair in found if pair[1].id == prefix]
        if len(exact or found) > 1:
            ids = ", ".join(row.id[:16] for _, row in found[:5])
            raise UsageError(f"{prefix!r} fits several {what}s: {ids}", fix="give more characters of the id")
        if found:
            domain, row = (exact or found)[0]
            return _of_row(database, state, domain, what, row)
    raise UsageError(f"nothing here has an id that starts with {prefix!r}", fix="see `jupiter samples` for ids")


def _of_sample(database: Database, state: State, view: SampleView) -> Lineage:
    sample = view.sample
    document = database.row("documents", view.domain, sample.document)
    sentences = [
        f"Generated in cycle {sample.cycle} by {sample.generator} with template {sample.template} "
        f"(seed {sample.seed}, {sample.new_tokens} tokens, ended by {sample.finish}).",
        f"Grounded in chunk {sample.chunk}"
        + (f" of {document.uri} ({document.license})." if isinstance(document, Document) else "."),
    ]
    if view.filtered is None:
        sentences.append("The filters have not seen it yet.")
    else:
        sentences.append("The filters accepted it." if view.filtered else f"The filters rejected it: {view.reason}.")
    if view.review:
        sentences.append(
            f"{view.reviewer} {'accepted' if view.review == 'accept' else 'rejected'} it"
            + (f": {view.review_reason}." if view.review_reason else ".")
        )
    trained = tuple(
        cycle
        for cycle in _trained_in(state, view.domain, sample.cycle)
        if _was_accepted_for(database, cycle, sample.id)
    )
    sentences.append(
        f"It belongs to the data that cycles {', '.join(trained)} drew their training snapshot from."
        if trained
        else "No model has been trained on it."
    )
    return Lineage(
        id=sample.id,
        what="sample",
        domain=view.domain,
        document=document if isinstance(document, Document) else None,
        chunk=database.chunk(view.domain, sample.chunk),
        sample=view,
        trained_in=trained,
        sentences=tuple(sentences),
    )


def _of_row(database: Database, state: State, domain: str, what: str, row: object) -> Lineage:
    document: Document | None = None
    chunk: Chunk | None = None
    item: Item | None = None
    if isinstance(row, Item):
        item, chunk_id, document_id = row, row.chunk, row.document
        chunk = database.chunk(domain, chunk_id)
    elif isinstance(row, Chunk):
        chunk, document_id = row, row.document
    else:
        assert isinstance(row, Document)
        document, document_id = row, row.id
    if document is None:
        found = database.row("documents", domain, document_id)
        document = found if isinstance(found, Document) else None
    sentences: list[str] = []
    trained: tuple[str, ...] = ()
    if document is not None:
        sentences.append(f"From {document.uri} (source {document.source}, licence {document.license}).")
        if document.split == "vault":
            sentences.append(f"Its document is in the vault (slice {document.slice}): never trained upon.")
        else:
            sentences.append("Its document is in the train split.")
            trained = _trained_in(state, domain, 1)
    if item is not None:
        sentences.append(
            f"Multiple-choice item of the {item.pool} pool, made by {item.maker}; items are never trained upon."
        )
        trained = ()
    return Lineage(
        id=getattr(row, "id", ""),
        what=what,
        domain=domain,
        document=document,
        chunk=chunk,
        item=item,
        trained_in=trained,
        sentences=tuple(sentences),
    )


def _was_accepted_for(database: Database, cycle: str, sample_id: str) -> bool:
    """Whether the sample was among those that the cycle's snapshot was drawn from: verdicts may change afterwards."""
    path = database.path.parent / "runs" / run_name(cycle, "queue") / "accepted.jsonl"
    return path.exists() and f'"id":"{sample_id}"'.encode() in path.read_bytes()


def _trained_in(state: State, domain: str, since: int) -> tuple[str, ...]:
    return tuple(
        cycle.id
        for cycle in state.cycles.values()
        if cycle.domain == domain and cycle.number >= since and cycle.stages["train"].status == "done"
    )
