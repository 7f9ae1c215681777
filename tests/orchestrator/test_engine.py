"""The cycle as a state machine: every path to the end, and every way to be interrupted."""

from __future__ import annotations

import shutil

import msgspec
import pytest

from jupiter_engine.orchestrator.lineage import trace
from jupiter_engine.orchestrator.plan import look_number, start_of_training
from jupiter_engine.orchestrator.state import apply
from jupiter_engine.protocol.commands import Decide, FinishReview, Pause, Resume, Review, Rollback, StartCycles, Stop
from jupiter_engine.protocol.journal import ENGINE_STAGES, STAGES
from jupiter_engine.protocol.orders import CollectOrder, EvaluateOrder, GenerateOrder, TrainOrder
from jupiter_engine.protocol.state import State
from tests.orchestrator.conftest import Rig
from tests.orchestrator.scripted_worker import SAMPLES

WORKER_STAGES = [stage for stage in STAGES if stage not in ENGINE_STAGES]
AUTO = StartCycles(domain="python", cycles=1, mode="auto")
INTERACTIVE = StartCycles(domain="python", cycles=1, mode="interactive")


async def test_auto_cycle_runs_every_stage_once_and_promotes(rig: Rig) -> None:
    assert rig.ask(AUTO) is None
    await rig.steps()
    cycle = rig.cycle()
    assert cycle.status == "finished"
    assert cycle.outcome == "promoted"
    assert rig.worker.finished == [f"python-0001-{stage}" for stage in WORKER_STAGES]
    active = rig.engine.state.active_generator("python")
    assert active is not None
    assert active.name == "python-0001"
    assert active.parent == "smollm2-135m-instruct"
    assert cycle.counts["samples"] == SAMPLES
    assert (cycle.counts["accepted"], cycle.counts["rejected"]) == (SAMPLES - 1, 1)
    assert cycle.rejected == {"too_short": 1}


async def test_next_cycle_generates_with_the_promoted_model(rig: Rig) -> None:
    rig.ask(StartCycles(domain="python", cycles=2, mode="auto"))
    await rig.steps()
    generators = [order.generator.name for order in rig.worker.orders if isinstance(order, GenerateOrder)]
    assert generators == ["smollm2-135m-instruct", "python-0001"]
    assert rig.cycle("python-0002").status == "finished"
    assert rig.cycle("python-0002").remaining == 0


async def test_rollback_restores_the_former_generator_and_the_base_stays(rig: Rig) -> None:
    rig.ask(AUTO)
    await rig.steps()
    assert rig.ask(Rollback(domain="python")) is None
    active = rig.engine.state.active_generator("python")
    assert active is not None
    assert active.name == "smollm2-135m-instruct"
    assert [g.name for g in rig.engine.state.generators["python"]] == ["smollm2-135m-instruct", "python-0001"]
    refusal = rig.ask(Rollback(domain="python"))
    assert refusal is not None
    assert "nothing before it" in refusal
    assert rig.ask(Rollback(domain="python", to="python-0001")) is None


@pytest.mark.parametrize("verdict", ["worse", "inconclusive", "not_enough_data"])
async def test_auto_keeps_the_generator_unless_the_gate_promotes(rig: Rig, verdict: str) -> None:
    rig.worker.verdict = verdict
    rig.ask(AUTO)
    await rig.steps()
    assert rig.cycle().outcome == "kept"
    active = rig.engine.state.active_generator("python")
    assert active is not None
    assert active.name == "smollm2-135m-instruct"
    assert active.looks == 1


@pytest.mark.parametrize(("verdict", "start"), [("worse", "smollm2-135m-instruct"), ("inconclusive", "python-0001")])
async def test_an_undecided_candidate_is_trained_on_and_a_worse_one_is_left(rig: Rig, verdict: str, start: str) -> None:
    rig.worker.verdict = verdict
    rig.ask(StartCycles(domain="python", cycles=2, mode="auto"))
    await rig.steps()
    train = [order for order in rig.worker.orders if isinstance(order, TrainOrder)][-1]
    assert train.start is not None
    assert train.start.name == start
    assert start_of_training(rig.engine.state, rig.cycle("python-0002")).name == start


async def test_each_look_at_one_incumbent_uses_the_next_slice(rig: Rig) -> None:
    rig.worker.verdict = "inconclusive"
    rig.ask(StartCycles(domain="python", cycles=3, mode="auto"))
    await rig.steps()
    assert [order.slice for order in rig.worker.orders if isinstance(order, EvaluateOrder)] == [0, 1, 2]
    assert look_number(rig.engine.state, rig.cycle("python-0003")) == 4


