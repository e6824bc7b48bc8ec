"""Searching for kinds of candidates and settings: held-out divergence decides, the clock leaves
out, nothing ends worse than its start.
"""

import itertools
from copy import deepcopy
from dataclasses import replace

import pytest
from support.models import read_json
from support.processes import interrupted
from support.recipes import recipe, tensors

from compressor.allocation import decompose
from compressor.errors import BudgetError, ConfigError, NumericalError
from compressor.pipeline import build, search, sequential_solve, stages, train
from compressor.pipeline import job as jobs
from compressor.pipeline import run as pipeline
from compressor.recipe.load import load_recipe
from compressor.recipe.quantities import seconds_of
from compressor.recipe.training import Heal
from compressor.reporting.report import searched
from compressor.resume.store import NOWHERE
from compressor.runtime import deadline as clock
from compressor.runtime.deadline import Clock, OutOfTime, paced
from compressor.runtime.progress import silent
from compressor.runtime.stopwatch import Stopwatch
from compressor.training.step_budget import Pace

KINDS = "method=[{candidates: [{name: low_rank}, {name: sparse, options: {step: 0.05}}]}]"
SETTINGS = (
    "allocation.search=[{allocation.depth_bias: 3.0}, {method.0.candidates.0.options.shrink_gram: "
    "0.5}]"
)


@pytest.fixture
def run(tiny_llama, text_file, tmp_path):
    def compress(*overrides: str, output: str = "out", **options):
        found = pipeline.compress(
            recipe(tiny_llama, text_file, *overrides), tmp_path / output, **options
        )
        return tmp_path / output, found, read_json(tmp_path / output / "plan.json")

    return compress


def test_what_lowers_the_heldout_divergence_stays_and_the_report_says_what_was_tried(run):
    _, report, plan = run(KINDS, SETTINGS, "allocation.keep=0.5")
    trials = plan["search"]["trials"]
    assert [(one["candidates"], one["settings"]) for one in trials[:2]] == [
        (["low_rank"], []),
        (["low_rank", "sparse"], []),
    ]
    assert [len(one["settings"]) for one in trials[2:]] in ([1, 1], [1, 2])
    best = float("inf")
    for one in trials:
        assert one["kept"] == (one["heldout"] < best)
        best = min(best, one["heldout"])
    kept = [one for one in trials if one["kept"]]
    assert plan["search"]["settings"] == kept[-1]["settings"] and plan["search"][
        "heldout"
    ] == best == min(plan["contest"].values())
    assert (
        report["heldout"]["kl"] == pytest.approx(best, rel=1e-2, abs=1e-7)
        and report["search"] == plan["search"]
    )
    assert f"of 3 trials {len(kept) - 1} stayed" in searched(report)


@pytest.mark.slow
def test_the_plan_alone_builds_what_the_search_chose(run):
    training = [
        "calibration.sequential=true",
        "calibration.anchor=0.5",
        "repair.enabled=true",
        "repair.steps=12",
        "repair.check=4",
    ]
    first, _, plan = run(KINDS, SETTINGS, "allocation.keep=0.5", *training)
    assert plan["search"]["settings"] or plan["search"]["kinds"] != [0]
    assert (
        plan["search"]["in order"]["kept"]
        and plan["trained"]["repair"]["kept"]
        and plan["search"]["final"]["kept"]
    )
    for former, output in (("out", "again"), ("again", "once more")):
        again, _, other = run(
            KINDS,
            SETTINGS,
            "allocation.keep=0.5",
            *training,
            output=output,
            plan=first.parent / former / "plan.json",
        )
        assert tensors(first) == tensors(again) and other["search"] == plan["search"]


def test_numbers_that_fail_drop_a_trial_and_solving_in_order_but_not_the_start(run, monkeypatch):
    real, calls = search.allocate, itertools.count()

    def fail(*given, **options):
        raise NumericalError("the Gram is singular")

    monkeypatch.setattr(
        search,
        "allocate",
        lambda *given, **options: (fail if next(calls) else real)(*given, **options),
    )
    monkeypatch.setattr(sequential_solve, "finish", fail)
    _, report, plan = run(
        KINDS, "allocation.search=[]", "allocation.keep=0.5", "calibration.sequential=true"
    )
    found = plan["search"]
    assert [one.get("dropped") for one in found["trials"]] == [None, "the Gram is singular"]
    assert "of 1 trials 0 stayed, 1 were dropped" in searched(report)
    assert found["in order"] == {"heldout": None, "kept": False, "dropped": "the Gram is singular"}
    monkeypatch.setattr(search, "allocate", fail)
    with pytest.raises(NumericalError, match="singular"):
        run("allocation.search=[]", "allocation.keep=0.5", output="none")


