"""Runs that are solved in order and repaired: each block behind repaired ones, settings and sizes
as planned, the same bytes again.
"""

from functools import partial

import pytest
import torch
from support.activations import windows
from support.blocks import DOWN, SECTION, dictionary, repaired
from support.jobs import built, received
from support.models import read_json, tiny_model
from support.modules import low_rank
from support.processes import contents
from support.recipes import recipe
from support.sameness import is_same_output

from compressor import linalg
from compressor.calibrate.streams import solve_block, solve_in_order
from compressor.models.install import installed
from compressor.models.linears import linears
from compressor.pipeline import job as jobs
from compressor.pipeline import run as pipeline
from compressor.pipeline import sequential_solve, stages
from compressor.pipeline.solution import allocate
from compressor.pipeline.train import training
from compressor.resume import store
from compressor.training.repair import repair_blocks

LATE = DOWN.replace("0", "1")
QUICK = [
    f"repair.{key}"
    for key in ("enabled=true", "steps=12", "check=4", "learning_rate=0.01", "batch_size=2")
]
SETS = ["allocation.keep=0.5", "calibration.sequential=true", "output.dtype=bfloat16", *QUICK]


def test_each_block_is_solved_behind_repaired_ones_and_the_head_behind_all():
    model, seen, now = tiny_model("llama"), {}, {}
    infos = {
        name: info
        for name, info in linears(model, ["*down_proj", "lm_head"]).items()
        if name.endswith(("down_proj", "lm_head"))
    }
    modules = {
        name: low_rank(info.module.weight.detach(), None, 8, False) for name, info in infos.items()
    }

    def solve(names, stats):
        seen.update(dict.fromkeys(names, stats))
        return {name: modules[name] for name in names}

    def block(streams):
        here = {name: info for name, info in infos.items() if info.block == streams.block}
        return solve_block(streams, here, dict.fromkeys(infos, frozenset({"sum"})), True, solve)

    batches = list(windows().split(2))
    with training(model):
        final, outcomes = repair_blocks(
            model, {}, dtypes(model, modules), (batches, batches), SECTION, 0, solve=block
        )
        assert [outcome.block for outcome in outcomes] == [0, 1] and all(
            one.after < one.before for one in outcomes
        )
        assert (
            seen[DOWN] is None
            and final.keys() == modules.keys()
            and final["lm_head"] is modules["lm_head"]
        )
        for name, before in {LATE: [DOWN], "lm_head": [DOWN, LATE]}.items():
            dense = received(model, name, windows())
            with installed(model, {each: final[each] for each in before}):
                x = received(model, name, windows())
            torch.testing.assert_close(seen[name].gram, x.T @ x, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(seen[name].cross_gram, dense.T @ x, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(seen[name].sum, x.sum(0), rtol=1e-5, atol=1e-3)
            now[name] = seen[name].gram
        solve_in_order(model, infos, batches, dict.fromkeys(infos, frozenset()), True, solve)
    assert all((seen[name].gram - gram).norm() > 1e-3 * gram.norm() for name, gram in now.items())


def dtypes(model, modules):
    found = {name: parameter.dtype for name, parameter in model.named_parameters()}
    return found | {
        f"{name}.{key}": p.dtype
        for name, module in modules.items()
        for key, p in module.named_parameters()
    }


def test_atoms_that_a_later_block_borrows_are_the_repaired_ones_and_those_of_the_plan_stay():
    model = tiny_model("llama")
    whole = dictionary(
        torch.cat([model.get_submodule(name).weight.detach() for name in (DOWN, LATE)]), None
    )
    modules = whole.split({DOWN: 32, LATE: 32})
    blocks = iter([{DOWN: modules[DOWN]}, {LATE: modules[LATE]}, {}])
    with training(model):
        sections = (([windows()], [windows()]), SECTION, 0)
        final, _ = repair_blocks(
            model, {}, dtypes(model, modules), *sections, solve=lambda streams: next(blocks)
        )
    given, _ = repaired(model, modules)
    for found in (final, given):
        assert (
            found[LATE].lent is found[DOWN] is not modules[DOWN]
            and modules[LATE].lent is modules[DOWN]
        )
        assert torch.equal(found[LATE].lent.atoms, found[DOWN].atoms) and not torch.equal(
            found[DOWN].atoms, modules[DOWN].atoms
        )
    assert all(is_same_output(final[name].to_dense(), given[name].to_dense()) for name in modules)


@pytest.fixture(scope="module")
def run(tiny_llama, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("in order") / "out"
    made = recipe(tiny_llama, text_file, *SETS)
    return made, folder, pipeline.compress(made, folder)


def test_settings_and_sizes_are_those_of_the_plan(run, tiny_llama, text_file, tmp_path):
    _, folder, report = run
    plain = pipeline.compress(
        recipe(tiny_llama, text_file, *SETS, "repair.enabled=false", "evaluation.enabled=false"),
        tmp_path / "plain",
    )
    plan, before = (read_json(path / "plan.json") for path in (folder, tmp_path / "plain"))
    done = plan["trained"]["repair"]
    assert (
        done["kept"]
        and done["after"]["heldout"] < done["before"]["heldout"]
        and report["kept"] == plain["kept"]
    )
    assert len(done["blocks"]) == 2 and all(
        block["after"] < block["before"] for block in done["blocks"]
    )
    for name, choice in plan["linears"].items():
        assert [choice[key] for key in ("method", "setting", "bits")] == [
            before["linears"][name][key] for key in ("method", "setting", "bits")
        ]
    solved = [choice for choice in plan["linears"].values() if choice["sequential"]]
    assert solved and all(choice["sequential"] == {"anchor_damping": 0.01} for choice in solved)


def test_the_plan_has_the_dampings_of_the_solves_that_are_kept(tiny_llama, text_file, monkeypatch):
    calls, real = [], linalg.drift
    monkeypatch.setattr(
        linalg, "drift", lambda *args: (real(*args)[0], float(calls.append(None) or len(calls)))
    )
    job = jobs.start(recipe(tiny_llama, text_file, *SETS), jobs.open_source(str(tiny_llama), None))
    plan, _ = built(job)
    took = [
        choice.sequential["anchor_damping"] for choice in plan.linears.values() if choice.sequential
    ]
    assert (
        plan.trained["repair"]["kept"] and max(took) == len(calls) and min(took) > len(calls) / 2
    )  # of the second of two rounds


def test_a_stopped_run_goes_on_to_the_same_bytes(run, tmp_path, monkeypatch):
    made, folder, _ = run
    real = store._write

    def write(kind, path, *args):
        real(path, *args)
        if path.name.startswith(kind):
            raise KeyboardInterrupt

    for kind in ("repair", "solved"):  # of the first block, and of the second in the same pass
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(store, "_write", partial(write, kind))
            pipeline.compress(made, tmp_path / "out")
    pieces = [
        path.name.partition("-")[0] for path in (tmp_path / "out.journal" / "store").iterdir()
    ]
    assert (pieces.count("repair"), pieces.count("solved")) == (1, 4)
    pipeline.compress(made, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(folder)


def test_what_does_not_help_on_held_out_windows_leaves_the_solved_run(tiny_llama, text_file):
    few = [
        "calibration.windows=10",
        "calibration.length=2",
        "calibration.heldout=9",
        "allocation.keep=0.8",
        "allocation.damage=two_sided",
    ]
    sets = [
        "calibration.sequential=true",
        "calibration.anchor=0",
        "repair.enabled=true",
        "repair.steps=40",
        "repair.learning_rate=0.2",
    ]
    job = jobs.start(
        recipe(tiny_llama, text_file, *few, *sets, "repair.check=40"),
        jobs.open_source(str(tiny_llama), None),
    )
    plan, modules = built(job)
    solved = sequential_solve.solve_in_order(allocate(job, stages.statistics(job)))
    expected = solved.modules
    assert not plan.trained["repair"]["kept"] and modules.keys() == expected.keys()
    assert all(
        is_same_output(modules[name].to_dense(), module.to_dense())
        for name, module in expected.items()
    )
    assert all(
        plan.linears[name].sequential == choice.sequential
        for name, choice in solved.plan.linears.items()
    )


@pytest.mark.parametrize(
    "method",
    [
        "[{candidates: [{name: compot, options: {rounds: 3}, share: [qkv, gate_up]}]}]",
        "[{candidates: [{name: geopair, options: {rounds: 3}}]}]",
        "[{targets: 'role:ffn', candidates: [{name: channels}]}, {candidates: [{name: low_rank}]}]",
    ],
    ids=["shared", "pairs", "modules"],
)
def test_methods(tiny_llama, text_file, method):
    sets = [f"method={method}", "allocation.keep=0.6", "calibration.sequential=true", *QUICK]
    sets += [] if "geopair" in method else ["compensation.keep=0.05"]
    job = jobs.start(recipe(tiny_llama, text_file, *sets), jobs.open_source(str(tiny_llama), None))
    plan, modules = built(job)
    done = plan.trained["repair"]["blocks"]
    assert len(done) == 2 and all(block["after"] < block["before"] for block in done)
    assert all(
        modules[name].bits() == choice.bits
        for name, choice in plan.linears.items()
        if choice.method != "dense"
    )