async def test_interactive_cycle_waits_for_the_decision(rig: Rig) -> None:
    rig.worker.verdict = "worse"
    rig.ask(INTERACTIVE)
    await rig.steps()
    cycle = rig.cycle()
    assert (cycle.status, cycle.waiting_for) == ("running", "decision")
    refusal = rig.ask(Decide(cycle=cycle.id, answer="promote"))
    assert refusal is not None
    assert "override" in refusal
    assert rig.ask(Decide(cycle=cycle.id, answer="promote", override=True, by="ann")) is None
    await rig.steps()
    assert rig.cycle().outcome == "promoted"
    assert rig.cycle().answered_by == "ann"
    assert rig.ask(Decide(cycle=cycle.id, answer="keep")) is not None


async def test_auto_start_takes_over_a_cycle_that_waits_for_a_person(rig: Rig) -> None:
    rig.ask(INTERACTIVE)
    await rig.steps()
    assert rig.ask(AUTO) is None
    await rig.steps()
    assert rig.cycle().outcome == "promoted"
    assert rig.cycle().answered_by == "gate"
    assert len(rig.engine.state.cycles) == 1


async def test_manual_review_waits_and_verdicts_reach_training_data(rig: Rig) -> None:
    path = rig.root / "config" / "domains" / "python.yaml"
    path.write_text(path.read_text().replace("review: {mode: auto}", "review: {mode: manual}"))
    rig.ask(INTERACTIVE)
    await rig.steps()
    assert rig.cycle().waiting_for == "review"
    assert rig.ask(Review(sample="s0101", verdict="reject", reason="wrong")) is None
    assert rig.ask(Review(sample="s0100", verdict="accept")) is None
    assert rig.ask(FinishReview(cycle="python-0001")) is None
    await rig.steps()
    accepted = (rig.root / ".jupiter/runs/python-0001-queue/accepted.jsonl").read_bytes().splitlines()
    ids = [msgspec.json.decode(line)["id"] for line in accepted]
    assert ids == ["s0100", "s0102", "s0103", "s0104", "s0105"]
    assert rig.cycle().stages["review"].result == {"accepted": 5, "rejected": 1, "reviewed": 2, "by": "user"}


async def test_samples_of_earlier_cycles_accumulate(rig: Rig) -> None:
    rig.ask(StartCycles(domain="python", cycles=2, mode="auto"))
    await rig.steps()
    accepted = (rig.root / ".jupiter/runs/python-0002-queue/accepted.jsonl").read_bytes().splitlines()
    assert len(accepted) == 2 * (SAMPLES - 1)


@pytest.mark.parametrize("stage", WORKER_STAGES)
async def test_pause_halts_the_worker_and_resume_continues(rig: Rig, stage: str) -> None:
    rig.worker.hold_stage = stage
    rig.ask(AUTO)
    await rig.steps()
    assert rig.cycle().stages[stage].status == "running"
    rig.ask(Pause(cycle="python-0001"))
    await rig.engine.step()
    halt = rig.root / ".jupiter" / "runs" / f"python-0001-{stage}" / "inbox" / "halt"
    assert halt.exists()
    rig.worker.halt()
    rig.remote.die()
    await rig.steps()
    assert rig.cycle().status == "paused"
    assert rig.cycle().stages[stage].status == "halted"
    rig.ask(Resume(cycle="python-0001"))
    await rig.steps()
    assert rig.cycle().status == "finished"
    assert not halt.exists()


async def test_stop_ends_the_cycle_and_resume_can_take_it_up(rig: Rig) -> None:
    rig.worker.hold_stage = "train"
    rig.ask(AUTO)
    await rig.steps()
    rig.ask(Stop(cycle="python-0001"))
    await rig.engine.step()
    rig.worker.halt()
    rig.remote.die()
    await rig.steps()
    assert rig.cycle().status == "stopped"
    assert rig.ask(Resume(cycle="python-0001")) is None
    await rig.steps()
    assert rig.cycle().status == "finished"


@pytest.mark.parametrize("stage", WORKER_STAGES)
async def test_a_worker_that_dies_is_started_again(rig: Rig, stage: str) -> None:
    rig.worker.die_stages = [stage]
    rig.ask(AUTO)
    await rig.steps()
    assert rig.cycle().status == "finished"
    assert rig.cycle().stages[stage].attempt == 2
    assert any("starting it again" in n.text for n in rig.engine.state.notices)


async def test_a_worker_that_keeps_dying_fails_the_stage_with_its_last_words(rig: Rig) -> None:
    rig.worker.die_stages = ["train"] * 3
    rig.ask(AUTO)
    (rig.root / ".jupiter/runs/python-0001-train").mkdir(parents=True)
    (rig.root / ".jupiter/runs/python-0001-train/worker.log").write_text("Killed \x1b[31mout of memory\x1b[0m\n")
    await rig.steps()
    failure = rig.cycle().stages["train"].failure
    assert failure is not None
    assert "ended 3 times" in failure.detail
    assert "Killed out of memory" in failure.detail
    assert rig.cycle().status == "failed"
    rig.ask(Resume(cycle="python-0001"))
    await rig.steps()
    assert rig.cycle().status == "finished"


