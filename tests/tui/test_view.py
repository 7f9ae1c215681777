"""The pure half of the console: lines, curves, funnel, decision."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jupiter_engine.protocol.facts import Metric
from jupiter_engine.protocol.rows import Chunk
from jupiter_tui.view import chart, decision, domain, header, history, text, train
from jupiter_tui.view.picture import Curve, DomainFile, LogBook, Picture
from tests.tui.recorded import ESCAPES, RecordedWorkspace, Until, decision_of, record


def picture_of(root: Path, until: Until) -> Picture:
    workspace = RecordedWorkspace(record(root, until), [])
    state = workspace.state
    cycle = state.latest_cycle("python")
    stage = cycle.current_stage() if cycle else None
    progress = workspace.progress(stage.run) if stage and stage.run else None
    picture = Picture(
        root=str(root),
        domain="python",
        loaded=True,
        state=state,
        now=time.time(),
        engine_pid=1,
        cycle=cycle,
        progress=progress,
        waiting_samples=12,
    )
    workspace.close()
    return picture


# -- text ----------------------------------------------------------------------------------------------
@given(st.text())
def test_clean_leaves_nothing_that_drives_a_terminal(data: str) -> None:
    cleaned = text.clean(data)
    assert not [c for c in cleaned if c != "\n" and (ord(c) < 32 or 0x7F <= ord(c) <= 0x9F)]


def test_clean_keeps_the_words_of_a_hostile_line() -> None:
    assert "red" in text.clean(ESCAPES)
    assert "\u202e" not in text.clean(ESCAPES)
    assert "rm" not in text.clean("\x1b]52;c;rm\x07")


@given(st.text(alphabet="▸·─│╭█░⠷é中a", max_size=40))
def test_ascii_keeps_every_width_and_leaves_data_alone(data: str) -> None:
    shown = text.to_ascii(data)
    assert len(shown) == len(data)
    assert not [c for c in shown if c in "▸·─│╭█░⠷"]
    assert [c for c in shown if c in "é中"] == [c for c in data if c in "é中"]


def test_numbers_are_read_not_decoded() -> None:
    shown = [text.number(v, 3) for v in (5063.4, 0.000123, 12, 2.5, math.nan, None, 1e9)]
    assert shown == ["5,063", "0.000123", "12", "2.5", "-", "-", "1e+09"]


def test_wrap_keeps_the_indentation_of_code() -> None:
    lines = text.wrap("def f():\n    return 1\n\nend", 40)
    assert [text.plain(line) for line in lines] == ["def f():", "    return 1", "", "end"]


def test_cut_line_keeps_styles_and_says_that_it_cut() -> None:
    assert text.cut_line([("abc", "x"), ("defg", "y")], 5) == [("abc", "x"), ("d…", "y")]


# -- curves --------------------------------------------------------------------------------------------
def test_smoothing_is_debiased_and_leaves_gaps_out() -> None:
    assert chart.smooth([2.0, 2.0, 2.0], 0.9) == pytest.approx([2.0, 2.0, 2.0])
    smoothed = chart.smooth([1.0, math.nan, 3.0], 0.5)
    assert math.isnan(smoothed[1])
    assert smoothed[2] == pytest.approx((1 * 0.25 + 3 * 0.5) / 0.75)


def test_decimation_keeps_every_extreme_and_bounds_the_count() -> None:
    ys = [math.sin(i / 50) for i in range(20_000)]
    ys[12_345] = 9.0
    points = chart.decimate([float(i) for i in range(20_000)], ys, 60)
    assert len(points) <= 120
    assert (12_345.0, 9.0) in points
    assert min(y for _, y in points) == min(ys)
    assert [x for x, _ in points] == sorted(x for x, _ in points)


def test_decimation_of_a_gap_leaves_a_gap() -> None:
    points = chart.decimate([float(i) for i in range(100)], [math.nan if 40 <= i < 60 else 1.0 for i in range(100)], 10)
    assert any(math.isnan(y) for _, y in points)


def test_a_chart_has_the_asked_size_and_falls_with_the_loss() -> None:
    lines = chart.chart([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], width=40, height=10)
    assert len(lines) == 10
    assert max(len(text.plain(line)) for line in lines) <= 40
    drawn = [text.plain(line)[9:] for line in lines[:8]]
    first = next(i for i, row in enumerate(drawn) if row[0] != " ")
    last = next(i for i, row in enumerate(drawn) if row[-1] != " ")
    assert first < last
    assert text.plain(lines[0]).strip().startswith("3.06")


@pytest.mark.parametrize("ys", [[], [math.nan, math.inf]])
def test_a_chart_without_a_number_says_so(ys: list[float]) -> None:
    lines = chart.chart([float(i) for i in range(len(ys))], ys, width=30, height=6, empty="nothing yet")
    assert text.plain(lines[0]) == "nothing yet"
    assert len(lines) == 6


def test_the_interval_bar_orders_threshold_low_effect_high() -> None:
    drawn = chart.interval_bar(0.1, 0.2, 0.3, 0.0, 40)
    assert len(drawn) == 40
    assert drawn.index("|") < drawn.index("─") < drawn.index("●") < drawn.rindex("─")
    assert len(chart.interval_bar(-math.inf, math.nan, math.inf, 0.0, 20)) == 20


def test_a_hundred_thousand_points_are_drawn_in_time() -> None:
    xs = [float(i) for i in range(100_000)]
    started = time.process_time()
    chart.chart(xs, xs, width=120, height=20)
    assert time.process_time() - started < 1.0


def test_a_resumed_run_overwrites_the_steps_it_repeats() -> None:
    def metric(step: int, loss: float) -> Metric:
        return Metric(
            step=step,
            tokens=1,
            loss=loss,
            learning_rate=1,
            grad_norm=1,
            tokens_per_s=1,
            seconds=1,
            at=0.0,
            rank_seconds=(),
        )

    curve = Curve()
    curve.extend(metric(i, 1.0) for i in range(1, 6))
    curve.extend(metric(i, 2.0) for i in range(4, 7))
    assert [(m.step, m.loss) for m in curve.metrics] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]


def step(number: int, **values: object) -> Metric:
    given: dict[str, object] = {"tokens": number, "loss": 2.0, "learning_rate": 1e-4, "grad_norm": 1.0}
    given |= {"tokens_per_s": 100.0, "seconds": 2.0, "at": 0.0, "step": number, **values}
    return Metric(**given)  # type: ignore[arg-type]


def test_held_out_losses_follow_a_run_that_goes_back() -> None:
    curve = Curve()
    curve.extend([step(1), step(2, held_out_loss=1.5), step(3), step(4, held_out_loss=1.0)])
    assert [m.step for m in curve.measured] == [2, 4]
    curve.extend([step(3), step(4, held_out_loss=1.2)])
    assert [(m.step, m.held_out_loss) for m in curve.measured] == [(2, 1.5), (4, 1.2)]


def test_the_step_s_numbers_say_where_the_ranks_time_goes() -> None:
    picture = Picture()
    picture.curve.extend(
        [
            step(1, held_out_loss=1.5),
            step(
                2,
                held_out_loss=1.75,
                mfu=0.314,
                rank_seconds=(3.0, 1.0),
                data_seconds=(0.0, 0.0),
                communication_seconds=(0.5, 0.5),
                idle_seconds=(0.0, 3.0),
                rank_rows=(6, 2),
                peak_bytes=(1 << 30, 1 << 29),
            ),
        ]
    )
    shown = "\n".join(text.plain(line) for line in train.numbers(picture, 90))
    for words in ("1.7500  (best 1.5000, step 1)", "31.4%", "1.0 GiB 512.0 MiB", "6 2", "slower ranks 37.5%"):
        assert words in shown
    alone = Picture()
    alone.curve.extend([step(1, rank_seconds=(1.0,))])
    assert "waits for" not in "\n".join(text.plain(line) for line in train.numbers(alone, 90))


def test_the_log_book_counts_what_it_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jupiter_tui.view.picture.LINES_KEPT", 10)
    book = LogBook()
    book.add(str(i) for i in range(8))
    book.add(["a", "b", "c", "d"])
    assert (book.first, book.total, book.lines[0], book.lines[-1]) == (2, 12, "2", "d")


# -- header --------------------------------------------------------------------------------------------
def test_the_title_says_stage_share_and_eta(tmp_path: Path) -> None:
    line = text.plain(header.title_line(picture_of(tmp_path, "train"), 120))
    assert "cycle 2" in line
    assert "train 67%" in line
    assert "ETA 40s" in line
    assert len(line) == 120


def test_tabs_carry_what_waits(tmp_path: Path) -> None:
    assert "3 Review·12" in text.plain(header.tabs_line(picture_of(tmp_path / "a", "review"), "train", 80))
    line = text.plain(header.tabs_line(picture_of(tmp_path / "b", "decision"), "train", 80))
    assert "5 Promote·1" in line
    assert "[4 Train]" in line


def test_alerts_name_failure_fix_and_a_dead_engine(tmp_path: Path) -> None:
    failed = header.alerts(picture_of(tmp_path / "a", "failed"))
    assert failed[0][0] == "bad"
    assert "Training diverged" in failed[0][1]
    assert "lower training.optimizer.learning_rate" in failed[0][1]
    running = picture_of(tmp_path / "b", "train")
    orphan = Picture(**{**vars(running), "engine_pid": None})
    assert "the engine is not running" in header.alerts(orphan)[0][1]
    silent = Picture(**{**vars(running), "now": running.now + 300})
    assert "no progress for" in header.alerts(silent)[0][1]
    assert header.alerts(running) == []


# -- train ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("width", [60, 80, 114, 120, 200])
def test_the_stage_strip_holds_every_stage_at_every_width(tmp_path: Path, width: int) -> None:
    picture = picture_of(tmp_path, "train")
    lines = train.stage_strip(picture.cycle, width)
    assert all(len(text.plain(line).rstrip()) <= width for line in lines)
    whole = " ".join(text.plain_lines(lines).split())
    assert whole.startswith("ok prepare ok collect")
    assert ".. train -- evaluate" in whole
    assert len(lines) == {60: 3, 80: 2}.get(width, 1)


def test_the_funnel_counts_and_gives_reasons(tmp_path: Path) -> None:
    shown = text.plain_lines(train.funnel(picture_of(tmp_path, "train").cycle, 60))
    for part in ("documents         2,513", "samples              12", "accepted              8  67% of 12", "121,344"):
        assert part in shown
    assert "rejected 4, because:" in shown
    assert "too_short" in shown


def test_the_progress_line_says_what_a_resting_cycle_waits_for(tmp_path: Path) -> None:
    line = text.plain(train.progress_line(picture_of(tmp_path, "review"), 100))
    assert "ETA" not in line or "review" in line


# -- decision ------------------------------------------------------------------------------------------
def test_every_endpoint_is_shown_with_its_outcome_in_words() -> None:
    shown = text.plain_lines(decision.decision_lines(decision_of("python-0002", "promote"), 100))
    for part in (
        "vault_bpb",
        "ok passed",
        "-- undecidable",
        "-- no rule",
        "effect +0.1780  [+0.1580, +0.1980]",
        "1 won, 1 lost",
    ):
        assert part in shown
    assert shown.index("PRIMARY") < shown.index("mcq_known")
    worse = text.plain_lines(decision.decision_lines(decision_of("python-0002", "worse"), 100))
    assert "!! WORSE" in worse
    assert "!! failed" in worse


def test_lineage_marks_the_active_generator(tmp_path: Path) -> None:
    picture = picture_of(tmp_path, "finished")
    lines = [text.plain(line) for line in decision.lineage_lines(picture.state.generators["python"], 90, 0)]
    assert lines[0].startswith("> ")
    assert "ok active" not in lines[0]
    assert "ok active python-0001" in " ".join(lines[1].split())


# -- history, fleet, domain ----------------------------------------------------------------------------
def test_history_rows_and_details(tmp_path: Path) -> None:
    picture = picture_of(tmp_path, "decision")
    rows = [
        text.plain(history.cycle_row(c, 120, picture.now, chosen=False)) for c in history.newest_first(picture.state)
    ]
    assert "python-0002" in rows[0]
    assert "finished: promoted" in rows[1]
    assert "3.1 > 2.35" in rows[1]
    first = picture.state.cycles["python-0001"]
    shown = text.plain_lines(history.cycle_lines(first, 100, report="the report", curve=Curve(), now=picture.now))
    assert "the report" in shown
    assert "no optimizer step was recorded" in shown
    assert "ok report" in shown


def test_a_broken_domain_shows_every_problem() -> None:
    problems = ("python.yaml, line 3: `samples` is 0, expected 1 or more", "python.yaml, line 9: unknown key")
    broken = DomainFile(name="python", path="/w/python.yaml", settings=None, problems=problems)
    shown = text.plain_lines(domain.domain_lines(broken, None, 80))
    assert "not accepted: 2 problems" in shown
    assert "line 3" in shown
    assert "line 9" in shown


def test_a_chunk_that_is_not_there_is_said() -> None:
    from jupiter_tui.view.review import chunk_lines

    assert "not in the workspace" in text.plain_lines(chunk_lines(None, 80))
    chunk = Chunk(
        id="c", document="d", ordinal=1, title="T", kind="docs", split="train", slice=-1, cluster="x", text="body"
    )
    assert "body" in text.plain_lines(chunk_lines(chunk, 80))
