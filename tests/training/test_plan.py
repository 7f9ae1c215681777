from __future__ import annotations

import msgspec
import pytest

from jupiter_engine.protocol.shapes import PRESETS, Shape
from jupiter_engine.training.plan import plan_training
from tests.training.nano import recipe

SHAPE: Shape = PRESETS["125m"].shape


def test_sizes_are_those_of_float32_adamw_with_a_bfloat16_copy() -> None:
    plan = plan_training(SHAPE, recipe(compute_dtype="bfloat16", steps=30, checkpoint_every_steps=10))
    assert plan.state == 18 * plan.parameters
    assert plan.checkpoint == 12 * plan.parameters
    assert plan.checkpoints == 3 * plan.checkpoint
    assert plan.target == 2 * plan.parameters
    assert plan.input_tokens == 30 * 8 * 16
    assert plan.memory == plan.state + plan.activations + plan.logits + (512 << 20)


def test_activations_of_the_reference_shape_are_the_measured_ones() -> None:
    """31.9 kB a token and layer at hidden size 512, intermediate 2048, 8 heads, 2 key heads, bfloat16."""
    shape = msgspec.structs.replace(
        SHAPE, hidden_size=512, intermediate_size=2048, heads=8, kv_heads=2, head_dim=64, layers=1
    )
    wanted = recipe(compute_dtype="bfloat16", batch_sequences=1, micro_batch_sequences=1, sequence_tokens=1024)
    assert plan_training(shape, wanted).activations / 1024 == pytest.approx(31_900, rel=0.03)


@pytest.mark.parametrize("field", ["sequence_tokens", "micro_batch_sequences"])
def test_more_work_at_once_never_takes_less_memory(field: str) -> None:
    sizes = [plan_training(SHAPE, recipe(**{field: size})).memory for size in (1, 2, 4, 8)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_ranks_share_the_batch() -> None:
    one, four = (plan_training(SHAPE, recipe(), ranks) for ranks in (1, 4))
    assert four.activations == one.activations // 4
    assert four.state == one.state
