"""The Llama model in plain torch, with the Hugging Face parameter names.

`Llama.hidden` serves training and scoring; generation calls the layers with
its own key/value cache.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from jupiter_engine.backends.contract import Dtype
from jupiter_engine.backends.torch import attention
from jupiter_engine.backends.torch.head import head_loss
from jupiter_engine.backends.torch.rotary import rotary, rotary_frequencies, rotate
from jupiter_engine.checkpoints.model_folder import ModelInfo, verify, weight_files

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


Function = TypeVar("Function", bound=Callable[..., Any])


def inference(function: Function) -> Function:
    """Decorator: no gradients are recorded inside (torch.inference_mode, with its type kept)."""
    return cast("Function", torch.inference_mode()(function))


Sight: TypeAlias = attention.Blocks | Tensor | None
"""What a position may attend to: a mask [B, 1, T, T] (True = may see), blocks of queries, or None (causal)."""


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


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

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, D] -> rotated queries [B, heads, T, hd], rotated keys and values [B, kv_heads, T, hd]."""
        batch, length, _ = x.shape
        q = self.q_proj(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
        """q [B, heads, T, hd], k and v [B, kv_heads, T, hd] -> [B, T, heads * hd], before the output projection."""
        if isinstance(sight, attention.Blocks):
            out = attention.attend(q, k, v, sight, self.scale)
        else:
            if sight is not None and self.heads != self.kv_heads:
                # With a mask CUDA's memory-light kernels know no grouped heads: it would fall to the one that keeps
                # all scores of all heads.
                group = self.heads // self.kv_heads
                k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
            out = functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=sight,
                is_causal=sight is None,
                scale=self.scale,
                enable_gqa=k.shape[1] != q.shape[1],
            )
        return out.transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)


class MLP(nn.Module):
    def __init__(self, info: ModelInfo) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(info.hidden_size, info.intermediate_size, bias=False)
        self.up_proj = nn.Linear(info.hidden_size, info.intermediate_size, bias=False)
        self.down_proj = nn.Linear(info.intermediate_size, info.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, info: ModelInfo) -> None:
        super().__init__()
        self.self_attn = Attention(info)
        self.mlp = MLP(info)
        self.input_layernorm = RMSNorm(info.hidden_size, info.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(info.hidden_size, info.rms_norm_eps)
        self.recompute = False
        """Keep only this layer's input for the backward pass and compute the rest again there."""

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The layer up to attention."""
        return self.self_attn.project(self.input_layernorm(x), cos, sin)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """The layer after attention."""
        x = x + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))

    def whole(self, x: Tensor, cos: Tensor, sin: Tensor, sight: Sight) -> Tensor:
        return self.after(x, self.self_attn.attend(*self.before(x, cos, sin), sight))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, sight: Sight) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            # Nothing in a layer is random.
            kept: Tensor = checkpoint(self.whole, x, cos, sin, sight, use_reentrant=False, preserve_rng_state=False)
            return kept
        return self.whole(x, cos, sin, sight)


class Decoder(nn.Module):
    def __init__(self, info: ModelInfo) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(info.vocab_size, info.hidden_size)
        self.layers = nn.ModuleList(Layer(info) for _ in range(info.layers))
        self.norm = RMSNorm(info.hidden_size, info.rms_norm_eps)


class Llama(nn.Module):
    """A Llama model; state_dict names equal those of transformers' LlamaForCausalLM.

    A tied model has no `lm_head` parameter: the embedding is the output projection.
    """

    def __init__(self, info: ModelInfo) -> None:
        super().__init__()
        self.info = info
        self.model = Decoder(info)
        if not info.tied:
            self.lm_head = nn.Linear(info.hidden_size, info.vocab_size, bias=False)
        # A plain attribute, not a buffer: casting the model to bfloat16 must not round the angles.
        self.frequencies = rotary_frequencies(info, info.rope_scaling)

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Positions [...] -> cos, sin [..., head_dim]; angles in float32, sin negated in its first half."""
        return rotary(positions, self.frequencies.to(positions.device), dtype)

    def hidden(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        """Final-norm hidden states.

        tokens int64 [B, T]; segments integer [B, T] or None (one document a
        row). With segments no position attends outside its own document
        (documents are runs of equal numbers) and positions restart at each.
        Returns [B, T, D] in the weights' (or autocast's) precision.
        """
        length = tokens.shape[1]
        steps = torch.arange(length, device=tokens.device)
        if segments is None:
            return self.hidden_at(tokens, steps.unsqueeze(0), None)
        begins = torch.ones_like(segments, dtype=torch.bool)
        begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
        starts = torch.where(begins, steps, 0).cummax(dim=1).values
        # Same document and not later: with runs of equal numbers "same start" is "same document".
        mask = (starts.unsqueeze(2) == starts.unsqueeze(1)) & (steps.unsqueeze(1) >= steps.unsqueeze(0))
        return self.hidden_at(tokens, steps - starts, mask.unsqueeze(1))

    def hidden_at(self, tokens: Tensor, positions: Tensor, sight: Sight) -> Tensor:
        """`hidden` with positions [B or 1, T] and a sight of one's own."""
        x = self.model.embed_tokens(tokens)
        cos, sin = self.rotary(positions, x.dtype)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        for layer in self.model.layers:
            x = layer(x, cos, sin, sight)
        return self.model.norm(x)

    def summed_loss(
        self, tokens: Tensor, positions: Tensor, sight: Sight, counted: Tensor | None, targets: Tensor, chunk: int
    ) -> Tensor:
        """Sum of cross-entropy in nats, float32 scalar.

        tokens int64 [B, T]; counted bool [B * T], or None where all count; targets
        int64 [N], those that count, in order. Logits exist for `chunk` targets at once.
        """
        hidden = self.hidden_at(tokens, positions, sight)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        return head_loss(hidden if counted is None else hidden[counted], self.output_weight, targets, chunk)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> logits [..., V] in the hidden states' precision."""
        return functional.linear(hidden, self.output_weight)

    @property
    def output_weight(self) -> Tensor:
        """The output projection [V, D]: the embedding itself where tied."""
        return self.model.embed_tokens.weight if self.info.tied else self.lm_head.weight

    def forward(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        return self.logits(self.hidden(tokens, segments))


def default_device() -> torch.device:
    """The NVIDIA GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(folder: Path, dtype: Dtype = "bfloat16", device: str | torch.device = "cpu") -> Llama:
    """Verify a model folder and load it in the wanted precision (ModelInvalid when it is damaged)."""
    info = verify(folder)
    with torch.device("meta"):
        model = Llama(info)
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        tensors.update(load_file(path))
    wanted = model.state_dict().keys()
    state = {name: tensors[name].to(device=device, dtype=DTYPES[dtype]) for name in wanted}
    model.load_state_dict(state, strict=True, assign=True)
    # Made on the meta device above, where it holds no numbers.
    model.frequencies = rotary_frequencies(info, info.rope_scaling).to(device)
    return model


def save_model(model: Any, folder: Path, dtype: Dtype = "bfloat16") -> None:
    """Write model.safetensors into an existing folder, weights rounded to `dtype`.

    Config and tokenizer are the caller's (see checkpoints.model_folder).
    `model` is a Llama, or anything with its state_dict.
    """
    state = {name: value.detach().to("cpu", DTYPES[dtype]).contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
