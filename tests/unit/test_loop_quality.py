"""The measure of the loop's quality, its pure parts: selection, draws, intervals, table, resume."""

import random
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec
import pytest
from bench.figures import Machine
from bench.lines import RefusedError
from bench.loop_quality import best_of_n, problems, setup
from bench.loop_quality.__main__ import parsed
from bench.loop_quality.lines import Arm, Line, Lines, Setup, missing
from bench.loop_quality.plot import svg
from bench.loop_quality.summary import Summary, summarise, table

from ai_agent_server.config import settings as configuration
from ai_agent_server.core.task_packet import Limits

SETUP = Setup(
    llm="embedded",
    engine="local.llama_cpp",
    model="tiny",
    problems="0:4",
    seed=7,
    temperature=0.7,
    limits=Limits(),
    tier="bubblewrap",
    llm_sha256="a",
    profile_sha256="b",
    program_sha256="c",
    data_sha256="d",
)
MACHINE = Machine(cpu="a CPU", cores=2, memory_gb=8.0, kernel="6", python="3.11", filesystem="ext4")


def line(problem: int, arm: Arm, **changes: Any) -> Line:
    made = Line(
        problem=problem,
        arm=arm,
        visible=False,
        right=False,
        calls=1,
        tokens=100,
        seconds=1.0,
        ended="answered",
    )
    return msgspec.structs.replace(made, **changes)


def column(arm: Arm, right: str, **changes: Any) -> list[Line]:
    """One line a character: `x` is right."""
    return [
        line(number, arm, visible=mark == "x", right=mark == "x", completed=mark == "x", **changes)
        for number, mark in enumerate(right)
    ]


def summary(**columns: list[Line]) -> Summary:
    return summarise(SETUP, MACHINE, columns, resamples=2000)  # type: ignore[arg-type]  # names are arms


# --- the problems ---


def test_every_problem_has_an_example_to_show_and_assertions_to_hide() -> None:
    found = problems.load()
    assert len(found) == 427
    assert [p.task_id for p in found] == sorted({p.task_id for p in found})
    for problem in found:
        assert len(problem.hidden) >= 2
        assert problem.visible not in problem.hidden
        assert problem.payload["examples"] == [problem.visible]
        assert not any(hidden in problem.payload["task"] for hidden in (*problem.hidden, problem.code))


@pytest.mark.parametrize(
    ("text", "found"), [("100:300", range(100, 300)), (":3", range(3)), ("425:", range(425, 427))]
)
def test_problems_are_chosen_by_position(text: str, found: range) -> None:
    assert problems.positions(text, 427) == found


@pytest.mark.parametrize("text", ["", "5", "3:3", "9:3", "0:428", "-1:3", "a:b"])
def test_a_choice_that_holds_nothing_or_too_much_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        problems.positions(text, 427)


# --- best-of-n ---


def test_the_first_draw_whose_visible_example_holds_is_chosen_whatever_the_hidden_ones_say() -> None:
    draws = [
        line(1, "one_call"),
        line(1, "best_of_n", draw=2, visible=True),
        line(1, "best_of_n", draw=3, visible=True, right=True),
    ]
    chosen = best_of_n.chosen(draws)
    assert (chosen.visible, chosen.right, chosen.completed) == (True, False, True)
    assert (chosen.calls, chosen.tokens, chosen.seconds) == (3, 300, 3.0)


def test_without_a_draw_that_holds_the_first_stands_and_nothing_is_claimed() -> None:
    chosen = best_of_n.chosen([line(1, "one_call", code="first"), line(1, "best_of_n", draw=2)])
    assert (chosen.code, chosen.completed, chosen.arm) == ("first", False, "best_of_n")


def test_draws_go_on_in_rounds_until_the_loops_tokens_are_spent() -> None:
    budget, rng = 20_000, random.Random(3)
    draws = {number: [line(number, "one_call", tokens=rng.randrange(50, 150))] for number in range(10)}
    while again := best_of_n.next_round(draws, budget):
        for number in again:
            holds = rng.random() < 0.02
            draws[number].append(line(number, "best_of_n", tokens=rng.randrange(50, 150), visible=holds))
    spent = sum(draw.tokens for drawn in draws.values() for draw in drawn)
    assert abs(spent - budget) < 10 * 150 / 2 + 100
    assert any(draw.visible for drawn in draws.values() for draw in drawn)
    assert not any(draw.visible for drawn in draws.values() for draw in drawn[:-1])


def test_a_round_that_was_cut_short_is_finished_first() -> None:
    draws = {
        1: [line(1, "one_call"), line(1, "best_of_n", draw=2)],
        2: [line(2, "one_call", visible=True)],
        3: [line(3, "one_call")],
    }
    assert best_of_n.next_round(draws, budget_tokens=0) == (3,)


def test_draws_end_where_no_token_is_counted_and_where_every_problem_is_done() -> None:
    assert best_of_n.next_round({1: [line(1, "one_call", tokens=0)]}, 0) == ()
    assert best_of_n.next_round({1: [line(1, "one_call", visible=True)]}, 1_000_000) == ()
    many = [line(1, "best_of_n") for _ in range(best_of_n.MAX_DRAWS)]
    assert best_of_n.next_round({1: many}, 1_000_000) == ()


