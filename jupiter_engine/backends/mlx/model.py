"""The Llama model in MLX, with the Hugging Face parameter names.

`Llama.hidden` serves training and scoring; generation calls the layers with
its own cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from jupiter_engine.backends.contract import Dtype
from jupiter_engine.backends.mlx.rotary import rotary_periods, rotate
from jupiter_engine.checkpoints.model_folder import ModelInfo, verify, weight_files

DTYPES: dict[str, mx.Dtype] = {"float32": mx.float32, "bfloat16": mx.bfloat16}


def attention_mask(segments: mx.array) -> mx.array:
    """bool [B, 1, T, T]: which keys may be seen, those before within one's own document.

    segments int [B, T]; a document is a run of equal numbers.
    """
    numbers = segments.astype(mx.int32)
    begins = mx.concatenate(
        [mx.zeros_like(numbers[:, :1]), (numbers[:, 1:] != numbers[:, :-1]).astype(mx.int32)], axis=1
    )
    runs = mx.cumsum(begins, axis=1)
    steps = mx.arange(segments.shape[1])
    return ((runs[:, :, None] == runs[:, None, :]) & (steps[:, None] >= steps[None, :]))[:, None]


class Attention(nn.Module):
    def __init__(self, info: ModelInfo) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = info.heads, info.kv_heads, info.head_dim
        self.scale = info.attention_scale
        q, kv = info.heads * info.head_dim, info.kv_heads * info.head_dim
        self.q_proj = nn.Linear(info.hidden_size, q, bias=False)
        self.k_proj = nn.Linear(info.hidden_size, kv, bias=False)
        self.v_proj = nn.Linear(info.hidden_size, kv, bias=False)
        self.o_proj = nn.Linear(q, info.hidden_size, bias=False)

    def project(
        self, x: mx.array, periods: mx.array | None, offset: int | mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        """x [B, T, D] -> rotated queries [B, heads, T, hd], rotated keys and values [B, kv_heads, T, hd].

        Positions count from `offset` (int, or int [B]); with `periods` None nothing is rotated.
        """
        batch, length, _ = x.shape
        q = self.q_proj(x).reshape(batch, length, self.heads, self.head_dim).transpose(0, 2, 1, 3)
        k = self.k_proj(x).reshape(batch, length, self.kv_heads, self.head_dim).transpose(0, 2, 1, 3)
        v = self.v_proj(x).reshape(batch, length, self.kv_heads, self.head_dim).transpose(0, 2, 1, 3)
        if periods is None:
            return q, k, v

        def rope(y: mx.array) -> mx.array:
            return mx.fast.rope(y, self.head_dim, traditional=False, base=None, scale=1.0, offset=offset, freqs=periods)

        return rope(q), rope(k), v

    def attend(self, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | str | None) -> mx.array:
        """Attention and output projection; a boolean mask is True where a key may be seen."""
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale, mask=mask)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], -1))

    def __call__(self, x: mx.array, periods: mx.array, mask: mx.array | str | None) -> mx.array:
        return self.attend(*self.project(x, periods, 0), mask)


class MLP(nn.Module):
    def __init__(self, info: ModelInfo) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(info.hidden_size, info.intermediate_size, bias=False)
        self.up_proj = nn.Linear(info.hidden_size, info.intermediate_size, bias=False)
        self.down_proj = nn.Linear(info.intermediate_size, info.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, info: ModelInfo) -> None:
        super().__init__()
        self.self_attn = Attention(info)
        self.mlp = MLP(info)
        self.input_layernorm = nn.RMSNorm(info.hidden_size, info.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(info.hidden_size, info.rms_norm_eps)

    def __call__(self, x: mx.array, periods: mx.array, mask: mx.array | str | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), periods, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, info: ModelInfo) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(info.vocab_size, info.hidden_size)
        self.layers = [Layer(info) for _ in range(info.layers)]
        self.norm = nn.RMSNorm(info.hidden_size, info.rms_norm_eps)


class Llama(nn.Module):
    """A Llama model; parameter names equal those of transformers and of the torch twin.

    A tied model has no `lm_head` parameter: the embedding is the output projection.
    """

    def __init__(self, info: ModelInfo) -> None:
        super().__init__()
        # Leading underscores keep both out of the module's parameters (and so out of optimizers and files).
        self._info = info
        self._periods = rotary_periods(info, info.rope_scaling)
        self.model = Decoder(info)
        if not info.tied:
            self.lm_head = nn.Linear(info.hidden_size, info.vocab_size, bias=False)

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def periods(self) -> mx.array:
        return self._periods

    def hidden(self, tokens: mx.array, segments: mx.array | None = None) -> mx.array:
        """Final-norm hidden states.

        tokens int [B, T]; segments int [B, T] or None (one document a row).
        With segments no position attends outside its own document (documents
        are runs of equal numbers). Positions need no restart there: rotary
        attention depends on the distance of two positions only, and every
        distance that is seen lies inside one document.
        Returns [B, T, D] in the weights' precision.
        """
        mask: mx.array | str = "causal"
        if segments is not None:
            mask = attention_mask(segments)
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x, self._periods, mask)
        return self.model.norm(x)

    def hidden_at(self, tokens: mx.array, positions: mx.array, mask: mx.array) -> mx.array:
        """`hidden` with positions int [B, T] and a mask bool [B, 1, T, T] (True = may see) of one's own."""
        angles = positions[:, None, :, None].astype(mx.float32) / self._periods
        cos, sin = mx.cos(angles), mx.sin(angles)
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            q, k, v = layer.self_attn.project(layer.input_layernorm(x), None, 0)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            x = x + layer.self_attn.attend(q, k, v, mask)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.model.norm(x)

    def logits(self, hidden: mx.array) -> mx.array:
        """hidden [..., D] -> logits [..., V] in the hidden states' precision."""
        if self._info.tied:
            return self.model.embed_tokens.as_linear(hidden)
        return self.lm_head(hidden)

    def __call__(self, tokens: mx.array, segments: mx.array | None = None) -> mx.array:
        return self.logits(self.hidden(tokens, segments))


def load_model(folder: Path, dtype: Dtype = "bfloat16") -> Llama:
    """Verify a model folder and load it in the wanted precision (ModelInvalid when it is damaged)."""
    info = verify(folder)
    model = Llama(info)
    tensors: dict[str, mx.array] = {}
    for path in weight_files(folder):
        loaded: Any = mx.load(str(path))
        tensors.update(loaded)
    wanted = [name for name, _ in tree_flatten(model.parameters())]
    model.load_weights([(name, tensors[name].astype(DTYPES[dtype])) for name in wanted], strict=True)
    mx.eval(model.parameters())
    return model


def save_weights(weights: Iterable[tuple[str, mx.array]], folder: Path, dtype: Dtype) -> None:
    """Write model.safetensors into an existing folder, weights rounded to `dtype`.

    Config and tokenizer are the caller's (see checkpoints.model_folder).
    """
    rounded = {name: value.astype(DTYPES[dtype]) for name, value in weights}
    mx.save_safetensors(str(folder / "model.safetensors"), rounded, metadata={"format": "pt"})


def save_model(model: Any, folder: Path, dtype: Dtype = "bfloat16") -> None:
    """`save_weights` of a model's parameters."""
    save_weights(tree_flatten(model.parameters()), folder, dtype)
