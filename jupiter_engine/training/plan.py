"""What a training run takes, said before it starts: bytes of memory and disk, tokens and steps."""

from __future__ import annotations

import msgspec

from jupiter_engine.protocol.shapes import BYTES_OF_DTYPE, Shape, parameter_count, training_memory, weight_bytes
from jupiter_engine.protocol.specs import Recipe

_RUNTIME_BYTES = 512 << 20
"""Interpreter, tensor library and allocator slack, as measured with torch on a CPU."""

_LOSS_CHUNK = 256
"""Targets whose logits exist at once in both twins."""


class TrainingPlan(msgspec.Struct, frozen=True, kw_only=True):
    """All sizes in bytes; memory is that of one rank."""

    parameters: int
    state: int
    """Master weights, compute copy, gradients, AdamW moments."""
    activations: int
    """Kept for the backward pass of one micro-batch (estimate, see `activation_bytes`)."""
    logits: int
    """float32 logits, their softmax and the compute-precision copy of one loss chunk."""
    writing: int
    """Copy of the state that is written beside the training (rank 0; left out where memory is short)."""
    checkpoint: int
    """One checkpoint on disk: float32 weights and two moments."""
    checkpoints: int
    """Most that lie on disk at once: those kept and the one being written."""
    target: int
    """The published model's weights."""
    input_tokens: int
    """steps x batch x sequence."""

    @property
    def memory(self) -> int:
        """While training; `writing` comes on top while a checkpoint is written."""
        return self.state + self.activations + self.logits + _RUNTIME_BYTES

    @property
    def disk(self) -> int:
        return self.checkpoints + self.target


def activation_bytes(shape: Shape, tokens: int, compute_dtype: str) -> int:
    """Activations without recomputation, about 31 values a token, layer and hidden unit.

    The constant was fitted to peak-memory differences over depth of a Llama
    with intermediate size 4 x hidden and 4 query heads a key head (31.9 kB a
    token and layer at hidden size 512 in bfloat16); other proportions are
    scaled by the widths of their projections.
    """
    d, f = shape.hidden_size, shape.intermediate_size
    kv = shape.kv_heads * shape.head_dim
    reference = 8 * 1.0 + 2 * 4.0 + 2 * 0.25  # residual stream and norms, MLP, keys and values; per hidden unit
    widths = (8 * d + 2 * f + 2 * kv) / reference
    return int(31.0 * widths * shape.layers * tokens * BYTES_OF_DTYPE[compute_dtype])


def plan_training(shape: Shape, recipe: Recipe, ranks: int = 1) -> TrainingPlan:
    """Sizes of a run of `recipe` on a model of `shape` by `ranks` data-parallel ranks."""
    parameters = parameter_count(shape)
    rows = min(recipe.micro_batch_sequences, -(-recipe.batch_sequences // ranks))
    tokens = rows * recipe.sequence_tokens
    checkpoint = 12 * parameters
    kept = min(recipe.keep_checkpoints, (recipe.steps - 1) // recipe.checkpoint_every_steps) + 1
    return TrainingPlan(
        parameters=parameters,
        state=training_memory(shape, compute_dtype=recipe.compute_dtype).total,
        activations=activation_bytes(shape, tokens, recipe.compute_dtype),
        logits=min(tokens, _LOSS_CHUNK) * shape.vocab_size * (8 + BYTES_OF_DTYPE[recipe.compute_dtype]),
        writing=checkpoint,
        checkpoint=checkpoint,
        checkpoints=kept * checkpoint,
        target=weight_bytes(shape, recipe.compute_dtype),
        input_tokens=recipe.steps * recipe.batch_sequences * recipe.sequence_tokens,
    )
