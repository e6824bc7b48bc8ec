"""Searching for kinds of candidates and settings: held-out divergence decides, the clock leaves
out, nothing ends worse than its start.
"""

import itertools
from copy import deepcopy
from dataclasses import replace

import pytest
from support.jobs import built, limited
from support.models import read_json
from support.processes import interrupted
from support.recipes import recipe, tensors
from support.sameness import assert_same_tensors

from compressor.allocation import decompose
from compressor.errors import BudgetError, ConfigError, NumericalError
from compressor.pipeline import build, contest, run, search, sequential_solve, stages, train
from compressor.pipeline import job as jobs
from compressor.pipeline import run as pipeline
from compressor.pipeline.solution import Solution, allocate
from compressor.recipe.load import load_recipe
from compressor.recipe.quantities import seconds_of
from compressor.recipe.training import Heal
from compressor.reporting.report import describe_search
from compressor.resume.store import NOWHERE
from compressor.runtime.deadline import Deadline, OutOfTime
from compressor.training.step_budget import StepTimes

KINDS = "method=[{candidates: [{name: low_rank}, {name: sparse, options: {step: 0.05}}]}]"
SETTINGS = (
    "allocation.search=[{allocation.depth_bias: 3.0}, {method.0.candidates.0.options.shrink_gram: "
    "0.5}]"
)


@pytest.fixture
def compress(tiny_llama, text_file, tmp_path):
    def write(*overrides: str, output: str = "out", **options):
        found = pipeline.compress(
            recipe(tiny_llama, text_file, *overrides), tmp_path / output, **options
        )
        return tmp_path / output, found, read_json(tmp_path / output / "plan.json")

    return write


def test_what_lowers_the_heldout_divergence_stays_and_the_report_says_what_was_tried(compress):
    _, report, plan = compress(KINDS, SETTINGS, "allocation.keep=0.5")
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
    assert f"of 3 trials {len(kept) - 1} stayed" in describe_search(report)


@pytest.mark.slow
def test_the_plan_alone_builds_what_the_search_chose(compress):
    training = [
        "calibration.sequential=true",
        "calibration.anchor=0.5",
        "repair.enabled=true",
        "repair.steps=12",
        "repair.check=4",
    ]
    first, _, plan = compress(KINDS, SETTINGS, "allocation.keep=0.5", *training)
    assert plan["search"]["settings"] or plan["search"]["kinds"] != [0]
    assert (
        plan["search"]["in_order"]["kept"]
        and plan["trained"]["repair"]["kept"]
        and plan["search"]["final"]["kept"]
    )
    for former, output in (("out", "again"), ("again", "once more")):
        again, _, other = compress(
            KINDS,
            SETTINGS,
            "allocation.keep=0.5",
            *training,
            output=output,
            plan=first.parent / former / "plan.json",
        )
        assert tensors(first) == tensors(again) and other["search"] == plan["search"]


@pytest.fixture
def start(tiny_llama, text_file):
    def job(*overrides: str) -> jobs.Job:
        made = recipe(tiny_llama, text_file, *overrides)
        return jobs.start(made, jobs.open_source(str(tiny_llama), None))

    return job


def stored(modules):
    return {f"{name}.{key}": t for name, m in modules.items() for key, t in m.state_dict().items()}


def fail(*given, **options):
    raise NumericalError("the Gram is singular")


def test_numbers_that_fail_drop_a_trial_but_not_the_start(start):
    job = start(KINDS, "allocation.search=[]", "allocation.keep=0.5")
    statistics, calls = run.read_or_collect(job, None), itertools.count()

    def fail_later(*given, **options):
        return (fail if next(calls) else allocate)(*given, **options)

    found = search.search(job, statistics, fail_later).plan.search
    assert [trial.get("dropped") for trial in found["trials"]] == [None, "the Gram is singular"]
    assert "of 1 trials 0 stayed, 1 were dropped" in describe_search({"search": found})
    with pytest.raises(NumericalError, match="singular"):
        search.search(job, statistics, fail)


def searched_solution(job: jobs.Job) -> Solution:
    return search.search(job, run.read_or_collect(job, None))


