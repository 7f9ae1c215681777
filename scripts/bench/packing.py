"""How full training rows of chat samples get, against what trainers commonly do, on the same samples in the same run.

    .venv/bin/python scripts/bench/packing.py [--rows 256,512,1024,2048] [--samples 4000]

The samples are questions about the interpreter's own standard library, answered by its docstrings, read with a
tokenizer trained on them: real lengths of real text. Contestants:

    jupiter        data.queue.pack: best-fit decreasing over a window, whole samples
    trl bfd        the packer of trl.pack_dataset(strategy="bfd"), where trl is installed (pip install trl)
    in order       whole samples one after the other, a new row where the next one does not fit
    concat, split  one long text cut every ROW tokens: no padding, but samples are torn

useful: share of input positions that hold a sample's token; torn: samples that do not stand whole in one row.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import jupiter_engine
from jupiter_engine.data.queue import pack
from jupiter_engine.protocol.specs import MixSpec
from jupiter_engine.training.model.text import TextCodec
from jupiter_engine.training.model.tokenizer import publish_tokenizer, train_tokenizer

ONLY_SAMPLES = MixSpec(real_docs=0.0, real_code=0.0, synthetic=1.0, real_floor=0.0)
QUIET = {"antigravity", "this", "idlelib", "turtledemo", "lib2to3", "test", "tkinter", "turtle", "__main__"}


def docstrings() -> list[tuple[str, str]]:
    """(dotted name, docstring) of the standard library's public modules, classes and functions."""
    found: dict[str, str] = {}
    for module_info in pkgutil.iter_modules([str(Path(inspect.__file__).parent)]):
        name = module_info.name
        if name.startswith("_") or name in QUIET:
            continue
        try:
            module = __import__(name)
        except ImportError:
            continue  # belongs to another platform
        for key, value in [(name, module), *((f"{name}.{key}", value) for key, value in vars(module).items())]:
            text = (
                inspect.getdoc(value) if inspect.isroutine(value) or inspect.isclass(value) or value is module else None
            )
            if text and not key.rpartition(".")[2].startswith("_"):
                found.setdefault(text, key)
    return [(key, text) for text, key in found.items()]


def samples(limit: int) -> list[pack.Unit]:
    rows = docstrings()
    random.Random(0).shuffle(rows)
    with TemporaryDirectory() as folder:
        publish_tokenizer(
            Path(folder) / "t", train_tokenizer((text for _, text in rows), vocab_size=8192), context=4096
        )
        codec = TextCodec(Path(folder) / "t")
        units = []
        for name, text in rows[:limit]:
            ids, mask = codec.chat_example(
                [{"role": "user", "content": f"What is {name}?"}, {"role": "assistant", "content": text}]
            )
            units.append(pack.Unit(name, ids, mask))
    return units


Result = tuple[int, int, int, int]
"""(rows, tokens of samples in them, samples torn, samples that are in no row)"""


def jupiter(units: Sequence[pack.Unit], width: int) -> Result:
    rows = sum(min(len(unit.ids), width) for unit in units) // width
    sources: list[Callable[[], pack.Unit]] = [lambda unit=unit: unit for unit in units]  # type: ignore[misc]
    packed = pack.pack({"synthetic": sources}, ONLY_SAMPLES, sequences=rows, sequence_tokens=width - 1, end_id=0)
    # Padding is told of input positions; the last column is none.
    return rows, rows * (width - 1) - packed.padding_tokens, packed.cut_samples, len(units) - packed.sample_ids


def in_order(units: Sequence[pack.Unit], width: int) -> Result:
    rows, room, used = 0, 0, 0
    for unit in units:
        length = min(len(unit.ids), width)
        if length > room:
            rows, room = rows + 1, width
        room -= length
        used += length
    return rows, used, sum(len(unit.ids) > width for unit in units), 0


def concat_and_split(units: Sequence[pack.Unit], width: int) -> Result:
    total = sum(len(unit.ids) for unit in units)
    rows, at, torn = total // width, 0, 0
    for unit in units:
        torn += at // width != (at + len(unit.ids) - 1) // width
        at += len(unit.ids)
    return rows, rows * width, torn, 0


def trl_bfd(units: Sequence[pack.Unit], width: int) -> Result:
    pyarrow, trl = importlib.import_module("pyarrow"), importlib.import_module("trl.data_utils")
    # What pack_dataset calls, without the data set's hashing and caching.
    packed = trl._pack_bfd(pyarrow.table({"input_ids": [unit.ids for unit in units]}), width)["input_ids"]
    used = sum(len(row) for row in packed)
    return len(packed), used, sum(len(unit.ids) > width for unit in units), 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="256,512,1024,2048", help="tokens of a row, several with commas")
    parser.add_argument("--samples", type=int, default=4000)
    options = parser.parse_args()
    units = samples(options.samples)
    lengths = sorted(len(unit.ids) for unit in units)
    print(
        f"jupiter {jupiter_engine.__version__}; {len(units)} samples, {sum(lengths)} tokens; lengths: median "
        f"{lengths[len(lengths) // 2]}, 90 % {lengths[len(lengths) * 9 // 10]}, longest {lengths[-1]}"
    )
    contestants: dict[str, Callable[[Sequence[pack.Unit], int], Result]] = {"jupiter": jupiter}
    if importlib.util.find_spec("trl") is not None:
        importlib.import_module("trl.data_utils")  # before any timing
        contestants["trl bfd"] = trl_bfd
        print(f"trl {importlib.metadata.version('trl')}")
    else:
        print("trl is not installed and left out: pip install trl")
    contestants |= {"in order": in_order, "concat, split": concat_and_split}
    print(f"{'row':>6}  {'packer':<14} {'rows':>6} {'useful':>9} {'torn':>6} {'left out':>9} {'seconds':>8}")
    for width in (int(text) for text in options.rows.split(",")):
        for name, packer in contestants.items():
            began = time.perf_counter()
            rows, used, torn, left = packer(units, width)
            seconds = time.perf_counter() - began
            # jupiter's rows count input positions (a column less).
            positions = rows * (width - 1 if name == "jupiter" else width)
            print(f"{width:>6}  {name:<14} {rows:>6} {used / positions:>9.3%} {torn:>6} {left:>9} {seconds:>8.2f}")


if __name__ == "__main__":
    main()
