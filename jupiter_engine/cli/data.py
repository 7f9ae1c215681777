"""samples, why."""

from __future__ import annotations

import argparse
from typing import Literal

from jupiter_engine.api import Workspace
from jupiter_engine.cli.output import open_workspace, print_json, print_table
from jupiter_engine.errors import ExitCode, UsageError
from jupiter_engine.protocol.commands import FinishReview, Review
from jupiter_engine.units import plain_text

ID_SHOWN = 12


def samples(options: argparse.Namespace) -> int:
    workspace = open_workspace(options)
    verdicts: list[tuple[Literal["accept", "reject", "undecided"], str]] = [
        *(("accept", sample) for sample in options.accept or ()),
        *(("reject", sample) for sample in options.reject or ()),
        *(("undecided", sample) for sample in options.undo or ()),
    ]
    if verdicts:
        for verdict, sample in verdicts:
            workspace.perform(Review(sample=sample, verdict=verdict, reason=options.reason))
        if options.json:
            print_json([{"sample": sample, "verdict": verdict} for verdict, sample in verdicts])
        else:
            print("\n".join(f"{sample}: {verdict}" for verdict, sample in verdicts))
        return ExitCode.DONE
    if options.finish_review:
        workspace.perform(FinishReview(cycle=options.finish_review))
        if options.json:
            print_json({"cycle": options.finish_review, "review": "finished"})
        else:
            print(f"review of {options.finish_review} is finished")
        return ExitCode.DONE
    return _list(workspace, options)


def _list(workspace: Workspace, options: argparse.Namespace) -> int:
    domain, number = options.domain, None
    if options.cycle:
        cycle = workspace.state.cycles.get(options.cycle)
        if cycle is None:
            known = ", ".join(list(workspace.state.cycles)[-5:]) or "none yet"
            raise UsageError(f"there is no cycle {options.cycle!r}", fix=f"known cycles: {known}")
        domain, number = cycle.domain, cycle.number
    found = workspace.samples(
        domain=domain,
        cycle=number,
        status=options.status,
        search=options.search,
        limit=options.limit,
        offset=options.offset,
    )
    if options.json:
        print_json(found)
        return ExitCode.DONE
    if options.full:
        for v in found:
            print(f"-- {v.sample.id}  {v.status}  {v.sample.template}  {v.reason or '-'}")
            print(plain_text(f"{v.sample.prompt}\n\n{v.sample.response}\n"))
        return ExitCode.DONE
    rows = [
        (v.sample.id[:ID_SHOWN], v.status, v.sample.template, v.review_reason or v.reason or "-", v.sample.prompt[:60])
        for v in found
    ]
    print_table(("id", "status", "template", "reason", "prompt"), rows)
    total = workspace.count_samples(domain=domain, cycle=number, status=options.status, search=options.search)
    if total > len(found):
        print(f"{len(found)} of {total}; --offset {options.offset + len(found)} shows the next")
    return ExitCode.DONE


def why(options: argparse.Namespace) -> int:
    lineage = open_workspace(options).why(options.id)
    if options.json:
        print_json(lineage)
        return ExitCode.DONE
    print(f"{lineage.what} {lineage.id} (domain {lineage.domain})")
    for sentence in lineage.sentences:
        print(f"  {plain_text(sentence)}")
    if lineage.sample is not None:
        print(
            plain_text(f"\n--- prompt\n{lineage.sample.sample.prompt}\n--- response\n{lineage.sample.sample.response}")
        )
    if lineage.item is not None:
        options_text = "\n".join(
            f"{'*' if i == lineage.item.answer else ' '} {text}" for i, text in enumerate(lineage.item.options)
        )
        print(plain_text(f"\n--- question\n{lineage.item.question}\n{options_text}"))
    if lineage.chunk is not None:
        print(plain_text(f"\n--- chunk {lineage.chunk.id}\n{lineage.chunk.text}"))
    return ExitCode.DONE
