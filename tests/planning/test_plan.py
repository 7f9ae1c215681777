from __future__ import annotations

import math
from typing import Any

import pytest
from msgspec.structs import replace

from jupiter_engine.planning.budget import Device
from jupiter_engine.planning.plan import Member, Outlook, Question, outlook, plan_training
from jupiter_engine.protocol.shapes import PRESETS, Shape
from jupiter_engine.protocol.specs import Recipe, RoundSpec
from jupiter_engine.units import GIB

SHAPE: Shape = PRESETS["125m"].shape
BIG: Shape = PRESETS["1b"].shape
RECIPE = Recipe(sequence_tokens=1024, batch_sequences=16, micro_batch_sequences=4, steps=100)


def mac(gib: float = 16.0, name: str = "mac") -> Device:
    return Device(node=name, kind="metal", twin="mlx", name="Apple M4", allowed=int(gib * GIB * 2 / 3))


def card(gib: float = 24.0, name: str = "box") -> Device:
    return Device(node=name, kind="cuda", twin="torch", name="NVIDIA GeForce RTX 4090", allowed=int((gib - 1) * GIB))


def asked(shape: Shape = SHAPE, *members: Member, recipe: Recipe = RECIPE, **more: Any) -> Question:
    return Question(shape=shape, recipe=recipe, members=members or (Member(device=mac()),), **more)


# -- one run -------------------------------------------------------------------------------------------
def test_disk_counts_the_checkpoints_that_are_kept_and_the_one_being_written() -> None:
    recipe = replace(RECIPE, steps=30, checkpoint_every_steps=10, keep_checkpoints=2)
    plan = plan_training(SHAPE, recipe)
    assert plan.checkpoint == 12 * plan.parameters
    assert plan.checkpoints == 3 * plan.checkpoint
    assert plan_training(SHAPE, replace(recipe, keep_every_steps=5)).checkpoints == 9 * plan.checkpoint
    assert plan.target == 2 * plan.parameters
    assert plan.input_tokens == 30 * 16 * 1024
    assert plan.disk == plan.checkpoints + plan.target


def test_with_early_stopping_the_best_state_lies_beside_the_newest_ones() -> None:
    """A best state of each held-out loss may be stored between the regular checkpoints."""
    rare = replace(RECIPE, steps=30, checkpoint_every_steps=100, keep_checkpoints=2)
    assert plan_training(SHAPE, rare).checkpoints == plan_training(SHAPE, rare).checkpoint
    early = replace(rare, early_stop=replace(rare.early_stop, every_steps=5))
    plan = plan_training(SHAPE, early)
    assert plan.checkpoints == 4 * plan.checkpoint
    assert plan_training(SHAPE, replace(early, keep_every_steps=10)).checkpoints == 7 * plan.checkpoint


def test_a_card_needs_little_of_its_machines_memory() -> None:
    cuda = plan_training(BIG, RECIPE, 4, kind="cuda")
    assert cuda.host_memory() < cuda.memory
    assert cuda.host_memory(4) == 4 * cuda.parameters + cuda.checkpoint + 4 * cuda.parts.runtime
    cpu = plan_training(BIG, RECIPE, 4)
    assert cpu.host_memory(4) == 4 * cpu.memory


def test_a_machines_own_micro_batch_takes_the_recipes_place() -> None:
    recipe = replace(RECIPE, batch_sequences=32, micro_batch_sequences=16)
    shape = PRESETS["350m"].shape
    pair = (Member(device=mac(128, "big")), Member(device=mac(name="small")))
    assert [node.fits for node in outlook(asked(shape, *pair, recipe=recipe)).nodes] == [True, False]
    own = outlook(asked(shape, pair[0], replace(pair[1], micro_batch=1), recipe=recipe))
    assert [node.fits for node in own.nodes] == [True, True]
    assert [node.micro_batch for node in own.nodes] == [16, 1]
    assert own.fits is True
    more = outlook(asked(shape, replace(pair[0], micro_batch=64), pair[1], recipe=recipe))
    assert more.nodes[0].micro_batch == 16  # no more than an equal share of the batch
    assert plan_training(shape, recipe, 2, micro_batch=1).memory < plan_training(shape, recipe, 2).memory


def test_a_machine_that_allows_nothing_is_refused_in_words() -> None:
    answer = outlook(asked(SHAPE, Member(device=replace(mac(), allowed=0))))
    assert answer.fits is False
    assert "allows 0" in answer.refusal
    assert answer.nearest is None


