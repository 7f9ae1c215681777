"""The planner's answer on the sheet that starts cycles."""

from __future__ import annotations

from msgspec.structs import replace

from jupiter_engine.api import nearest_text
from jupiter_engine.planning.budget import Device
from jupiter_engine.planning.plan import Member, Outlook, Question, outlook
from jupiter_engine.protocol.shapes import PRESETS
from jupiter_engine.protocol.specs import Recipe, RoundSpec
from jupiter_engine.units import GIB
from jupiter_tui.view.outlook import outlook_lines
from tests.tui.conftest import Open

RECIPE = Recipe(start="scratch", preset="1b", sequence_tokens=1024, batch_sequences=8, micro_batch_sequences=4)
CARD = Device(node="box", kind="cuda", twin="torch", name="RTX 4090", allowed=80 * GIB)


def answer(*members: Member, rounds: RoundSpec | None = None) -> Outlook:
    asked = Question(shape=PRESETS["1b"].shape, recipe=RECIPE, members=members, rounds=rounds)
    return outlook(asked, compare=False)


def text(found: Outlook) -> str:
    return "\n".join("".join(part for part, _ in line) for line in outlook_lines(found, nearest_text(found)))


def test_what_fits_is_told_with_memory_speed_time_and_energy() -> None:
    shown = text(answer(Member(device=CARD)))
    assert "ok fits" in shown
    assert "box: " in shown
    assert "of 80.0 GiB" in shown
    assert "tokens/s, by table" in shown
    assert "kWh" in shown
    assert "loss" not in shown


def test_what_does_not_fit_names_what_would() -> None:
    shown = text(answer(Member(device=replace(CARD, allowed=20 * GIB))))
    assert "!! does not fit" in shown
    assert "training.recompute_activations: true" in shown


def test_islands_tell_their_shares_and_the_loss() -> None:
    small = Device(node="mac", kind="metal", twin="mlx", name="Apple M4", allowed=None, why="not told")
    shown = text(answer(Member(device=CARD, island="a"), Member(device=small, island="b"), rounds=RoundSpec()))
    assert "fits as far as is known" in shown
    assert "of unknown, adds" in shown
    assert "+0.2% expected, for 2 islands" in shown


def test_a_name_from_another_machine_draws_nothing_of_its_own() -> None:
    evil = replace(CARD, node="\x1b[2Jbox\nsecond line " + "x" * 90)
    for line in outlook_lines(answer(Member(device=evil)), ""):
        row = "".join(part for part, _ in line)
        assert "\x1b" not in row
        assert "\n" not in row
        assert len(row) <= 72


async def test_the_start_sheet_shows_the_plan_on_a_small_screen(console: Open) -> None:
    async with console("empty", size=(80, 24)) as c:
        await c.press("l")
        screen = await c.shows("Start cycles", "parameters", "memory", "tokens/s", "enter starts")
        assert "ok fits" in screen or "does not fit" in screen
        assert all(len(row) <= 80 for row in screen.splitlines())