def test_training_whose_numbers_fail_is_dropped_from_a_search_alone(run, monkeypatch):
    def fail(*given):
        raise NumericalError("heal: the loss is nan at step 1")

    plain, _, _ = run("allocation.search=[]", "allocation.keep=0.5")
    monkeypatch.setattr(train, "fit", fail)
    made, report, plan = run(
        "allocation.search=[]", "allocation.keep=0.5", "heal.enabled=true", output="dropped"
    )
    assert (
        plan["trained"]["heal"]["dropped"] == "heal: the loss is nan at step 1"
        and not report["trained"]["heal"]["kept"]
    )
    assert tensors(made) == tensors(plain)
    with pytest.raises(NumericalError, match="step 1"):
        run("allocation.keep=0.5", "heal.enabled=true", output="none")


def test_kinds_have_two_thirds_of_what_the_start_leaves_settings_half_and_all_of_no_budget(
    run, monkeypatch
):
    given = []
    monkeypatch.setattr(
        search, "paced", lambda progress, seconds: given.append(seconds) or progress
    )
    run(KINDS, "allocation.search=[]", "allocation.keep=0.5")
    assert given == [float("inf")] * 2
    given.clear()
    monkeypatch.setattr(Clock, "left", 90.0)
    run(
        KINDS,
        "allocation.search=[{allocation.depth_bias: 3.0}]",
        "allocation.keep=0.5",
        "budget=1h",
        output="limited",
    )
    assert given == [float("inf"), pytest.approx(60), pytest.approx(45)]


def test_a_kind_that_cannot_meet_the_size_alone_is_joined_by_one_that_can(run):
    half = (
        "method=[{candidates: [{name: sparse, options: {pattern: '2:4'}}, {name: low_rank}], "
        "dense: false}]"
    )
    _, _, plan = run(half, "allocation.search=[]", "allocation.keep=0.4")
    assert [one["heldout"] is None for one in plan["search"]["trials"]] == [True, False]
    with pytest.raises(BudgetError, match="least"):
        run(
            half.replace(", {name: low_rank}", ""),
            "allocation.search=[]",
            "allocation.keep=0.4",
            output="none",
        )


def test_without_time_a_search_ends_with_what_it_starts_from(run, monkeypatch):
    monkeypatch.setattr(Clock, "left", 0.0)
    made, _, plan = run(
        KINDS, SETTINGS, "allocation.keep=0.5", "calibration.sequential=true", "budget=1s"
    )
    assert [one["heldout"] is None for one in plan["search"]["trials"]] == [False, True, True, True]
    assert plan["search"]["in order"] == {"heldout": None, "kept": False, "dropped": "no time"}
    plain, _, _ = run("allocation.keep=0.5", output="plain")
    assert tensors(made) == tensors(plain)


def test_solving_in_order_is_not_begun_where_its_passes_take_longer_than_it_may(run, monkeypatch):
    monkeypatch.setattr(jobs, "seconds_per_token", lambda job: 1.0)
    monkeypatch.setattr(
        Clock, "left", 2.4 * 8 * 32 / 0.3
    )  # 2.5 comparisons of the calibration windows
    monkeypatch.setattr(sequential_solve, "finish", lambda *given: pytest.fail("begun"))
    _, _, plan = run(
        "allocation.search=[]", "allocation.keep=0.5", "calibration.sequential=true", "budget=1h"
    )
    assert plan["search"]["in order"] == {"heldout": None, "kept": False, "dropped": "no time"}


@pytest.mark.parametrize(("share", "share_of_gate"), [("", 1), ("gate_up", 2)])
def test_what_solving_takes_is_known_from_the_largest_linear(
    tiny_llama, text_file, monkeypatch, share, share_of_gate
):
    method = (
        f"method=[{{dense: false, candidates: [{{name: cospadi, share: [{share}], options: "
        f"{{solver: fast}}}}]}}]"
    )
    made = recipe(tiny_llama, text_file, method, "allocation={kind: uniform, keep: 0.6}")
    job = jobs.start(made, jobs.open_source(str(tiny_llama), None))
    stats = stages.statistics(job)
    start = search.allocate(job, stats, Stopwatch())
    monkeypatch.setattr(sequential_solve.time, "monotonic", itertools.count().__next__)
    sizes = {name: one.parameters for name, one in job.assignments.items()}
    expected = sum(sizes.values()) / (share_of_gate * max(sizes.values()))
    assert sequential_solve.in_order(
        job, start.plan, start.modules, start.found, stats, None, NOWHERE
    ).seconds() == pytest.approx(expected)


