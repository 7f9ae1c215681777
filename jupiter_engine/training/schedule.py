"""The learning rate as a function of the share of the run's tokens, one warm-up only."""

from __future__ import annotations

import math

from jupiter_engine.protocol.specs import ScheduleSpec


def learning_rate(spec: ScheduleSpec, peak: float, tokens_done: int, tokens_total: int) -> float:
    """Rate of the step that ends when `tokens_done` of the run's `tokens_total` counted tokens are trained.

    The share is taken at the end of the step, so the first step already moves
    and the last one runs at exactly `final_share * peak` (cosine, wsd) or `peak`
    (constant). Warm-up is linear from zero; wsd (warm-up, stable, decay) then
    stays at the peak and falls linearly over the last `decay_share` of the run,
    or over all that the warm-up leaves of it (0: never). Counting tokens, not steps, keeps
    the curve the same when batches hold different numbers of counted tokens.
    """
    if not 0 < tokens_done <= tokens_total:
        raise ValueError(f"tokens_done must lie in 1..{tokens_total}, got {tokens_done}")
    share = tokens_done / tokens_total
    if share < spec.warmup_share:
        return peak * share / spec.warmup_share
    if spec.kind == "constant" or spec.warmup_share == 1.0:
        return peak
    if spec.kind == "wsd":
        decay, left = min(spec.decay_share, 1.0 - spec.warmup_share), 1.0 - share
        return peak if left >= decay else peak * (spec.final_share + (1.0 - spec.final_share) * left / decay)
    position = (share - spec.warmup_share) / (1.0 - spec.warmup_share)
    return peak * (spec.final_share + (1.0 - spec.final_share) * 0.5 * (1.0 + math.cos(math.pi * position)))
