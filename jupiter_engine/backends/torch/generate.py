"""Batched text generation in torch against a preallocated key/value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from jupiter_engine.backends.batching import decode_all, stream_one
from jupiter_engine.backends.contract import (
    Completion,
    Dtype,
    GenerateRequest,
    GenerateStats,
    check_generate_requests,
)
from jupiter_engine.backends.torch.model import Llama, default_device, inference, load_model
from jupiter_engine.backends.torch.rotary import rotate

_SPAN = 64
"""Cached positions are read in multiples of this many."""
_TOP = 128
"""Tokens looked at first when the most probable ones are sought; more only where these do not reach top_p."""


class TorchGenerator:
    """Implements backends.contract.Generator. Only one `generate` may be under way at a time."""

    def __init__(self, model: Llama) -> None:
        self._model = model.eval()
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
    """Implements backends.batching.DecodingEngine.

    On a CPU the cache is float32 even for a bfloat16 model: one query against many keys is bound by
    conversion there (measured on two AVX-512 cores, 16 rows of 384 keys: 1.05 ms a layer, 1.65 ms in bfloat16).
    """

    def __init__(self, model: Llama) -> None:
        self._model = model
        self._fused = [_Fused(layer) for layer in model.model.layers]
        weight = model.output_weight
        self._device = weight.device
        self._dtype = torch.float32 if weight.device.type == "cpu" else weight.dtype
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._capacity = 0

    def open(self, rows: int, capacity: int) -> None:
        info = self._model.info
        self._capacity = capacity
        size = (rows, info.kv_heads, capacity, info.head_dim)
        self._keys = [torch.zeros(size, dtype=self._dtype, device=self._device) for _ in range(info.layers)]
        self._values = [torch.zeros(size, dtype=self._dtype, device=self._device) for _ in range(info.layers)]

    def close(self) -> None:
        self._keys, self._values = [], []

    @inference
    def move(self, source: int, target: int) -> None:
        for tensor in (*self._keys, *self._values):
            tensor[target] = tensor[source]

    @inference
    def prefill(self, place: int, prompt: list[int]) -> Tensor:
        model, length = self._model, len(prompt)
        x = model.model.embed_tokens(torch.tensor([prompt], device=self._device))
        cos, sin = model.rotary(torch.arange(length, device=self._device), x.dtype)
        last = len(self._fused) - 1
        for number, (layer, fused) in enumerate(zip(model.model.layers, self._fused, strict=True)):
            q, k, v = fused.project(layer.input_layernorm(x), cos[None, None], sin[None, None])
            self._keys[number][place, :, :length] = k[0]
            self._values[number][place, :, :length] = v[0]
            if number == last:
                # Of the last layer only the last position is wanted; it may see everything before.
                x, q = x[:, -1:], q[:, :, -1:]
            out = functional.scaled_dot_product_attention(
                q, k, v, is_causal=number != last, enable_gqa=q.shape[1] != k.shape[1]
            )
            x = fused.finish(layer, x, out)
        return model.logits(model.model.norm(x[:, -1])).float()

    @inference
    def step(self, tokens: list[int], positions: list[int]) -> Tensor:
        model, count = self._model, len(tokens)
        places = torch.arange(count, device=self._device)
        at = torch.tensor(positions, device=self._device)
        x = model.model.embed_tokens(torch.tensor(tokens, device=self._device)[:, None])
        cos, sin = model.rotary(at, x.dtype)
        cos, sin = cos[:, None, None], sin[:, None, None]
        span = min(-(-(max(positions) + 1) // _SPAN) * _SPAN, self._capacity)
        bias = torch.zeros(count, 1, 1, span, dtype=self._dtype, device=self._device)
        unseen = torch.arange(span, device=self._device) > at[:, None]
        bias.masked_fill_(unseen[:, None, None], float("-inf"))
        for number, (layer, fused) in enumerate(zip(model.model.layers, self._fused, strict=True)):
            q, k, v = fused.project(layer.input_layernorm(x), cos, sin)
            keys, values = self._keys[number], self._values[number]
            keys[places, :, at] = k[:, :, 0].to(self._dtype)
            values[places, :, at] = v[:, :, 0].to(self._dtype)
            # The queries that share a key/value head become rows of one product: nothing is repeated in memory.
            grouped = q.to(self._dtype).view(count, k.shape[1], -1, q.shape[-1])
            out = functional.scaled_dot_product_attention(
                grouped, keys[:count, :, :span], values[:count, :, :span], attn_mask=bias
            )
            x = fused.finish(layer, x, out.to(x.dtype).reshape(count, q.shape[1], 1, -1))
        return model.logits(model.model.norm(x[:, 0])).float()

    @inference
    def choose(self, logits: Tensor, draws: list[float], temperature: float, top_p: float) -> list[int]:
        tokens = logits.argmax(dim=-1) if temperature == 0 else sample(logits, draws, temperature, top_p)
        chosen: list[int] = tokens.tolist()
        return chosen


def sample(logits: Tensor, draws: Sequence[float], temperature: float, top_p: float) -> Tensor:
    """One token a row by inverting the cumulative distribution at draws[row] in [0, 1).

    logits float32 [B, V]; only the smallest set of most probable tokens whose
    probabilities (after temperature) reach `top_p` can be chosen. Returns int64 [B].
    """
    at = torch.tensor(draws, device=logits.device, dtype=torch.float32)[:, None]
    probabilities = torch.softmax(logits / temperature, dim=-1)
    vocabulary = logits.shape[-1]
    if top_p >= 1.0:
        cumulative = probabilities.cumsum(dim=-1)
        return (cumulative <= at * cumulative[:, -1:]).sum(dim=-1).clamp(max=vocabulary - 1)
    count = min(_TOP, vocabulary)
    top, ids = probabilities.topk(count, dim=-1)
    while count < vocabulary and bool((top.sum(dim=-1) < top_p).any()):
        count = min(count * 16, vocabulary)
        top, ids = probabilities.topk(count, dim=-1)
    kept = top * (top.cumsum(dim=-1) - top < top_p)
    cumulative = kept.cumsum(dim=-1)
    place = (cumulative <= at * cumulative[:, -1:]).sum(dim=-1)
    place = torch.minimum(place, (kept > 0).sum(dim=-1) - 1)
    return ids.gather(1, place[:, None])[:, 0]


class _Fused:
    """A layer's q, k, v and gate, up projections as one matrix product each: fewer, larger operations.

    The model's own parameters become views of the joined matrices, so no memory is used twice.
    """

    def __init__(self, layer: nn.Module) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = _join(attention.q_proj, attention.k_proj, attention.v_proj)
        self.gate_up = _join(mlp.gate_proj, mlp.up_proj)
        self.heads, self.kv_heads, self.head_dim = attention.heads, attention.kv_heads, attention.head_dim

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] -> rotated queries [B, heads, T, hd], rotated keys and values [B, kv_heads, T, hd]."""
        batch, length, _ = x.shape
        joined = functional.linear(x, self.qkv).view(batch, length, -1, self.head_dim).transpose(1, 2)
        both = self.heads + self.kv_heads
        rotated = rotate(joined[:, :both], cos, sin)
        return rotated[:, : self.heads], rotated[:, self.heads :], joined[:, both:]

    def finish(self, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """The rest of the layer after attention: x [B, T, D], out [B, heads, T, hd]."""
        x = x + layer.self_attn.o_proj(out.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))
        gate, up = functional.linear(layer.post_attention_layernorm(x), self.gate_up).chunk(2, dim=-1)
        return x + layer.mlp.down_proj(functional.silu(gate) * up)


def _join(*projections: nn.Module) -> Tensor:
    joined = torch.cat([projection.weight.detach() for projection in projections])
    parts = joined.split([projection.weight.shape[0] for projection in projections])
    for projection, part in zip(projections, parts, strict=True):
        projection.weight = nn.Parameter(part, requires_grad=False)
    return joined


def load_generator(folder: Path, *, dtype: Dtype = "bfloat16", threads: int = 0) -> TorchGenerator:
    """Load a model folder for generation on the GPU where there is one, else on `threads` CPU threads (0: all)."""
    if threads:
        torch.set_num_threads(threads)
    return TorchGenerator(load_model(folder, dtype, default_device()))
