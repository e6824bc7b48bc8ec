"""Linears that the calibration text says nothing about are left dense and named, by every preset,
and nothing beside them stops.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.jobs import built
from support.models import tiny_model, tiny_tokenizer
from support.modules import low_rank
from support.recipes import SMALL, recipe
from support.sameness import assert_same_tensors

from compressor.calibrate.streams import solve_in_order
from compressor.checkpoint.verify import verify
from compressor.errors import DataError
from compressor.files.documents import read_json
from compressor.linears import CompressedLinear
from compressor.pipeline import build, run, stages
from compressor.pipeline import job as jobs
from compressor.plan import DENSE
from compressor.recipe.presets import presets
from compressor.runtime.deadline import Deadline
from compressor.statistics import LinearStats, describe_dense

PRESETS = sorted(presets())
# a preset of each kind of metric and storage; the others are slow tests
OFTEN = ["default", "kfac_svd", "sparse_admm", "sparse_low_rank", "mixed", "mlorq"]
OFTEN += ["gptq_w4", "eora_24", "transact", "geopair", "modules"]
SMALLER = {  # what a preset needs on a model of two blocks of width 32
    "armor": ["allocation.keep=0.85"],
    "best": ["budget=12s"],
    "best_float": ["budget=12s"],
    "eora_w3_r64": ["method.0.candidates.0.options.residual=[4]"],
    "eora_w4_r32": ["method.0.candidates.0.options.residual=[4]"],
    "lems": ["allocation.probe.skip=0"],
    "mlorq": ["allocation.keep=0.6"],
}
ROUNDING = 1e-6  # relative to the energy: products with the Gram of one token cancel
FIRST, SECOND = "model.layers.0", "model.layers.1"
NO_TOKEN, NO_INPUT, NO_GRADIENT = (
    "no token reaches it",
    "its inputs are all zero",
    "no gradient reaches it",
)


def dead(model) -> None:
    """Whole ranges of the inputs of several linears, and hidden channels, that are always zero."""
    model.model.layers[0].input_layernorm.weight[:16] = 0
    model.model.layers[1].post_attention_layernorm.weight[8:] = 0
    model.model.layers[1].mlp.gate_proj.weight[:30] = 0


def zero(*names: str):
    """Set the weights of some modules to zero."""

    def change(model) -> None:
        for name in names:
            model.get_submodule(name).weight.zero_()

    return change


KINDS = {
    "zero gradient": zero(
        f"{SECOND}.self_attn.o_proj", f"{SECOND}.mlp.down_proj"
    ),  # a block without effect: zero weights as well
    "zero Gram": zero(f"{SECOND}.input_layernorm"),
    "dead inputs": dead,
    "zero weight": zero(f"{FIRST}.self_attn.v_proj", f"{SECOND}.mlp.up_proj"),
    "one token": lambda model: None,
}
SILENT = {  # where gradients are collected
    "zero gradient": {
        f"{SECOND}.{path}_proj": NO_GRADIENT
        for path in ("mlp.gate", "mlp.up", "self_attn.q", "self_attn.k", "self_attn.v")
    },
    "zero Gram": {f"{SECOND}.self_attn.{key}_proj": NO_INPUT for key in "qkvo"},
    "dead inputs": {},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Folder of a tiny Llama of each kind. Read only."""
    made = {}
    for kind, change in KINDS.items():
        model = tiny_model("llama")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 2 and "embed" not in name:
                    parameter.mul_(8)
            change(model)
        made[kind] = tmp_path_factory.mktemp("silent") / kind.replace(" ", "_")
        model.save_pretrained(made[kind])
        tiny_tokenizer().save_pretrained(made[kind])
    return made


def settings(kind: str, preset: str) -> list[str]:
    windows = ["calibration.windows=8", "calibration.heldout=2"]
    if kind == "one token":  # a window of two, one of which has a label
        windows = ["calibration.windows=3", "calibration.heldout=2", "calibration.length=2"]
    return [*windows, "evaluation.enabled=false", *SMALLER.get(preset, [])]