async def test_a_reported_failure_fails_the_cycle_and_start_continues_it(rig: Rig) -> None:
    rig.worker.fail_stage = "collect"
    rig.ask(AUTO)
    await rig.steps()
    failure = rig.cycle().stages["collect"].failure
    assert failure is not None
    assert failure.kind == "CorpusEmpty"
    rig.worker.fail_stage = None
    assert rig.ask(AUTO) is None
    await rig.steps()
    assert list(rig.engine.state.cycles) == ["python-0001"]
    assert rig.cycle().status == "finished"
    assert rig.worker.finished.count("python-0001-prepare") == 1


@pytest.mark.parametrize("kills_at", range(40))
async def test_engine_killed_after_any_step_finishes_with_nothing_lost_or_done_twice(rig: Rig, kills_at: int) -> None:
    """The 40 kill points cover every transition of a whole cycle."""
    rig.ask(AUTO)
    for _ in range(kills_at):
        await rig.engine.step()
    rig.kill_engine()
    await rig.steps()
    cycle = rig.cycle()
    assert cycle.status == "finished"
    assert rig.worker.finished == [f"python-0001-{stage}" for stage in WORKER_STAGES]
    assert cycle.counts["samples"] == SAMPLES
    assert cycle.counts["accepted"] == SAMPLES - 1
    assert len(rig.engine.state.generators["python"]) == 2


async def test_a_killed_engine_re_attaches_to_a_living_worker(rig: Rig) -> None:
    rig.worker.hold_stage = "train"
    rig.ask(AUTO)
    await rig.steps()
    started = len(rig.remote.started)
    rig.kill_engine()
    await rig.steps()
    assert len(rig.remote.started) == started
    rig.worker.release()
    rig.remote.die()
    await rig.steps()
    assert rig.cycle().status == "finished"
    assert rig.cycle().stages["train"].attempt == 1


async def test_a_result_written_while_no_engine_lived_is_taken_in(rig: Rig) -> None:
    rig.worker.hold_stage = "train"
    rig.ask(AUTO)
    await rig.steps()
    rig.worker.release()
    rig.remote.die()
    rig.kill_engine()
    await rig.steps()
    assert rig.worker.finished.count("python-0001-train") == 1
    assert rig.cycle().status == "finished"


async def test_state_is_a_pure_function_of_the_journal(rig: Rig) -> None:
    rig.ask(StartCycles(domain="python", cycles=2, mode="auto"))
    await rig.steps()
    rebuilt = State()
    for recorded in rig.engine.database.entries():
        apply(recorded, rebuilt)
    assert msgspec.to_builtins(rebuilt) == msgspec.to_builtins(rig.engine.state)


async def test_commands_that_make_no_sense_are_refused_with_a_reason(rig: Rig) -> None:
    assert "no cycle 'x'" in str(rig.ask(Pause(cycle="x")))
    assert "cycles must be 1 or more" in str(rig.ask(StartCycles(domain="python", cycles=0)))
    assert "pyton" in str(rig.ask(StartCycles(domain="pyton")))
    assert "no generator yet" in str(rig.ask(Rollback(domain="python")))
    rig.ask(INTERACTIVE)
    assert "already running" in str(rig.ask(INTERACTIVE))
    await rig.steps()
    assert "does not wait for a review" in str(rig.ask(FinishReview(cycle="python-0001")))
    assert "no single sample" in str(rig.ask(Review(sample="zz", verdict="accept")))
    rig.ask(Decide(cycle="python-0001", answer="keep"))
    await rig.steps()
    assert "nothing to resume" in str(rig.ask(Resume(cycle="python-0001")))
    assert "already finished" in str(rig.ask(Stop(cycle="python-0001")))
    assert "no generator 'q'" in str(rig.ask(Rollback(domain="python", to="q")))


async def test_the_report_holds_what_was_measured(rig: Rig) -> None:
    rig.ask(AUTO)
    await rig.steps()
    report = (rig.root / ".jupiter/runs/python-0001-report/report.md").read_text()
    assert "5 accepted, 1 rejected (too_short 1)" in report
    assert "| vault_bpb | primary | 0.9000 | 0.8000 | +0.1000 bits per byte |" in report
    assert "jupiter chat --model python-0001" in report