def test_solving_in_order_stays_where_it_helps(run):
    _, report, plan = run(
        "allocation.search=[]",
        "allocation.keep=0.5",
        "calibration.sequential=true",
        "calibration.anchor=0.5",
    )
    found = plan["search"]["in order"]
    assert found["kept"] == (found["heldout"] < plan["search"]["heldout"])
    assert (
        any(choice["sequential"] is not None for choice in plan["linears"].values())
        == found["kept"]
    )
    assert report["heldout"]["kl"] == pytest.approx(
        min(found["heldout"], plan["search"]["heldout"]), rel=3e-2, abs=1e-7
    )


def test_an_outcome_that_is_worse_than_its_start_is_not_written(run, monkeypatch):
    def spoil(job, plan, modules, found, progress, again):
        modules = deepcopy(modules)
        for module in modules.values():
            module.up.mul_(0.5)
        return replace(plan, trained={"heal": {"kept": True, "steps": 1}}), modules

    plain, _, _ = run("allocation.search=[]", "allocation.keep=0.5")
    monkeypatch.setattr(train, "recover", spoil)
    made, _, plan = run(
        "allocation.search=[]", "allocation.keep=0.5", "heal.enabled=true", output="spoiled"
    )
    assert (
        not plan["search"]["final"]["kept"]
        and plan["search"]["final"]["heldout"] > plan["search"]["heldout"]
    )
    assert plan["trained"] == {"heal": {"kept": False, "steps": 1}} and tensors(made) == tensors(
        plain
    )
    sets, path = (
        ["allocation.search=[]", "allocation.keep=0.5", "heal.enabled=true"],
        made / "plan.json",
    )
    again, _, plan = run(*sets, output="again", plan=path)
    assert plan["trained"] == {} and tensors(again) == tensors(plain)


@pytest.mark.slow
def test_a_stopped_search_goes_on_with_its_decisions(run):
    whole, _, expected = run(KINDS, SETTINGS, "allocation.keep=0.5", "budget=1h")
    with interrupted(search, "allocate", 3):
        run(KINDS, SETTINGS, "allocation.keep=0.5", "budget=1h", output="stopped")
    made, _, plan = run(KINDS, SETTINGS, "allocation.keep=0.5", "budget=1h", output="stopped")
    assert plan == expected and tensors(made) == tensors(whole)