def started(folder: Path, text: Path, preset: str, *sets: str) -> jobs.Job:
    made = recipe(folder, text, *sets, config=preset)
    job = jobs.require_heldout(jobs.start(made, jobs.open_source(str(folder), None)))
    return replace(job, budget=Deadline(made.budget_seconds))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "preset",
    [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS],
)
def test_every_preset_compresses_what_the_text_speaks_of(preset, kind, folders, text_file):
    job = started(folders[kind], text_file, preset, *settings(kind, preset))
    stats = run.read_or_collect(job, None)
    solution = build.plan_and_build(job, stats)
    plan, modules = solution.plan, solution.modules
    own = {name: one.silence for name, one in stats.items() if one.silence}
    if kind in SILENT and all(one.grad_gram is not None for one in stats.values()):
        assert own == {name: reason for name, reason in SILENT[kind].items() if name in stats}
    if (
        kind == "one token"
        # queries and keys of one position have no gradient but what rounding leaves, which is the
        # processor's
    ):
        assert all(
            (name[-6], reason) in (("q", NO_GRADIENT), ("k", NO_GRADIENT))
            for name, reason in own.items()
        )
    compressed = {
        name for name, module in modules.items() if isinstance(module, CompressedLinear)
    }  # others are dense ones that learn
    assert compressed and compressed.isdisjoint(own)
    for name, choice in plan.linears.items():
        assert -ROUNDING < choice.error < float("inf")
        assert choice.reason == own.get(name) or (choice.reason or "").endswith(
            "which it is compressed with, stays dense"
        )
        assert choice.reason is None or (choice.method, choice.bits) == (DENSE, choice.dense_bits)
    stored = [tensor for module in modules.values() for tensor in module.state_dict().values()]
    assert all(tensor.isfinite().all() for tensor in stored if tensor.is_floating_point())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("preset", ["svd_llm", "gptq_w4", "modules", "geopair"])
def test_solving_in_order_goes_past_them(preset, kind, folders, text_file):
    job = started(
        folders[kind],
        text_file,
        preset,
        *settings(kind, preset),
        "calibration.sequential=true",
        "calibration.anchor=0.5",
    )
    plan, modules = built(job)
    assert modules and all(choice.error < float("inf") for choice in plan.linears.values())


def test_inputs_that_compressed_linears_silence_leave_the_modules_of_the_plan(
    folders, text_file, caplog
):
    """A linear whose inputs were not zero in the dense model, but are zero behind what was
    compressed before it.
    """
    job = started(folders["one token"], text_file, "svd_llm", *SMALL, "calibration.sequential=true")
    value, output = f"{FIRST}.self_attn.v_proj", f"{FIRST}.self_attn.o_proj"
    given = []

    def solve(names, stats):
        given.append((names, stats))
        return {
            name: low_rank(torch.zeros_like(job.model.get_submodule(name).weight), None, 2, False)
            for name in names
            if name == value
        }

    found = {name: assignment.info for name, assignment in job.assignments.items()}
    batches = list(job.calibration.tokens.split(4))
    solve_in_order(
        job.model, found, batches, dict.fromkeys(found, frozenset({"gram"})), False, solve
    )
    assert ([output], None) in given and any(stats is not None for _, stats in given)
    assert (
        f"{output}: behind the compressed linears its inputs are all zero, so it is not solved "
        "again" in caplog.messages
    )


def test_the_plan_the_report_and_a_warning_name_them(folders, text_file, tmp_path, caplog):
    folder = folders["zero gradient"]
    report = run.compress(
        recipe(folder, text_file, "evaluation.enabled=false", config="default"), tmp_path / "out"
    )
    names = sorted(SILENT["zero gradient"])
    line = f"5 linears stay dense, each because {NO_GRADIENT}: {', '.join(names)}"
    assert (
        line in caplog.messages
        and line in report["warnings"]
        and line in (tmp_path / "out" / "README.md").read_text()
    )
    chosen = read_json(tmp_path / "out" / "plan.json")["linears"]
    assert {name for name, choice in chosen.items() if choice["reason"] == NO_GRADIENT} == set(
        names
    )
    assert {one["name"] for one in report["linears"] if one["reason"]} == set(names) and verify(
        tmp_path / "out"
    ) == []
    kept = run.load(tmp_path / "out")[0].state_dict()
    dense = run.load(folder)[0].state_dict()
    assert_same_tensors(
        {name: kept[f"{name}.weight"] for name in names},
        {name: dense[f"{name}.weight"] for name in names},
    )