def test_numbers_that_fail_drop_solving_in_order(start):
    job = start("allocation.search=[]", "allocation.keep=0.5", "calibration.sequential=true")
    solution = searched_solution(job)
    again = build.keep_order_if_better(solution, fail)
    dropped = {"heldout": None, "kept": False, "dropped": "the Gram is singular"}
    assert again.plan.search["in_order"] == dropped and again.modules is solution.modules


def test_training_whose_numbers_fail_is_dropped_from_a_search_alone(start):
    job = start("allocation.search=[]", "allocation.keep=0.5", "heal.enabled=true")
    solution = searched_solution(job)
    dropped = train.train(solution, fail)
    assert dropped.plan.trained["heal"]["dropped"] == "the Gram is singular"
    assert not dropped.plan.trained["heal"]["kept"] and dropped.modules is solution.modules
    job = start("allocation.keep=0.5", "heal.enabled=true")
    with pytest.raises(NumericalError, match="singular"):
        train.train(allocate(job, run.read_or_collect(job, None)), fail)


def test_kinds_have_two_thirds_of_what_the_start_leaves_settings_half_and_all_of_no_budget(start):
    given = []

    def note(job, statistics, measured):
        given.append(job.deadline.left)
        return allocate(job, statistics, measured)

    job = start(KINDS, "allocation.search=[]", "allocation.keep=0.5")
    search.search(job, statistics := run.read_or_collect(job, None), note)
    assert given == [float("inf")] * 2
    given.clear()
    job = start(KINDS, "allocation.search=[{allocation.depth_bias: 3.0}]", "allocation.keep=0.5")
    solution = search.search(limited(job, 90.0), statistics, note)
    assert given == [float("inf"), pytest.approx(60), pytest.approx(45)]
    assert solution.job.budget.left == 90 and not solution.job.deadline.is_limited


def test_a_kind_that_cannot_meet_the_size_alone_is_joined_by_one_that_can(compress):
    half = (
        "method=[{candidates: [{name: sparse, options: {pattern: '2:4'}}, {name: low_rank}], "
        "dense: false}]"
    )
    _, _, plan = compress(half, "allocation.search=[]", "allocation.keep=0.4")
    assert [one["heldout"] is None for one in plan["search"]["trials"]] == [True, False]
    with pytest.raises(BudgetError, match="least"):
        compress(
            half.replace(", {name: low_rank}", ""),
            "allocation.search=[]",
            "allocation.keep=0.4",
            output="none",
        )


def test_without_time_a_search_ends_with_what_it_starts_from(start):
    job = start(KINDS, SETTINGS, "allocation.keep=0.5", "calibration.sequential=true")
    plan, modules = built(replace(job, budget=Deadline(0.0)))
    assert [one["heldout"] is None for one in plan.search["trials"]] == [False, True, True, True]
    assert plan.search["in_order"] == {"heldout": None, "kept": False, "dropped": "no time"}
    _, plain = built(start("allocation.keep=0.5"))
    assert_same_tensors(stored(modules), stored(plain))


def test_solving_in_order_is_not_begun_where_its_passes_take_longer_than_it_may(start, monkeypatch):
    monkeypatch.setattr(jobs, "seconds_per_token", lambda job: 1.0)
    job = start("allocation.search=[]", "allocation.keep=0.5", "calibration.sequential=true")
    solution = searched_solution(job)
    late = 2.4 * 8 * 32 / 0.3  # 2.5 comparisons of the calibration windows
    solution = replace(solution, job=limited(solution.job, late))
    again = build.keep_order_if_better(solution, lambda *given: pytest.fail("begun"))
    dropped = {"heldout": None, "kept": False, "dropped": "no time"}
    assert again.plan.search["in_order"] == dropped


def test_solving_in_order_is_dropped_between_two_blocks_when_it_shows_to_last_too_long(start):
    job = start("allocation.keep=0.5", "calibration.sequential=true")
    solution = allocate(job, run.read_or_collect(job, None))
    now = itertools.count()
    job = replace(job, deadline=Deadline(1.5, lambda: float(next(now))))
    with pytest.raises(OutOfTime):
        sequential_solve.solve_in_order(replace(solution, job=job))


