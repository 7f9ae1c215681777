"""Twin backends, mlx and torch: the same file names, the same contract, chosen by name when needed."""

from __future__ import annotations

import importlib
from pathlib import Path

from jupiter_engine.backends.contract import Dtype, Generator, Scorer
from jupiter_engine.protocol.specs import Twin


def load_generator(twin: Twin, folder: Path, *, dtype: Dtype = "bfloat16", threads: int = 0) -> Generator:
    """Load a model folder for generation; `threads` 0 leaves the choice to the framework."""
    module = importlib.import_module(f"jupiter_engine.backends.{twin}.generate")
    generator: Generator = module.load_generator(folder, dtype=dtype, threads=threads)
    return generator


def load_scorer(twin: Twin, folder: Path, *, dtype: Dtype = "bfloat16", threads: int = 0) -> Scorer:
    """Load a model folder for scoring; `threads` 0 leaves the choice to the framework."""
    module = importlib.import_module(f"jupiter_engine.backends.{twin}.score")
    scorer: Scorer = module.load_scorer(folder, dtype=dtype, threads=threads)
    return scorer