def test_statistics_on_disk_keep_what_never_ran(tiny_llama, text_file, tmp_path, monkeypatch):
    load = jobs.models.load

    def without_an_mlp(*arguments, **options):
        model, tokenizer = load(*arguments, **options)
        model.model.layers[1].mlp.forward = lambda x: x
        return model, tokenizer

    monkeypatch.setattr(jobs.models, "load", without_an_mlp)
    made = recipe(
        tiny_llama, text_file, "evaluation.enabled=false", "allocation.keep=0.8", config="default"
    )
    run.calibrate(made, tmp_path / "stats")
    report = run.compress(made, tmp_path / "out", stats=tmp_path / "stats")
    reasons = {one["name"]: one["reason"] for one in report["linears"] if one["reason"]}
    assert reasons == {f"{SECOND}.mlp.{key}_proj": NO_TOKEN for key in ("gate", "up", "down")}


def test_tied_linears_and_those_of_one_module_stay_dense_together(folders, text_file):
    tied = started(
        folders["zero gradient"],
        text_file,
        "default",
        "allocation.tie=[gate_up,qkv]",
        "allocation.keep=0.9",
    )
    stats = run.read_or_collect(tied, None)
    assert stages.explain_dense(tied, stats) == SILENT["zero gradient"]
    stats[f"{FIRST}.mlp.up_proj"] = replace(
        stats[f"{FIRST}.mlp.up_proj"], grad_gram=torch.zeros(48, 48, dtype=torch.float64)
    )
    found = stages.explain_dense(tied, stats)
    assert found.keys() - SILENT["zero gradient"] == {
        f"{FIRST}.mlp.up_proj",
        f"{FIRST}.mlp.gate_proj",
    }
    assert (
        found[f"{FIRST}.mlp.gate_proj"]
        == f"{FIRST}.mlp.up_proj, which it is compressed with, stays dense"
    )
    plan = build.plan_and_build(tied, stats).plan
    assert {name for name, choice in plan.linears.items() if choice.reason} == found.keys()


@pytest.mark.parametrize("kind", ["uniform", "threshold", "by_role", "d_rank"])
def test_a_fraction_that_rules_keep_is_that_of_the_others(kind, folders, text_file):
    sets = [
        "allocation.keep=0.7",
        f"allocation.kind={kind}",
        "method.0.candidates.0.options.rank_step=1",
    ]
    job = started(
        folders["zero Gram"],
        text_file,
        "svd_llm",
        *sets,
        *(["allocation.roles={q: 2}"] if kind == "by_role" else []),
    )
    plan, modules = built(job)
    others = [choice for name, choice in plan.linears.items() if name not in SILENT["zero Gram"]]
    kept = sum(choice.parameters for choice in others) / sum(
        choice.dense_parameters for choice in others
    )
    assert 0.65 < kept <= 0.7 and modules.keys().isdisjoint(SILENT["zero Gram"])


def test_sums_say_why_nothing_is_known():
    one, none = torch.eye(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    assert LinearStats().silence == LinearStats(tokens=0, gram=none).silence == NO_TOKEN
    assert LinearStats(tokens=4, gram=none, grad_gram=none).silence == NO_INPUT
    assert LinearStats(tokens=4, gram=one, grad_gram=none, fisher=one[0]).silence == NO_GRADIENT
    assert LinearStats(tokens=4, gram=one, fisher=none[0]).silence == NO_GRADIENT
    assert (
        LinearStats(tokens=4, gram=one).silence
        is LinearStats(tokens=4, gram=one, grad_gram=one).silence
        is None
    )
    assert describe_dense({"b": NO_TOKEN, "a": NO_TOKEN, "c": NO_INPUT}) == [
        f"2 linears stay dense, each because {NO_TOKEN}: a, b",
        f"1 linears stay dense, each because {NO_INPUT}: c",
    ]


def test_the_gradient_root_of_nothing_names_the_linear_and_what_helps():
    stats = LinearStats(tokens=4, grad_tokens=4, grad_gram=torch.zeros(3, 3, dtype=torch.float64))
    with pytest.raises(
        DataError, match=r"^linear: no gradient reaches it.*leave it dense or take 'gram'"
    ):
        stats.gradient_root("linear", 0.1)
    moment = 8 * torch.eye(3, dtype=torch.float64)
    root = replace(stats, grad_gram=moment).gradient_root("linear", 0.1)
    torch.testing.assert_close(root @ root.T, moment / 4)
