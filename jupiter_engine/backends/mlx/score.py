"""Log-probabilities of given tokens, in MLX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from jupiter_engine.backends.contract import Dtype, ScoreRequest, check_score_requests
from jupiter_engine.backends.mlx import blas
from jupiter_engine.backends.mlx.model import Llama, load_model
from jupiter_engine.backends.planning import SCORE_ROWS, ScoreBatch, score_batches


class MlxScorer:
    """Implements backends.contract.Scorer."""

    def __init__(self, model: Llama) -> None:
        self._model = model

    def logprobs(
        self,
        requests: Sequence[ScoreRequest],
        *,
        batch_tokens: int = 4096,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[float]]:
        info = self._model.info
        check_score_requests(requests, vocab_size=info.vocab_size, context=info.context)
        results: list[list[float]] = [[] for _ in requests]
        batches = score_batches(requests, batch_tokens=batch_tokens)
        done = len(requests) - sum(len(batch.owners) for batch in batches)
        for batch in batches:
            values = self._score(batch)
            start = 0
            for index, count in batch.owners:
                results[index] = values[start : start + count]
                start += count
            done += len(batch.owners)
            if progress is not None:
                progress(done, len(requests))
        return results

    def _score(self, batch: ScoreBatch) -> list[float]:
        """Natural-log probabilities in the order of batch.sources."""
        tokens = mx.array(batch.tokens)
        mask = batch.mask()
        if mask is None:
            hidden = self._model.hidden(tokens)
        else:
            hidden = self._model.hidden_at(tokens, mx.array(batch.positions), mx.array(mask))
        wanted = hidden.reshape(-1, hidden.shape[-1])[mx.array(batch.sources)]
        values: list[float] = []
        for start in range(0, len(batch.sources), SCORE_ROWS):
            logits = self._model.logits(wanted[start : start + SCORE_ROWS]).astype(mx.float32)
            targets = mx.array(batch.targets[start : start + SCORE_ROWS])
            part = -nn.losses.cross_entropy(logits, targets, reduction="none")
            mx.eval(part)
            values += np.array(part).tolist()
        return values


def load_scorer(folder: Path, *, dtype: Dtype = "bfloat16", threads: int = 0) -> MlxScorer:
    """Load a model folder for scoring; `threads` limits the BLAS on a CPU (0: its own choice), Metal ignores it."""
    blas.limit_threads(threads)
    return MlxScorer(load_model(folder, dtype))
