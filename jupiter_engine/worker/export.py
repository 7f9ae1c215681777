"""`python -m jupiter_engine.worker.export --model FOLDER --target DIR`: a verified copy for other programs.

The copy is a plain Hugging Face folder that transformers, mlx-lm, vLLM and llama.cpp's converter open. stdout gets
one JSON object: {"target", "sha256", "bytes", "parameters", "files"} or {"error": {...}}.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from jupiter_engine.checkpoints.model_folder import (
    ModelInfo,
    copy_text_files,
    folder_sha256,
    publish,
    verify,
    weight_files,
    write_config,
)
from jupiter_engine.errors import JupiterError, StageFailed, UsageError
from jupiter_engine.files import require_free, write_atomic
from jupiter_engine.units import count_text


class Card(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Facts about the model for its README.md; what is not known is left out of it."""

    name: str = ""
    license: str = ""
    """SPDX identifier."""
    base_model: str = ""
    language: str = "en"
    domain: str = ""
    summary: str = ""
    facts: dict[str, str] = {}
    """Further lines of the card's table, e.g. {"Training tokens": "1.2M"}."""
    sources: tuple[str, ...] = ()
    """What it was trained on, one line each, with the licence."""
    decision: tuple[str, ...] = ()
    """Why it was promoted: the gate's sentences."""


def export_model(model: Path, target: Path, card: Card) -> dict[str, Any]:
    """Copy a verified model folder to `target` (absent or empty), with a model card; returns what was written.

    The weights are copied byte for byte and compared by hash before `target` appears.
    """
    info = verify(model)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} is not empty", fix="name a folder that does not exist yet")
    files = weight_files(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    require_free(target.parent, sum(path.stat().st_size for path in files), f"the exported model {target.name}")
    with publish(target) as folder:
        for path in files:
            shutil.copyfile(path, folder / path.name)
        index = model / "model.safetensors.index.json"
        if index.exists():
            shutil.copyfile(index, folder / index.name)
        copy_text_files(model, folder)
        write_config(folder, info)
        if verify(folder) != info:
            raise StageFailed(
                f"the copy in {folder} does not read like {model}", fix="check the disk, then export again"
            )
        write_atomic(folder / "README.md", model_card(card, info, target.name).encode())
        names = sorted(path.name for path in folder.iterdir())
        size = sum(path.stat().st_size for path in folder.iterdir())
    return {
        "target": str(target),
        "sha256": folder_sha256(target),
        "bytes": size,
        "parameters": info.parameters,
        "files": names,
    }


def model_card(card: Card, info: ModelInfo, folder_name: str) -> str:
    """README.md with the front matter that model hubs read."""
    front: dict[str, str] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front |= {
        key: value
        for key, value in (("license", card.license), ("language", card.language), ("base_model", card.base_model))
        if value
    }
    rows = {
        "Architecture": f"Llama, {info.layers} layers, width {info.hidden_size}, "
        f"{info.heads} heads ({info.kv_heads} for keys and values)",
        "Parameters": count_text(info.parameters),
        "Vocabulary": str(info.vocab_size),
        "Context": f"{info.context} tokens",
        "Precision": info.dtype,
        "Domain": card.domain,
        **card.facts,
    }
    # JSON strings are YAML strings: nothing in a name can break the front matter.
    lines = ["---", *(f"{key}: {msgspec.json.encode(value).decode()}" for key, value in front.items()), "---", ""]
    lines += [f"# {card.name or folder_name}", ""]
    lines += [card.summary or "A language model trained with Jupiter.", ""]
    lines += ["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in rows.items() if value), ""]
    if card.sources:
        lines += ["## Trained on", "", *(f"- {line}" for line in card.sources), ""]
    if card.decision:
        lines += ["## Why it was promoted", "", *(f"- {line}" for line in card.decision), ""]
    lines += [
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({folder_name!r})",
        f"model = AutoModelForCausalLM.from_pretrained({folder_name!r})",
        "```",
        "",
        f"On a Mac: `mlx_lm.chat --model {folder_name}`",
        "",
    ]
    return "\n".join(lines)


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")


def read_card(path: Path | None) -> Card:
    if path is None:
        return Card()
    try:
        return msgspec.json.decode(path.read_bytes(), type=Card)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no model card: {error}", fix="give a JSON file with the card's facts") from error


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m jupiter_engine.worker.export", description=__doc__)
    parser.add_argument("--model", required=True, type=Path, help="model folder")
    parser.add_argument("--target", required=True, type=Path, help="folder to make")
    parser.add_argument("--card", type=Path, help="JSON file with facts for README.md")
    chosen = parser.parse_args(argv)
    try:
        result = export_model(chosen.model, chosen.target, read_card(chosen.card))
    except JupiterError as error:
        failed = {"error": {"kind": error.kind, "title": error.title, "detail": error.detail, "fix": error.fix}}
        sys.stdout.buffer.write(msgspec.json.encode(failed) + b"\n")
        return error.exit_code
    sys.stdout.buffer.write(msgspec.json.encode(result) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