# --- the lines ---


def test_a_rerun_finds_what_is_there_and_asks_for_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines.jsonl"
    with Lines(path, SETUP) as lines:
        lines.add(line(1, "one_call", code="x = 'é'"))
        lines.add(line(2, "loop", path=("qa.pass",)))
    with Lines(path, SETUP) as lines:
        assert lines.of("one_call") == {1: line(1, "one_call", code="x = 'é'")}
        assert missing((1, 2, 3), lines.of("loop")) == (1, 3)
        lines.add(line(1, "best_of_n", draw=3))
        lines.add(line(1, "best_of_n", draw=2))
        assert [draw.draw for draw in lines.draws()[1]] == [1, 2, 3]
    assert len(path.read_bytes().splitlines()) == 5


def test_a_line_that_was_cut_by_a_kill_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    with Lines(path, SETUP) as lines:
        lines.add(line(1, "loop"))
        lines.add(line(2, "loop"))
    path.write_bytes(path.read_bytes()[:-9])
    with Lines(path, SETUP) as lines:
        assert missing((1, 2), lines.of("loop")) == (2,)
        lines.add(line(2, "loop"))
    with Lines(path, SETUP) as lines:
        assert missing((1, 2), lines.of("loop")) == ()


@pytest.mark.parametrize("name", [n for n in Setup.__struct_fields__ if n not in {"limits", "version"}])
def test_a_file_made_with_another_setting_is_refused_and_says_which(tmp_path: Path, name: str) -> None:
    path = tmp_path / "lines.jsonl"
    with Lines(path, SETUP) as lines:
        lines.add(line(1, "loop"))
    other: Any = 99 if isinstance(getattr(SETUP, name), int | float) else "other"
    with pytest.raises(RefusedError, match=f"{name} was"):
        Lines(path, msgspec.structs.replace(SETUP, **{name: other}))
    with Lines(path, SETUP) as lines:
        assert lines.of("loop")


def test_a_file_of_something_else_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("milk\n")
    with pytest.raises(RefusedError, match="not a file of this measure"):
        Lines(path, SETUP)
    assert path.read_text() == "milk\n"


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    with Lines(path, SETUP), pytest.raises(RefusedError, match="another run"):
        Lines(path, SETUP)


# --- the settings ---


def test_one_llm_serves_every_role_of_the_loop() -> None:
    packaged = configuration.load(None)
    embedded = packaged.llms["embedded"]
    profile = packaged.profiles["developer"]
    roles = {name: msgspec.structs.replace(role, llm="embedded") for name, role in profile.roles.items()}
    two = msgspec.structs.replace(
        packaged,
        llms={"embedded": embedded, "other": msgspec.structs.replace(embedded, toggle=False)},
        profiles={"developer": msgspec.structs.replace(profile, roles=roles)},
    )
    with pytest.raises(RefusedError, match="one of: embedded, other"):
        setup.with_one_llm(two, None)
    name, found = setup.with_one_llm(two, "other")
    assert name == "other"
    assert list(found.llms) == ["other"]
    assert found.llms["other"].toggle
    assert {role.llm for role in found.profiles["developer"].roles.values()} == {None}


def test_what_a_line_depends_on_has_a_name_that_changes_with_it() -> None:
    _, settings = setup.with_one_llm(configuration.load(None), None)
    profile = settings.profiles["developer"]
    warmer = msgspec.structs.replace(profile.roles["debug"], temperature=0.9)
    changed = msgspec.structs.replace(
        settings,
        profiles={"developer": msgspec.structs.replace(profile, roles={**profile.roles, "debug": warmer})},
    )
    one, other = setup.profile_of(settings, None), setup.profile_of(changed, None)
    assert setup.profile_sha256(one) == setup.profile_sha256(setup.profile_of(settings, None))
    assert setup.profile_sha256(one) != setup.profile_sha256(other)
    assert setup.warmest(changed) == 0.9
    assert setup.limits_of(one, 3) == msgspec.structs.replace(settings.limits, calls=3)
    assert setup.limits_of(one, None) == settings.limits


def test_arms_are_told_in_one_order_and_an_unknown_one_is_refused() -> None:
    assert parsed(["--out", "x", "--arms", "loop,best_of_n"]).arms == ("best_of_n", "loop")
    with pytest.raises(SystemExit):
        parsed(["--out", "x", "--arms", "two_calls"])


# --- the figures ---


def test_the_interval_of_a_ratio_is_paired() -> None:
    # The loop solves what one call solves and as much again: every resample says so in pairs.
    one = column("one_call", "x" * 30 + "." * 170)
    twice = column("loop", "x" * 60 + "." * 140)
    paired = summary(one_call=one, loop=twice).loop_to_one_call
    apart = summary(one_call=one, loop=list(reversed(twice))).loop_to_one_call
    assert paired is not None and apart is not None
    assert paired.value == apart.value == 2.0
    assert None not in (paired.low, paired.high, apart.low, apart.high)
    assert 1.4 < (paired.low or 0) < 2.0 < (paired.high or 0) < 3.0
    assert (apart.high or 0) - (apart.low or 0) > 1.2 * ((paired.high or 0) - (paired.low or 0))