@pytest.mark.parametrize(("share", "share_of_gate"), [("", 1), ("gate_up", 2)])
def test_what_solving_takes_is_known_from_the_largest_linear(
    tiny_llama, text_file, share, share_of_gate
):
    method = (
        f"method=[{{dense: false, candidates: [{{name: cospadi, share: [{share}], options: "
        f"{{solver: fast}}}}]}}]"
    )
    made = recipe(tiny_llama, text_file, method, "allocation={kind: uniform, keep: 0.6}")
    job = jobs.start(made, jobs.open_source(str(tiny_llama), None))
    stats = stages.statistics(job)
    solution = allocate(replace(job, deadline=Deadline(None, itertools.count().__next__)), stats)
    sizes = {name: one.parameters for name, one in job.assignments.items()}
    expected = sum(sizes.values()) / (share_of_gate * max(sizes.values()))
    solver = sequential_solve.prepare_solver(solution, NOWHERE)
    assert solver.seconds() == pytest.approx(expected)


def test_solving_in_order_stays_where_it_helps(compress):
    _, report, plan = compress(
        "allocation.search=[]",
        "allocation.keep=0.5",
        "calibration.sequential=true",
        "calibration.anchor=0.5",
    )
    found = plan["search"]["in_order"]
    assert found["kept"] == (found["heldout"] < plan["search"]["heldout"])
    assert (
        any(choice["sequential"] is not None for choice in plan["linears"].values())
        == found["kept"]
    )
    assert report["heldout"]["kl"] == pytest.approx(
        min(found["heldout"], plan["search"]["heldout"]), rel=3e-2, abs=1e-7
    )


def test_an_outcome_that_is_worse_than_its_start_is_not_taken(start):
    def spoil(solution):
        modules = deepcopy(solution.modules)
        for module in modules.values():
            module.up.mul_(0.5)
        trained = {"heal": {"kept": True, "steps": 1}}
        return solution.improved(solution.plan.linears, modules).noted(trained=trained)

    job = start("allocation.search=[]", "allocation.keep=0.5", "heal.enabled=true")
    solution = searched_solution(job)
    outcome = build.finish(solution, spoil)
    final = outcome.plan.search["final"]
    assert not final["kept"] and final["heldout"] > outcome.plan.search["heldout"]
    assert outcome.plan.trained == {"heal": {"kept": False, "steps": 1}}
    assert outcome.modules is solution.modules
    again = build.plan_and_build(job, solution.statistics, outcome.plan)
    assert again.plan.trained == {}
    assert_same_tensors(stored(again.modules), stored(solution.modules))


@pytest.mark.slow
def test_a_stopped_search_goes_on_with_its_decisions(compress):
    whole, _, expected = compress(KINDS, SETTINGS, "allocation.keep=0.5", "budget=1h")
    with interrupted(contest, "choose", 3):
        compress(KINDS, SETTINGS, "allocation.keep=0.5", "budget=1h", output="stopped")
    made, _, plan = compress(KINDS, SETTINGS, "allocation.keep=0.5", "budget=1h", output="stopped")
    assert plan == expected and tensors(made) == tensors(whole)


def test_a_stage_that_would_last_too_long_is_dropped_when_it_shows(start):
    job, now = start(), itertools.count()
    clock = lambda: float(next(now))  # noqa: E731
    assert [*replace(job, deadline=Deadline(100.0, clock)).steps(range(8), "short")] == [*range(8)]
    taken = []
    with pytest.raises(OutOfTime):
        for item in replace(job, deadline=Deadline(50.0, clock)).steps(range(80), "long"):
            taken.append(item)
    assert 8 <= len(taken) <= 10


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


def test_settings_that_do_not_exist_are_refused_before_anything_is_collected(compress, monkeypatch):
    monkeypatch.setattr(build, "plan_and_build", None)
    with pytest.raises(
        ConfigError,
        match=r"allocation.search.0: there is no 'allocation.depth_biass'.*did you mean",
    ):
        compress("allocation.search=[{allocation.depth_biass: 5}]")
    with pytest.raises(ConfigError, match="shrink_gran"):
        compress("allocation.search=[{method.0.candidates.0.options.shrink_gran: 5}]")


