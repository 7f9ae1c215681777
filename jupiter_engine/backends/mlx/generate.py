"""Batched text generation in MLX against a preallocated key/value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from jupiter_engine.backends.batching import decode_all, stream_one
from jupiter_engine.backends.contract import (
    Completion,
    Dtype,
    GenerateRequest,
    GenerateStats,
    check_generate_requests,
)
from jupiter_engine.backends.mlx import blas
from jupiter_engine.backends.mlx.model import Llama, load_model

_SPAN = 64
"""Cached positions are read in multiples of this many, so that few different kernels' shapes occur."""


class MlxGenerator:
    """Implements backends.contract.Generator. Only one `generate` may be under way at a time."""

    def __init__(self, model: Llama) -> None:
        self._model = model
        self._engine = _Engine(model)
        self.stats = GenerateStats()

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        *,
        temperature: float,
        top_p: float,
        batch_size: int,
        stop_ids: Sequence[int],
    ) -> Iterator[Completion]:
        info = self._model.info
        check_generate_requests(requests, vocab_size=info.vocab_size, context=info.context)
        return decode_all(
            self._engine,
            requests,
            self.stats,
            context=info.context,
            temperature=temperature,
            top_p=top_p,
            batch_size=batch_size,
            stop_ids=stop_ids,
        )

    def stream(
        self, request: GenerateRequest, *, temperature: float, top_p: float, stop_ids: Sequence[int]
    ) -> Iterator[int]:
        info = self._model.info
        check_generate_requests([request], vocab_size=info.vocab_size, context=info.context)
        return stream_one(
            self._engine, request, context=info.context, temperature=temperature, top_p=top_p, stop_ids=stop_ids
        )


class _Engine:
    """Implements backends.batching.DecodingEngine."""

    def __init__(self, model: Llama) -> None:
        self._model = model
        self._keys: list[mx.array] = []
        self._values: list[mx.array] = []
        self._capacity = 0

    def open(self, rows: int, capacity: int) -> None:
        info = self._model.info
        dtype = self._model.model.embed_tokens.weight.dtype
        self._capacity = capacity
        size = (rows, info.kv_heads, capacity, info.head_dim)
        self._keys = [mx.zeros(size, dtype=dtype) for _ in range(info.layers)]
        self._values = [mx.zeros(size, dtype=dtype) for _ in range(info.layers)]

    def close(self) -> None:
        self._keys, self._values = [], []
        mx.clear_cache()

    def move(self, source: int, target: int) -> None:
        for tensor in (*self._keys, *self._values):
            tensor[target] = tensor[source]

    def prefill(self, place: int, prompt: list[int]) -> mx.array:
        model, length = self._model, len(prompt)
        x = model.model.embed_tokens(mx.array([prompt]))
        for number, layer in enumerate(model.model.layers):
            q, k, v = layer.self_attn.project(layer.input_layernorm(x), model.periods, 0)
            self._keys[number][place, :, :length] = k[0]
            self._values[number][place, :, :length] = v[0]
            x = x + layer.self_attn.attend(q, k, v, "causal")
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self._finish(x[:, -1])

    def step(self, tokens: list[int], positions: list[int]) -> mx.array:
        model, count = self._model, len(tokens)
        places, at = mx.arange(count), mx.array(positions)
        span = min(-(-(max(positions) + 1) // _SPAN) * _SPAN, self._capacity)
        seen = (mx.arange(span) <= at[:, None])[:, None, None]
        x = model.model.embed_tokens(mx.array(tokens)[:, None])
        for number, layer in enumerate(model.model.layers):
            q, k, v = layer.self_attn.project(layer.input_layernorm(x), model.periods, at)
            keys, values = self._keys[number], self._values[number]
            keys[places, :, at] = k[:, :, 0]
            values[places, :, at] = v[:, :, 0]
            x = x + layer.self_attn.attend(q, keys[:count, :, :span], values[:count, :, :span], seen)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self._finish(x[:, 0])

    def _finish(self, x: mx.array) -> mx.array:
        """Logits, computed now together with the cache: else its graph would grow with every token."""
        logits = self._model.logits(self._model.model.norm(x)).astype(mx.float32)
        mx.eval(logits, self._keys, self._values)
        return logits

    def choose(self, logits: mx.array, draws: list[float], temperature: float, top_p: float) -> list[int]:
        tokens = mx.argmax(logits, axis=-1) if temperature == 0 else sample(logits, draws, temperature, top_p)
        return [int(token) for token in np.array(tokens)]


def sample(logits: mx.array, draws: Sequence[float], temperature: float, top_p: float) -> mx.array:
    """One token a row by inverting the cumulative distribution at draws[row] in [0, 1).

    logits float32 [B, V]; only the smallest set of most probable tokens whose
    probabilities (after temperature) reach `top_p` can be chosen. Returns int [B].
    """
    at = mx.array(list(draws), dtype=mx.float32)[:, None]
    probabilities = mx.softmax(logits / temperature, axis=-1)
    if top_p >= 1.0:
        cumulative = mx.cumsum(probabilities, axis=-1)
        return mx.minimum((cumulative <= at * cumulative[:, -1:]).sum(axis=-1), logits.shape[-1] - 1)
    ids = mx.argsort(-probabilities, axis=-1)
    top = mx.take_along_axis(probabilities, ids, axis=-1)
    kept = top * (mx.cumsum(top, axis=-1) - top < top_p)
    cumulative = mx.cumsum(kept, axis=-1)
    place = (cumulative <= at * cumulative[:, -1:]).sum(axis=-1)
    place = mx.minimum(place, (kept > 0).sum(axis=-1) - 1)
    return mx.take_along_axis(ids, place[:, None], axis=-1)[:, 0]


def load_generator(folder: Path, *, dtype: Dtype = "bfloat16", threads: int = 0) -> MlxGenerator:
    """Load a model folder for generation; `threads` limits the BLAS on a CPU (0: its own choice), Metal ignores it."""
    blas.limit_threads(threads)
    return MlxGenerator(load_model(folder, dtype))
