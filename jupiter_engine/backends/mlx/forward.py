"""A training step's forward and backward pass as pure functions of the weights.

The model only lends its structure: weights come in by name, so the same code
serves weights that lie here whole, adapters beside frozen weights, and shards
that are put together layer by layer. A pure function can also be compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from jupiter_engine.backends.mlx.model import Llama, attention_mask
from jupiter_engine.backends.mlx.sharding import Gatherer

Weights = dict[str, mx.array]
Inputs = dict[str, mx.array]
"""One micro-batch: `tokens` int [B, T]; `segments` int [B, T] where a row holds several documents; `targets` int
[K] and `counts` float32 [K], 1 or 0 (padding); `at` int [K], the targets' places among B x T, where not all places are
taken; `scale` float32."""

_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class Forward:
    """Loss and gradients of a model whose weights are given from outside."""

    def __init__(
        self, model: Llama, *, recompute: bool, gatherer: Gatherer | None = None, compiled: bool = False
    ) -> None:
        """`recompute`: keep each layer's input only. `gatherer`: weights are shards, see sharding.Gatherer."""
        self._model, self._gatherer = model, gatherer
        self._own = tree_flatten(model.parameters())
        self._layers = [
            (f"model.layers.{number}.", [name for name, _ in tree_flatten(layer.parameters())])
            for number, layer in enumerate(model.model.layers)
        ]
        self._run = [self._runner(layer, recompute=recompute) for layer in model.model.layers]
        gradients: Callable[..., Any] = mx.value_and_grad(self._objective)
        self._gradients = mx.compile(gradients) if compiled else gradients

    def gradients(self, trained: Weights, frozen: Weights, inputs: Inputs, chunks: int) -> tuple[mx.array, Weights]:
        """Sum of the counted cross-entropy in nats, and d(scale * sum)/d(trained). Nothing is computed yet.

        Logits exist for one of `chunks` equal parts of the K targets at a time.
        """
        try:
            (_, total), gradients = self._gradients(trained, frozen, inputs, chunks)
        finally:
            # The modules would keep a whole set of weights alive, and tracers.
            self._model.update(tree_unflatten(self._own))
        return total, gradients

    def loss(self, trained: Weights, frozen: Weights, inputs: Inputs, chunks: int) -> mx.array:
        """The same sum without gradients, computed."""
        try:
            rows, weight = self._rows({**frozen, **trained}, inputs)
        finally:
            self._model.update(tree_unflatten(self._own))
        total = mx.array(0.0)
        parts = (mx.split(array, chunks) for array in (rows, inputs["targets"], inputs["counts"]))
        for hidden, targets, counts in zip(*parts, strict=True):
            losses = nn.losses.cross_entropy((hidden @ weight.T).astype(mx.float32), targets, reduction="none")
            total = total + mx.sum(losses * counts)
            mx.eval(total)
        return total

    def _objective(self, trained: Weights, frozen: Weights, inputs: Inputs, chunks: int) -> tuple[mx.array, mx.array]:
        rows, weight = self._rows({**frozen, **trained}, inputs)
        total = _head_loss(chunks)(weight, rows, inputs["targets"], inputs["counts"])[0]
        return total * inputs["scale"], total

    def _rows(self, weights: Weights, inputs: Inputs) -> tuple[mx.array, mx.array]:
        """Final hidden states [K, D] of the targets' places, and the output projection [V, D]."""
        tokens, segments = inputs["tokens"], inputs.get("segments")
        embedding = self._whole(weights, [_EMBEDDING], None)[_EMBEDDING]
        mask = "causal" if segments is None else attention_mask(segments)
        x = embedding[tokens]
        for (prefix, names), run in zip(self._layers, self._run, strict=True):
            x = run({name: weights[prefix + name] for name in names}, x, mask)
        norm = self._whole(weights, [_NORM], x)[_NORM]
        rows = mx.fast.rms_norm(x, norm, self._model.info.rms_norm_eps).reshape(-1, x.shape[-1])
        if "at" in inputs:
            rows = rows[inputs["at"]]
        tied = self._model.info.tied
        return rows, embedding if tied else self._whole(weights, [_HEAD], rows)[_HEAD]

    def _whole(self, weights: Mapping[str, mx.array], names: list[str], after: mx.array | None) -> Weights:
        wanted = {name: weights[name] for name in names}
        return wanted if self._gatherer is None else self._gatherer(wanted, after)

    def _runner(self, layer: nn.Module, *, recompute: bool) -> Callable[[Weights, mx.array, mx.array | str], mx.array]:
        """One layer as a function of its weights (names within the layer), input and mask."""

        def run(weights: Weights, x: mx.array, mask: mx.array | str) -> mx.array:
            def through(weights: Weights, x: mx.array) -> mx.array:
                layer.update(tree_unflatten(list(self._whole(weights, list(weights), x).items())))
                out: mx.array = layer(x, self._model.periods, mask)
                return out

            return (mx.checkpoint(through) if recompute else through)(weights, x)

        return run