def test_settings_that_do_not_exist_are_refused_before_statistics_are_read(
    compress, tiny_llama, text_file, tmp_path, monkeypatch
):
    pipeline.calibrate(recipe(tiny_llama, text_file), tmp_path / "stats")
    monkeypatch.setattr(pipeline, "plan_and_build", lambda *given: pytest.fail("begun"))
    late = (
        "allocation.search=[{allocation.depth_bias: 3.0}, "
        "{method.0.candidates.0.options.shrink_gran: 5}]"
    )
    with pytest.raises(ConfigError, match="shrink_gran"):
        compress(late, stats=tmp_path / "stats")
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
    monkeypatch.setattr(sequential_solve, "prepare_solver", lambda *given: pytest.fail("begun"))
    found, names = planned(
        KINDS, "allocation.search=[{allocation.depth_bias: 3.0}]", "calibration.sequential=true"
    )
    assert len(names) == 2 * len(set(names)) == 2 * len(found["linears"])


def test_a_plan_keeps_to_the_budget(planned):
    found, names = planned(KINDS, "allocation.search=[]", "budget=0.001s")
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


def test_training_takes_the_steps_that_the_budget_has_room_for(start, monkeypatch):
    monkeypatch.setattr(train, "time_step", lambda loss, look: StepTimes(step=1.0, look=5.0))
    job = start("allocation.keep=0.5", *HEALING)
    solution = allocate(job, run.read_or_collect(job, None))

    def trained(seconds):
        return train.train(replace(solution, job=limited(job, seconds)))

    # of 0.85 · 45 a third for repair: 2 of 5 seconds; heal: 21 of 1.75
    outcomes = trained(45.0).plan.trained
    assert [block["steps"] for block in outcomes["repair"]["blocks"]] == [2, 2]
    assert outcomes["heal"]["steps"] == 21
    bare = trained(0.0)
    assert [bare.plan.trained[stage]["steps"] for stage in ("repair", "heal")] == [0, 0]
    assert bare.modules is solution.modules


def test_time_for_writing_and_evaluation_is_kept_back_and_training_may_not_begin(
    start, monkeypatch
):
    monkeypatch.setattr(jobs, "seconds_per_token", lambda job: 1.0)
    monkeypatch.setattr(train, "training", None)
    # calibration and held-out windows, and those to evaluate on
    reserve = 1.3 * (12 + 6) * 32 + 5
    job = limited(start("allocation.keep=0.5", *HEALING), reserve + 1.5 * 12 * 32 - 1)
    solution = build.plan_and_build(job, run.read_or_collect(job, None))
    assert job.budget.left == pytest.approx(1.5 * 12 * 32 - 1)
    assert solution.plan.trained == {
        "repair": {"kept": False, "steps": 0},
        "heal": {"kept": False, "steps": 0},
    }


def test_a_deadline_comes_nearer_by_what_is_kept_back():
    now = itertools.count()
    deadline = Deadline(10, lambda: float(next(now)))
    assert deadline.is_limited and deadline.left == 9
    deadline.hold(5)
    assert deadline.left == 3 and [deadline.left for _ in range(4)][-1] == 0
    assert not Deadline().is_limited and Deadline().left == float("inf")


@pytest.mark.slow
def test_a_budget_with_room_for_everything_changes_nothing(compress):
    free, _, _ = compress("allocation.keep=0.5", *HEALING)
    timed, _, plan = compress("allocation.keep=0.5", *HEALING, "budget=10h", output="timed")
    assert plan["trained"]["heal"]["steps"] == 40 and tensors(free) == tensors(timed)


def test_the_pace_leaves_room_for_looks():
    pace = StepTimes(step=2.0, look=10.0)
    section = Heal(steps=100, check=20, batch_size=4)
    assert pace.affordable_steps(section, 1e9, 4) == 100
    assert (
        pace.affordable_steps(section, 30 * (2.5 + 0.5), 4) == 30
        and pace.affordable_steps(section, 30 * (5 + 0.5), 2) == 30
    )
    assert pace.affordable_steps(section, 19 * (2.5 + 0.5), 4) == 0