def test_a_stage_that_would_last_too_long_is_dropped_when_it_shows(monkeypatch):
    now = itertools.count()
    monkeypatch.setattr(clock.time, "monotonic", lambda: float(next(now)))
    assert list(paced(silent, 100.0)(range(8), "short")) == [*range(8)]
    for items, total, most in (
        (range(80), None, 10),
        (iter(range(80)), 80, 10),
        (iter(range(80)), None, 50),
    ):
        taken = []
        with pytest.raises(OutOfTime):
            for item in paced(silent, 50.0)(items, "long", total):
                taken.append(item)
        assert most - 2 <= len(taken) <= most


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400)])
def test_durations(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["budget=10", SETTINGS], "budget must be a time with its unit"),
        (
            ["budget=10m"],
            "--set budget=10m: budget is the time for allocation.search, repair and heal",
        ),
        (
            ["allocation.search=[{allocation.keep: 0.5}]"],
            r"--set allocation.search=.*: allocation.search cannot set 'allocation.keep'",
        ),
        (
            ["allocation.search=[]", "allocation.damage=two_sided"],
            "needs allocation.kind 'knapsack' and allocation.damage 'fisher_probe' or 'kl_probe'",
        ),
        (["allocation.search=[]", "compensation.keep=0.1"], "list residual ranks"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(None, overrides)


def test_settings_that_do_not_exist_are_refused_before_anything_is_collected(run, monkeypatch):
    monkeypatch.setattr(build, "plan_and_build", None)
    with pytest.raises(
        ConfigError,
        match=r"allocation.search.0: there is no 'allocation.depth_biass'.*did you mean",
    ):
        run("allocation.search=[{allocation.depth_biass: 5}]")
    with pytest.raises(ConfigError, match="shrink_gran"):
        run("allocation.search=[{method.0.candidates.0.options.shrink_gran: 5}]")


def test_settings_that_do_not_exist_are_refused_before_statistics_are_read(
    run, tiny_llama, text_file, tmp_path, monkeypatch
):
    pipeline.calibrate(recipe(tiny_llama, text_file), tmp_path / "stats")
    monkeypatch.setattr(pipeline, "plan_and_build", lambda *given: pytest.fail("begun"))
    late = (
        "allocation.search=[{allocation.depth_bias: 3.0}, "
        "{method.0.candidates.0.options.shrink_gran: 5}]"
    )
    with pytest.raises(ConfigError, match="shrink_gran"):
        run(late, stats=tmp_path / "stats")
    with pytest.raises(ConfigError, match="shrink_gran"):
        pipeline.plan(recipe(tiny_llama, text_file, late), stats=tmp_path / "stats")


@pytest.fixture
def planned(tiny_llama, text_file, tmp_path, monkeypatch):
    """Plan with statistics; the outline, and the linears that were decomposed, a name for each
    method.
    """

    def plan(*overrides: str):
        names, real, made = [], decompose._prepare, recipe(tiny_llama, text_file, *overrides)
        monkeypatch.setattr(
            decompose,
            "_prepare",
            lambda method, name, inputs: (names.append(name), real(method, name, inputs))[1],
        )
        pipeline.calibrate(made, tmp_path / "stats")
        found = pipeline.plan(made, stats=tmp_path / "stats")
        assert [path.name for path in tmp_path.iterdir()] == ["stats"]
        return found, names

    return plan


def test_trials_of_a_plan_share_decompositions_and_nothing_is_solved_in_order(planned, monkeypatch):
    monkeypatch.setattr(sequential_solve, "finish", lambda *given: pytest.fail("begun"))
    found, names = planned(
        KINDS, "allocation.search=[{allocation.depth_bias: 3.0}]", "calibration.sequential=true"
    )
    assert len(names) == 2 * len(set(names)) == 2 * len(found["linears"])


def test_a_plan_keeps_to_the_budget(planned, monkeypatch):
    monkeypatch.setattr(
        Clock, "left", property(lambda clock: 0.0 if clock.limited else float("inf"))
    )
    found, names = planned(KINDS, "allocation.search=[]", "budget=1s")
    assert len(names) == len(set(names)) and {linear["method"] for linear in found["linears"]} <= {
        "low_rank",
        "dense",
    }


HEALING = [
    "heal.enabled=true",
    "heal.steps=40",
    "heal.check=10",
    "heal.batch_size=2",
    "repair.enabled=true",
    "repair.steps=4",
    "repair.check=2",
]


def test_training_takes_the_steps_that_the_budget_has_room_for(run, monkeypatch):
    monkeypatch.setattr(train, "timed", lambda loss, look: Pace(step=1.0, look=5.0))
    monkeypatch.setattr(
        Clock, "left", 45.0
    )  # of 0.85 · 45 a third for repair: 2 of 5 seconds; heal: 21 of 1.75
    _, _, plan = run("allocation.keep=0.5", *HEALING, "budget=1h")
    assert [block["steps"] for block in plan["trained"]["repair"]["blocks"]] == [2, 2]
    assert plan["trained"]["heal"]["steps"] == 21
    monkeypatch.setattr(Clock, "left", 0.0)
    bare, _, plan = run("allocation.keep=0.5", *HEALING, "budget=1h", output="bare")
    assert [plan["trained"][stage]["steps"] for stage in ("repair", "heal")] == [0, 0]
    plain, _, _ = run("allocation.keep=0.5", output="plain")
    assert tensors(bare) == tensors(plain)


def test_time_for_writing_and_evaluation_is_kept_back_and_training_that_could_not_begin_is_left_out(
    run, monkeypatch
):
    monkeypatch.setattr(jobs, "seconds_per_token", lambda job: 1.0)
    held = []
    monkeypatch.setattr(Clock, "hold", lambda clock, seconds: held.append(seconds))
    monkeypatch.setattr(Clock, "left", 1.5 * 12 * 32)
    monkeypatch.setattr(train, "blocks", None)
    _, _, plan = run("allocation.keep=0.5", *HEALING, "budget=1h")
    assert held == [
        pytest.approx(1.3 * (12 + 6) * 32 + 5)
    ]  # calibration and held-out windows, and those to evaluate on
    assert plan["trained"] == {
        "repair": {"kept": False, "steps": 0},
        "heal": {"kept": False, "steps": 0},
    }


def test_a_clock_counts_down_to_what_is_kept_back(monkeypatch):
    now = itertools.count()
    monkeypatch.setattr(clock.time, "monotonic", lambda: float(next(now)))
    limited = Clock(10)
    assert limited.limited and limited.left == 9
    limited.hold(5)
    assert limited.left == 3 and [limited.left for _ in range(4)][-1] == 0
    assert not Clock().limited and Clock().left == float("inf")


@pytest.mark.slow
def test_a_budget_with_room_for_everything_changes_nothing(run):
    free, _, _ = run("allocation.keep=0.5", *HEALING)
    timed, _, plan = run("allocation.keep=0.5", *HEALING, "budget=10h", output="timed")
    assert plan["trained"]["heal"]["steps"] == 40 and tensors(free) == tensors(timed)


def test_the_pace_leaves_room_for_looks():
    pace = Pace(step=2.0, look=10.0)
    section = Heal(steps=100, check=20, batch_size=4)
    assert pace.steps(section, 1e9, 4) == 100
    assert (
        pace.steps(section, 30 * (2.5 + 0.5), 4) == 30
        and pace.steps(section, 30 * (5 + 0.5), 2) == 30
    )
    assert pace.steps(section, 19 * (2.5 + 0.5), 4) == 0
