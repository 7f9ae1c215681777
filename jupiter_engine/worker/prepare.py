"""Stage `prepare`: make the base generator's model folder, once per workspace."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from jupiter_engine.checkpoints.model_folder import (
    ModelInfo,
    copy_text_files,
    folder_sha256,
    publish,
    verify,
    weight_files,
)
from jupiter_engine.errors import ModelInvalid, NotEnoughData
from jupiter_engine.files import require_free
from jupiter_engine.protocol.orders import PrepareOrder
from jupiter_engine.protocol.shapes import PRESETS
from jupiter_engine.training.model.convert import SMOLLM2_NAME, convert_gguf, smollm2_gguf
from jupiter_engine.training.model.presets import write_scratch
from jupiter_engine.training.model.tokenizer import publish_tokenizer, train_tokenizer
from jupiter_engine.worker.context import RunContext

NANO_SEED = 0


def run(context: RunContext, order: PrepareOrder) -> None:
    """Make `order.target` unless a whole model lies there already; finish with its reference and sizes."""
    target = Path(order.target)
    began = time.monotonic()
    info = _whole(target)
    if info is not None:
        context.note(f"the base model is already there: {target}")
    else:
        context.check_halt()
        if order.kind == "smollm2":
            info = _smollm2(context, target)
        elif order.kind == "folder":
            info = _copy(context, order, target)
        else:
            info = make_nano(target, seed=NANO_SEED)
    context.finish(
        {
            "model": {"name": target.name, "folder": str(target), "sha256": folder_sha256(target)},
            "parameters": info.parameters,
            "vocab_size": info.vocab_size,
            "seconds": round(time.monotonic() - began, 3),
        }
    )


def _whole(target: Path) -> ModelInfo | None:
    """What lies at `target`, or None if there is nothing or a damaged folder (which is then made anew)."""
    try:
        return verify(target)
    except ModelInvalid:
        return None


def _smollm2(context: RunContext, target: Path) -> ModelInfo:
    source = smollm2_gguf()
    context.note(f"converting {SMOLLM2_NAME} from {source.name}")
    return convert_gguf(
        source, target, progress=lambda done, total, name: context.progress(done, total, "tensors", name)
    )


def _copy(context: RunContext, order: PrepareOrder, target: Path) -> ModelInfo:
    if order.source is None:
        raise ModelInvalid("no model folder was named", fix="set the base model's `source` to a model folder")
    source = Path(order.source).expanduser()
    info = verify(source)
    files = [source / "config.json", *weight_files(source)]
    files += [path for name in _EXTRA if (path := source / name).exists()]
    require_free(target.absolute().parents[0], sum(path.stat().st_size for path in files), f"a copy of {source}")
    with publish(target) as folder:
        for done, path in enumerate(files, 1):
            shutil.copyfile(path, folder / path.name)
            context.progress(done, len(files), "files", path.name)
        copy_text_files(source, folder)
    return info


_EXTRA = ("generation_config.json", "model.safetensors.index.json")


def make_nano(target: Path, *, seed: int) -> ModelInfo:
    """Publish a tiny model: a tokenizer trained on the interpreter's language reference, random weights.

    It knows nothing; it makes every path of the program testable in seconds. The same
    interpreter and seed give the same bytes.
    """
    from pydoc_data import topics

    texts = [topics.topics[name] for name in sorted(topics.topics)]
    if not texts:
        raise NotEnoughData(
            "this Python was built without its language reference",
            fix="use python.org's or a distribution's full Python",
        )
    shape = PRESETS["nano"].shape
    tokenizer = train_tokenizer(texts, vocab_size=shape.vocab_size)
    source = target.with_name(f"{target.name}-tokenizer")
    publish_tokenizer(source, tokenizer, context=shape.context)
    try:
        return write_scratch(target, preset="nano", tokenizer=source, seed=seed, dtype="bfloat16")
    finally:
        shutil.rmtree(source)