def _head_loss(chunks: int) -> Callable[..., tuple[mx.array, mx.array, mx.array]]:
    """Output projection and cross-entropy in one, `chunks` parts of the rows one after the other.

    The gradient of the logits is known as soon as the loss is, so both products
    of the backward pass are done at once while a part's logits are there: three
    matrix products instead of the four of recomputing them, and never more than
    one part's logits (the idea of Liger Kernel's fused linear cross-entropy).
    """

    @mx.custom_function
    def loss(weight: mx.array, rows: mx.array, targets: mx.array, counts: mx.array) -> tuple[mx.array, ...]:
        """weight [V, D], rows [K, D], targets [K], counts [K] -> sum in nats, d/d(rows) [K, D], d/d(weight) [V, D]."""
        total, slopes, change = mx.array(0.0), [], None
        for hidden, wanted, counted in zip(*(mx.split(a, chunks) for a in (rows, targets, counts)), strict=True):
            if change is not None:
                # All that the part before is used for must be done, or its logits would wait beside this one's.
                hidden = mx.depends([hidden], [total, slopes[-1], change])[0]
            logits = (hidden @ weight.T).astype(mx.float32)
            shares = mx.softmax(logits, axis=-1)
            # log-sum-exp = largest logit - log(largest share): exact, as that share is at least 1 / V, and one pass
            # of exponentials instead of two, which are half of the head's time on a CPU.
            spread = mx.max(logits, axis=-1) - mx.log(mx.max(shares, axis=-1))
            chosen = mx.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
            total = total + mx.sum((spread - chosen) * counted)
            below, part = _slopes(weight, hidden, shares, wanted, counted)
            slopes.append(below)
            change = part if change is None else change + part
        assert change is not None
        return total, mx.concatenate(slopes), change.astype(weight.dtype)

    @loss.vjp
    def loss_vjp(
        primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> tuple[mx.array, ...]:
        _, _, targets, counts = primals
        along = cotangents[0]
        return (
            _scaled(outputs[2], along),
            _scaled(outputs[1], along),
            mx.zeros_like(targets),
            mx.zeros_like(counts),
        )

    function: Callable[..., tuple[mx.array, mx.array, mx.array]] = cast(Any, loss)
    return function


def _slopes(
    weight: mx.array, hidden: mx.array, shares: mx.array, wanted: mx.array, counted: mx.array
) -> tuple[mx.array, mx.array]:
    """d(loss)/d(hidden) [K, D] and, in float32, d(loss)/d(weight) [V, D] from softmax [K, V].

    The logits' gradient is softmax - onehot(wanted), times 0 where a target does not count. In float32 onehot and
    zeros are applied to [K, D] and [V, D], which saves two passes over [K, V]; in bfloat16 that would round a share
    near 1 before 1 is taken from it.
    """
    if weight.dtype == mx.float32:
        kept = hidden * counted[:, None]
        below = (shares @ weight - weight[wanted]) * counted[:, None]
        return below, (shares.T @ kept).at[wanted].subtract(kept)
    slope = shares * counted[:, None]
    slope = slope.at[mx.arange(len(wanted)), wanted].subtract(counted).astype(weight.dtype)
    return slope @ weight, (slope.T @ hidden).astype(mx.float32)


def _scaled(array: mx.array, by: mx.array) -> mx.array:
    """array * by with the product in float32, in the array's precision: `by` itself is never rounded."""
    return (array.astype(mx.float32) * by).astype(array.dtype)