def test_a_second_copy_of_the_state_needs_room_but_on_cards() -> None:
    def warned(device: Device) -> bool:
        needed = outlook(asked(SHAPE, Member(device=device))).nodes[0].needed
        answer = outlook(asked(SHAPE, Member(device=replace(device, allowed=needed + 1))))
        assert answer.fits is True
        return any("second copy" in text for text in answer.warnings)

    assert warned(mac())
    assert not warned(card())


# -- fits or not ---------------------------------------------------------------------------------------
def test_a_billion_weights_do_not_fit_a_mac_of_16_gb_and_the_nearest_plan_does() -> None:
    recipe = replace(RECIPE, start="scratch", preset="1b")
    answer = outlook(asked(BIG, recipe=recipe))
    assert answer.fits is False
    assert "mac" in answer.refusal
    assert answer.nearest is not None
    # Recomputation first, then smaller micro-batches, then a smaller optimizer: the fixed order.
    assert answer.nearest.recipe.recompute_activations
    again = outlook(asked(replace_shape(answer.nearest.recipe), recipe=answer.nearest.recipe))
    assert again.fits is True
    assert again.nearest is None
    assert again.refusal == ""


def replace_shape(recipe: Recipe) -> Shape:
    return PRESETS[recipe.preset or "1b"].shape


