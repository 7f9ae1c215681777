"""The output projection and its cross-entropy in one, a chunk of targets at a time.

The full logits [N, V] never exist. Gradients are computed along with the loss
(the idea of Liger's fused linear cross-entropy), so a chunk's logits are made
once and nothing but the two gradients is kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """Sum over N of -log softmax(hidden @ weight^T)[target], float32 scalar; 0 where N is 0.

    hidden [N, D]; weight [V, D] of the same precision; targets int64 [N].
    """
    if not torch.is_grad_enabled():
        parts = [
            functional.cross_entropy(functional.linear(part, weight).float(), wanted, reduction="sum")
            for part, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True)
            if len(wanted)
        ]
        return torch.stack(parts).sum() if parts else hidden.new_zeros((), dtype=torch.float32)
    total: Tensor = _HeadLoss.apply(hidden, weight, targets, chunk)
    return total


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(targets), chunk):
            part, wanted = hidden[start : start + chunk], targets[start : start + chunk].unsqueeze(1)
            scores = functional.linear(part, weight)
            if scores.dtype != torch.float32:
                scores = scores.float()
            at_target = scores.gather(1, wanted)
            top, place = scores.max(dim=1, keepdim=True)
            shares = torch.softmax(scores, dim=1)
            # log(sum(exp)) from the largest share, which is never small: no further pass over the scores.
            total += (top - shares.gather(1, place).log() - at_target).sum()
            # The derivative by the scores: shares, less one at the target.
            shares.scatter_add_(1, wanted, torch.full_like(at_target, -1.0))
            slope = shares.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(slope, weight, out=d_hidden[start : start + chunk])
            if d_weight is not None:
                d_weight.addmm_(slope.t(), part)
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        (scale,) = gradients
        # Nobody else sees the two: they are scaled where they lie.
        d_hidden = None if d_hidden is None else d_hidden.mul_(scale)
        d_weight = None if d_weight is None else d_weight.mul_(scale)
        return d_hidden, d_weight, None, None
