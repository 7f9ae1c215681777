"""Causal attention within documents for training on a CPU, block by block of queries.

torch's CPU kernel for scaled_dot_product_attention works on small tiles that its
bfloat16 matrix products like badly, and with a mask it computes the upper
triangle, too. Here a block of queries meets all keys that any of them may see in
one matrix product for each key/value head; keys after the block and before the
block's first document are left out. Only q, k and v are kept for
the backward pass. Numbers are in docs/experiments/log.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_QUERIES = 128
"""Queries of a block in one row."""
_POSITIONS = 2048
"""Rows of this many positions together go through the products side by side."""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Queries first..end of some rows; they see keys begin..end where `bias` is 0 and not where it is -inf."""

    rows: slice
    first: int
    end: int
    begin: int
    bias: Tensor
    """[rows or 1, 1, end - first, end - begin] in the compute precision."""


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """Cuts a batch [B, T] into blocks of queries."""

    blocks: tuple[Block, ...]


def document_starts(segments: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """segments [B, T], documents as runs of equal numbers -> position at which each position's document begins."""
    steps = np.arange(segments.shape[1])
    begins = np.ones(segments.shape, dtype=np.bool_)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return np.maximum.accumulate(np.where(begins, steps, 0), axis=1)


def cut(starts: npt.NDArray[np.int64], dtype: torch.dtype) -> Blocks:
    """The blocks of a batch whose positions' documents begin at `starts` [B, T]."""
    rows, length = starts.shape
    together = max(1, _POSITIONS // length)
    blocks: list[Block] = []
    known: dict[tuple[int, int, bytes], Tensor] = {}
    for row in range(0, rows, together):
        part = starts[row : row + together]
        if (part == part[0]).all():
            part = part[:1]
        for first in range(0, length, _QUERIES):
            end = min(first + _QUERIES, length)
            own = part[:, first:end]
            begin = int(own[:, 0].min())
            key = (first - begin, end - begin, (own - begin).tobytes())
            bias = known.get(key)
            if bias is None:
                keys, queries = np.arange(begin, end), np.arange(first, end)
                seen = (keys <= queries[:, None]) & (keys >= own[:, :, None])
                bias = torch.zeros(seen.shape, dtype=dtype).masked_fill_(torch.from_numpy(~seen), float("-inf"))
                known[key] = bias = bias.unsqueeze(1)
            blocks.append(Block(slice(row, min(row + together, rows)), first, end, begin, bias))
    return Blocks(tuple(blocks))


def attend(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float) -> Tensor:
    """Softmax attention, products times `scale`: q [B, H, T, D], k and v [B, KV, T, D] -> [B, H, T, D].

    H is a multiple of KV; the result lies in memory as [B, T, H, D].
    """
    result: Tensor = _Attention.apply(q, k, v, blocks, scale)
    return result


def _grouped(x: Tensor, rows: slice, first: int, end: int, kv_heads: int) -> Tensor:
    """Positions first..end of x [B, N, T, D] as one matrix for each row and key/value head: [R * KV, N / KV * t, D]."""
    part = x[rows, :, first:end]
    return part.reshape(part.shape[0] * kv_heads, -1, x.shape[-1])


def _probabilities(q: Tensor, k: Tensor, block: Block, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of one block: scaled queries [R * KV, G * t, D], keys [R * KV, s, D], probabilities [R * KV, G * t, s]."""
    heads, kv_heads = q.shape[1], k.shape[1]
    queries = _grouped(q, block.rows, block.first, block.end, kv_heads) * scale
    keys = _grouped(k, block.rows, block.begin, block.end, kv_heads)
    scores = torch.bmm(queries, keys.transpose(1, 2))
    scores.view(-1, heads, block.end - block.first, keys.shape[1]).add_(block.bias)
    return queries, keys, torch.softmax(scores, dim=-1)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float) -> Tensor:
        out, kv_heads = _room(q), k.shape[1]
        for block in blocks.blocks:
            _, _, shares = _probabilities(q, k, block, scale)
            part = torch.bmm(shares, _grouped(v, block.rows, block.begin, block.end, kv_heads))
            wanted = out[block.rows, :, block.first : block.end]
            wanted.copy_(part.view(wanted.shape))
        ctx.save_for_backward(q, k, v)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v = ctx.saved_tensors
        (d_out,) = gradients
        kv_heads = k.shape[1]
        d_q, d_k, d_v = _room(q), _room(k).zero_(), _room(v).zero_()
        for block in ctx.blocks.blocks:
            queries, keys, shares = _probabilities(q, k, block, ctx.scale)
            wanted = _grouped(d_out, block.rows, block.first, block.end, kv_heads)
            d_shares = torch.bmm(wanted, _grouped(v, block.rows, block.begin, block.end, kv_heads).transpose(1, 2))
            d_values = d_v[block.rows, :, block.begin : block.end]
            d_values.add_(torch.bmm(shares.transpose(1, 2), wanted).view(d_values.shape))
            # softmax's own derivative: shares * (d_shares - sum(d_shares * shares)), in one pass.
            d_scores = torch._softmax_backward_data(d_shares, shares, -1, shares.dtype)
            d_queries = d_q[block.rows, :, block.first : block.end]
            torch.mul(torch.bmm(d_scores, keys).view(d_queries.shape), ctx.scale, out=d_queries)
            d_keys = d_k[block.rows, :, block.begin : block.end]
            d_keys.add_(torch.bmm(d_scores.transpose(1, 2), queries).view(d_keys.shape))
        return d_q, d_k, d_v, None, None


def _room(x: Tensor) -> Tensor:
    """Room for x's values [B, N, T, D], in memory as [B, T, N, D], which is how the projections want them."""
    rows, heads, length, size = x.shape
    return torch.empty(rows, length, heads, size, dtype=x.dtype, device=x.device).transpose(1, 2)