def test_the_first_single_change_that_is_enough_is_taken() -> None:
    recipe = replace(RECIPE, micro_batch_sequences=16)
    needed = outlook(asked(SHAPE, recipe=recipe)).nodes[0].needed
    with_recompute = outlook(asked(SHAPE, recipe=replace(recipe, recompute_activations=True))).nodes[0].needed
    room = Device(node="mac", kind="metal", twin="mlx", name="Apple M4", allowed=(needed + with_recompute) // 2)
    answer = outlook(asked(SHAPE, Member(device=room), recipe=recipe))
    assert answer.nearest is not None
    assert len(answer.nearest.changes) == 1
    assert "recompute_activations" in answer.nearest.changes[0]
    # With it on already the next in order is the micro-batch.
    on = replace(recipe, recompute_activations=True)
    tight = replace(room, allowed=with_recompute - 1)
    later = outlook(asked(SHAPE, Member(device=tight), recipe=on)).nearest
    assert later is not None
    assert later.changes == ("set training.micro_batch_sequences: 8",)


def test_a_trained_model_is_made_smaller_only_by_adapters() -> None:
    answer = outlook(asked(BIG, Member(device=mac(9)), recipe=replace(RECIPE, start="generator")))
    assert answer.nearest is not None
    assert "lora" in answer.nearest.changes[-1]
    assert answer.nearest.recipe.update == "lora"


def test_sharing_the_optimizer_is_offered_to_groups_only() -> None:
    recipe = replace(
        RECIPE, start="scratch", preset="350m", sequence_tokens=256, micro_batch_sequences=1,
        recompute_activations=True, optimizer=replace(RECIPE.optimizer, name="muon"),
    )  # fmt: skip
    shape = PRESETS["350m"].shape
    alone = asked(shape, Member(device=mac()), recipe=recipe)
    shared = outlook(replace(alone, sharding="zero1", members=(Member(device=mac()), Member(device=mac(name="b")))))
    room = replace(mac(), allowed=shared.nodes[0].needed)
    pair = outlook(asked(shape, Member(device=room), Member(device=replace(room, node="b")), recipe=recipe))
    assert pair.nearest is not None
    assert pair.nearest.sharding == "zero1"
    single = outlook(asked(shape, Member(device=room), recipe=recipe)).nearest
    assert single is not None
    assert single.sharding == "none"


def test_where_nothing_helps_there_is_no_nearest_plan() -> None:
    answer = outlook(asked(BIG, Member(device=replace(mac(), allowed=1 << 20)), recipe=RECIPE))
    assert answer.fits is False
    assert answer.nearest is None


def test_what_a_node_allows_may_be_unknown() -> None:
    answer = outlook(asked(SHAPE, Member(device=replace(mac(), allowed=None, why="no memory_gb"))))
    assert answer.fits is None
    assert answer.refusal == ""
    assert any("no memory_gb" in text for text in answer.warnings)


def test_ranks_of_one_machine_share_its_memory_and_cards_do_not() -> None:
    cpu = Device(node="cpu", kind="cpu", twin="torch", name="EPYC", cores=8, allowed=64 * GIB)
    two = outlook(asked(SHAPE, Member(device=cpu, ranks=2))).nodes[0]
    assert two.needed == 2 * two.memory.total
    cards = replace(card(), cards=2)
    assert outlook(asked(SHAPE, Member(device=cards, ranks=2))).nodes[0].needed == pytest.approx(
        two.needed / 2, rel=0.5
    )
    node = outlook(asked(SHAPE, Member(device=cards, ranks=2))).nodes[0]
    assert node.needed == node.memory.total


def test_ranks_on_one_gpu_are_no_faster_than_one() -> None:
    for device in (mac(), card()):
        one, two = (outlook(asked(SHAPE, Member(device=device, ranks=ranks))).nodes[0].speed for ranks in (1, 2))
        assert two.middle == pytest.approx(one.middle)
    two = outlook(asked(SHAPE, Member(device=replace(card(), cards=2), ranks=2))).nodes[0].speed
    assert two.middle == pytest.approx(2 * outlook(asked(SHAPE, Member(device=card()))).nodes[0].speed.middle)


# -- time, energy, loss ----------------------------------------------------------------------------------
def test_a_base_mac_beside_a_4090_adds_little_and_the_plan_says_so() -> None:
    members = (Member(device=card(), island="gpu"), Member(device=mac(64), island="mac", link="ethernet"))
    answer = outlook(asked(SHAPE, *members, rounds=RoundSpec()))
    gpu, slow = answer.nodes
    assert gpu.adds + slow.adds == pytest.approx(1.0)
    assert slow.adds < 0.05
    assert any("hardly worth" in text for text in answer.warnings)
    assert gpu.without is not None
    assert slow.without is not None
    assert gpu.without > 5 > 1.1 > slow.without > 1.0
    assert answer.islands == 2
    assert answer.penalty == pytest.approx(0.0042, abs=0.0015)  # 0.5 % at 90 M, 0.3 % at 180 M


def test_time_and_energy_follow_from_tokens_speed_and_watts() -> None:
    answer = outlook(asked(SHAPE, Member(device=card())))
    assert answer.seconds_low is not None
    assert answer.energy_kwh_low is not None
    assert answer.seconds_low == pytest.approx(answer.tokens / answer.tokens_per_s_high)
    assert answer.energy_kwh_low == pytest.approx(answer.seconds_low * answer.nodes[0].speed.watts / 3.6e6)
    assert answer.source == "table"
    twice = outlook(asked(SHAPE, Member(device=card()), tokens=2 * answer.tokens))
    assert twice.seconds_low == pytest.approx(2 * answer.seconds_low)


def test_gradients_over_wifi_cost_most_of_a_step() -> None:
    def share(link: Any) -> float:
        pair = (Member(device=card(), link=link), Member(device=card(name="b"), link=link))
        return outlook(asked(SHAPE, *pair)).sync_share

    assert share("machine") < share("ethernet") < share("wifi")
    assert share("wifi") > 0.5
    assert outlook(asked(SHAPE, Member(device=card()))).sync_share == 0.0


def test_an_unknown_device_has_no_time() -> None:
    answer = outlook(asked(SHAPE, Member(device=replace(card(), name="Voodoo 2"))))
    assert answer.seconds_low is None
    assert answer.days is None
    assert answer.energy_kwh_high is None
    assert any("--calibrate" in text for text in answer.warnings)


def test_ways_are_compared_at_their_own_numbers_of_tokens() -> None:
    answer = outlook(asked(BIG, Member(device=card()), available=1_000_000))
    scratch, continued, lora = answer.comparisons
    assert scratch.tokens == 20 * answer.parameters
    assert continued.tokens == lora.tokens == answer.tokens == RECIPE.steps * 16 * 1024
    assert lora.memory < continued.memory
    assert lora.days_high < continued.days_high < scratch.days_high
    assert not math.isnan(scratch.days_low)


def test_text_that_is_repeated_too_often_is_warned_about() -> None:
    def warned(available: int | None) -> list[str]:
        answer: Outlook = outlook(asked(SHAPE, available=available))
        return [text for text in answer.warnings if "times over" in text]

    assert outlook(asked(SHAPE, available=409_600)).epochs == pytest.approx(4.0)
    assert not warned(409_600)
    assert warned(300_000)
    assert not warned(None)


def test_few_tokens_from_scratch_are_warned_about() -> None:
    scratch = replace(RECIPE, start="scratch", preset="125m")
    assert any("20" in text or "usual" in text for text in outlook(asked(SHAPE, recipe=scratch)).warnings)
    assert not any("usual" in text for text in outlook(asked(SHAPE)).warnings)
