"""Log-probabilities of given tokens, in torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from jupiter_engine.backends.contract import Dtype, ScoreRequest, check_score_requests
from jupiter_engine.backends.planning import SCORE_ROWS, ScoreBatch, score_batches
from jupiter_engine.backends.torch.model import Llama, default_device, inference, load_model


class TorchScorer:
    """Implements backends.contract.Scorer."""

    def __init__(self, model: Llama) -> None:
        self._model = model.eval()

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
            values = self._score(batch).tolist()
            start = 0
            for index, count in batch.owners:
                results[index] = values[start : start + count]
                start += count
            done += len(batch.owners)
            if progress is not None:
                progress(done, len(requests))
        return results

    @inference
    def _score(self, batch: ScoreBatch) -> Tensor:
        """float32 [N] on the CPU, in the order of batch.sources."""
        device = self._model.output_weight.device
        tokens = torch.from_numpy(batch.tokens).to(device)
        mask = batch.mask()
        if mask is None:
            hidden = self._model.hidden(tokens)
        else:
            positions = torch.from_numpy(batch.positions).to(device)
            hidden = self._model.hidden_at(tokens, positions, torch.from_numpy(mask).to(device))
        wanted = hidden.flatten(0, 1)[torch.from_numpy(batch.sources).to(device)]
        targets = torch.from_numpy(batch.targets).to(device)
        parts = [
            -functional.cross_entropy(self._model.logits(rows).float(), wants, reduction="none")
            for rows, wants in zip(wanted.split(SCORE_ROWS), targets.split(SCORE_ROWS), strict=True)
        ]
        return torch.cat(parts).cpu()


def load_scorer(folder: Path, *, dtype: Dtype = "bfloat16", threads: int = 0) -> TorchScorer:
    """Load a model folder for scoring on the GPU where there is one, else on `threads` CPU threads (0: all)."""
    if threads:
        torch.set_num_threads(threads)
    return TorchScorer(load_model(folder, dtype, default_device()))