def test_the_interval_of_a_share_is_the_binomials() -> None:
    share = summary(one_call=column("one_call", "x." * 200)).arms["one_call"].share
    assert share.value == 0.5
    assert share.low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.008)
    assert share.high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.008)


def test_the_same_lines_and_seed_give_the_same_intervals() -> None:
    columns = {"one_call": column("one_call", "x.x."), "loop": column("loop", "xx..")}
    assert summary(**columns) == summary(**columns)


def test_a_ratio_to_nothing_has_no_value_and_misses_no_target() -> None:
    found = summary(one_call=column("one_call", "...."), loop=column("loop", "x..."))
    assert found.loop_to_one_call is not None
    assert found.loop_to_one_call.value is None
    assert "loop to one_call: nothing to compare with" in table(found)
    assert "loop_to_one_call" not in {figure.name for figure in found.figures}
    assert msgspec.json.decode(msgspec.json.encode(found), type=Summary) == found


def test_what_the_loop_solves_and_what_it_stands_by_are_told_apart() -> None:
    lines = [
        line(0, "loop", visible=True, right=True, completed=True, ended="completed"),
        line(1, "loop", visible=True, right=True, first_right=True, ended="max_debug"),
        line(2, "loop", visible=True, completed=True, first_right=True, ended="completed"),
        line(3, "loop", past_limit=True, calls=17, ended="budget_calls"),
    ]
    found = summary(loop=lines)
    loop = found.arms["loop"]
    assert (loop.solved, loop.completed, loop.false_accepts) == (2, 2, 1)
    assert (found.first_right, found.got_worse, found.right_but_failed) == (2, 1, 1)
    assert (found.past_limit, loop.calls, loop.most_calls) == (1, 5.0, 17)
    assert found.ended == {"completed": 2, "max_debug": 1, "budget_calls": 1}
    kept = {figure.name: figure.kept for figure in found.figures}
    assert kept == {"false_accepts": False, "got_worse": False, "mean_calls": True, "past_limit": False}


def test_the_loop_has_to_solve_more_than_best_of_n_not_as_many() -> None:
    same = summary(best_of_n=column("best_of_n", "xx.."), loop=column("loop", "..xx"))
    more = summary(best_of_n=column("best_of_n", "xx.."), loop=column("loop", ".xxx"))
    assert [figure.kept for figure in same.figures if figure.name == "loop_to_best_of_n"] == [False]
    assert [figure.kept for figure in more.figures if figure.name == "loop_to_best_of_n"] == [True]


def test_the_table_tells_every_arm_and_every_target() -> None:
    found = summary(
        one_call=column("one_call", "x..."),
        best_of_n=column("best_of_n", "xx..", tokens=900, calls=9),
        loop=column("loop", "xxx.", tokens=1000, calls=4, ended="completed"),
    )
    told = table(found)
    assert "| | one_call | best_of_n | loop |" in told
    assert "| solved | 1 of 4 | 2 of 4 | 3 of 4 |" in told
    assert "| tokens a problem | 100 | 900 | 1000 |" in told
    assert "| false accepts |  | 0 of 2 (0.0 %) | 0 of 3 (0.0 %) |" in told
    assert "loop to one_call: 3.00 x (95 % interval" in told
    assert "loop to best_of_n: 1.50 x (95 % interval" in told
    assert told.count("target") == len(found.figures) == 5
    assert "tiny" in told and "a CPU" in told


def test_the_plot_is_an_svg_whose_bars_end_where_the_axis_says() -> None:
    found = summary(one_call=column("one_call", "x..."), loop=column("loop", "xx.."))
    root = ElementTree.fromstring(svg(found))
    bars = [e for e in root.iter() if "bar" in e.get("class", "").split()]
    ends = [float(bar.get("x", 0)) + float(bar.get("width", 0)) for bar in bars]
    at = {e.text: float(e.get("x", 0)) for e in root.iter() if (e.text or "").endswith(" %")}
    one_percent = (at["80 %"] - at["40 %"]) / 40
    assert ends[0] == pytest.approx(at["40 %"] - 15 * one_percent, abs=0.2)
    assert ends[1] == pytest.approx(at["40 %"] + 10 * one_percent, abs=0.2)
    texts = " ".join(e.text or "" for e in root.iter())
    assert "1 solved" in texts and "2 solved" in texts
    few = summary(one_call=column("one_call", "x" + "." * 99))
    last = [e for e in ElementTree.fromstring(svg(few)).iter() if (e.text or "").endswith(" %")][-1]
    assert (last.text, float(last.get("x", 0))) == ("5 %", at["100 %"])
    nothing = summary(one_call=column("one_call", "...."))
    assert ElementTree.fromstring(svg(nothing)).tag.endswith("svg")