async def test_rows_that_a_worker_claims_but_did_not_write_are_an_error(rig: Rig) -> None:
    rig.worker.hold_stage = "generate"
    rig.ask(AUTO)
    await rig.steps()
    rig.worker.release()
    path = rig.root / ".jupiter/runs/python-0001-generate/results/samples.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    rig.remote.die()
    await rig.steps()
    failure = rig.cycle().stages["generate"].failure
    assert failure is not None
    assert failure.kind == "StateError"
    assert rig.engine.database.count_samples() == 0


@pytest.mark.parametrize("command", [Pause, Stop])
async def test_a_waiting_cycle_comes_to_rest_at_once_and_asks_again(rig: Rig, command: type[Pause | Stop]) -> None:
    rig.ask(INTERACTIVE)
    await rig.steps()
    assert rig.cycle().waiting_for == "decision"
    assert rig.ask(command(cycle="python-0001")) is None
    assert rig.cycle().status == ("paused" if command is Pause else "stopped")
    assert rig.cycle().waiting_for == ""
    assert "does not wait for a decision" in str(rig.ask(Decide(cycle="python-0001", answer="keep")))
    assert rig.ask(Resume(cycle="python-0001")) is None
    await rig.steps()
    assert rig.cycle().waiting_for == "decision"


async def test_only_one_cycle_holds_the_workspace(rig: Rig) -> None:
    rig.worker.hold_stage = "train"
    rig.ask(AUTO)
    await rig.steps()
    rig.ask(Stop(cycle="python-0001"))
    assert "already stopping" in str(rig.ask(Stop(cycle="python-0001")))
    await rig.engine.step()
    rig.worker.halt()
    rig.remote.die()
    await rig.steps()
    rig.ask(INTERACTIVE)
    await rig.steps()
    assert rig.cycle("python-0002").waiting_for == "decision"
    assert "waits for a decision" in str(rig.ask(Resume(cycle="python-0001")))
    assert "measured against" in str(rig.ask(Rollback(domain="python")))


async def test_auto_takes_over_a_running_interactive_cycle(rig: Rig) -> None:
    rig.worker.hold_stage = "train"
    rig.ask(INTERACTIVE)
    await rig.steps()
    assert rig.ask(StartCycles(domain="python", cycles=2, mode="auto")) is None
    rig.worker.release()
    rig.remote.die()
    await rig.steps()
    assert [c.outcome for c in rig.engine.state.cycles.values()] == ["promoted", "promoted"]


async def test_a_result_that_came_while_pausing_is_not_done_twice(rig: Rig) -> None:
    rig.worker.hold_stage = "train"
    rig.ask(AUTO)
    await rig.steps()
    rig.ask(Pause(cycle="python-0001"))
    rig.worker.release()
    rig.remote.die()
    rig.kill_engine()
    await rig.steps()
    assert rig.cycle().status == "paused"
    rig.ask(Resume(cycle="python-0001"))
    await rig.steps()
    assert rig.worker.finished.count("python-0001-train") == 1
    assert rig.cycle().status == "finished"


async def test_a_removed_run_folder_is_done_again(rig: Rig) -> None:
    rig.worker.fail_stage = "collect"
    rig.ask(AUTO)
    await rig.steps()
    shutil.rmtree(rig.root / ".jupiter/runs/python-0001-collect")
    rig.worker.fail_stage = None
    rig.ask(Resume(cycle="python-0001"))
    await rig.steps()
    assert rig.cycle().status == "finished"


async def test_a_failed_cycle_takes_corrected_settings(rig: Rig) -> None:
    rig.worker.fail_stage = "collect"
    rig.ask(AUTO)
    await rig.steps()
    path = rig.root / "config/domains/python.yaml"
    path.write_text(path.read_text().replace("max_bytes: 4_000_000", "max_bytes: 5_000_000"))
    rig.worker.fail_stage = None
    rig.ask(AUTO)
    await rig.steps()
    collect = [order for order in rig.worker.orders if isinstance(order, CollectOrder)]
    assert [order.sources[1].max_bytes for order in collect] == [4_000_000, 5_000_000]


async def test_a_halt_is_not_counted_as_a_crash(rig: Rig) -> None:
    rig.ask(AUTO)
    for _ in range(5):
        rig.worker.hold_stage = "train"
        await rig.steps()
        rig.worker.halt()
        rig.remote.die()
        rig.kill_engine()
    await rig.steps()
    assert rig.cycle().status == "finished"
    assert rig.cycle().stages["train"].attempt == 1


async def test_why_tells_what_was_trained_upon_whatever_is_decided_later(rig: Rig) -> None:
    rig.ask(AUTO)
    await rig.steps()
    rig.ask(Review(sample="s0101", verdict="reject", reason="late"))
    rig.ask(Review(sample="s0100", verdict="accept"))
    assert trace(rig.engine.database, rig.engine.state, "s0101").trained_in == ("python-0001",)
    assert trace(rig.engine.database, rig.engine.state, "s0100").trained_in == ()
