"""Allocation over whole runs: competing methods, ties, limits, groups that share a dictionary."""

import json

import pytest
from support.models import read_json

import compressor
from compressor.errors import BudgetError, ConfigError
from compressor.linears import Dictionary
from compressor.pipeline import run as pipeline
from compressor.recipe.load import load_recipe

SMALL = [
    "calibration.windows=12",
    "calibration.length=32",
    "calibration.heldout=4",
    "calibration.batch_size=4",
    "evaluation.windows=6",
]
SEVERAL = "method=[{candidates: [{name: low_rank}, {name: sparse, options: {step: 0.05}}]}]"
SHARED = (
    "method=[{candidates: [{name: cospadi, share: [qkv, gate_up], options: {rounds: 2, anchors: "
    "null}}]}]"
)


@pytest.fixture
def run(tiny_llama, text_file, tmp_path):
    """Compress the tiny Llama with overrides of `default`: (folder, report, plan)."""

    def compress(*overrides: str, output: str = "out", **options):
        named = {
            "model.name": str(tiny_llama),
            "calibration.source": str(text_file),
            "evaluation.source": str(text_file),
        }
        made = load_recipe(None, [*SMALL, "model.device=cpu", *overrides], named)
        found = pipeline.compress(made, tmp_path / output, **options)
        return tmp_path / output, found, read_json(tmp_path / output / "plan.json")

    return compress


def test_of_competing_methods_the_plan_that_diverges_least_is_written(run):
    _, report, plan = run(SEVERAL, "allocation.keep=0.3")
    assert plan["contest"].keys() == {"all", "low_rank", "sparse"}
    assert report["heldout"]["kl"] == pytest.approx(
        min(plan["contest"].values()), rel=1e-2, abs=1e-7
    )
    _, _, alone = run("allocation.keep=0.6", output="alone")
    assert alone["contest"] == {}


def test_a_method_that_cannot_meet_the_budget_alone_takes_no_part_alone(run):
    _, _, plan = run(
        "method=[{candidates: [{name: low_rank}, {name: sparse, options: {pattern: '2:4'}}], "
        "dense: false}]",
        "allocation.keep=0.5",
    )
    assert plan["contest"].keys() == {"all", "low_rank"}  # 2:4 with its mask takes more than half


def test_tied_linears_get_one_scheme(run):
    _, _, plan = run("allocation.tie=[qkv, gate_up]", "allocation.keep=0.6")
    schemes = {}
    for name, choice in plan["linears"].items():
        parent, _, leaf = name.rpartition(".")
        if leaf in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
            schemes.setdefault(parent, set()).add(json.dumps([choice["method"], choice["setting"]]))
    assert len(schemes) == 4 and all(len(found) == 1 for found in schemes.values())
    assert any("rank" in scheme for found in schemes.values() for scheme in found)


def test_limits_bind(run):
    _, _, loose = run("allocation.keep=0.7")
    _, _, plan = run(
        "allocation.keep=0.7",
        "allocation.limits={multiply_adds: 0.5, parameters: 0.65}",
        output="limited",
    )
    shapes = {
        "q": 32 * 32,
        "k": 16 * 32,
        "v": 16 * 32,
        "o": 32 * 32,
        "gate": 48 * 32,
        "up": 48 * 32,
        "down": 32 * 48,
    }

    def executed(found) -> int:
        return sum(
            shapes[name.rpartition(".")[2].removesuffix("_proj")]
            if choice["method"] == "dense"
            else choice["parameters"]
            for name, choice in found["linears"].items()
        )

    whole = 2 * sum(shapes.values())
    assert executed(plan) <= 0.5 * whole < executed(loose)
    assert sum(choice["bits"] for choice in plan["linears"].values()) <= 0.7 * 32 * whole
    with pytest.raises(BudgetError, match=r"allocation\.limits"):
        run("allocation.keep=0.7", "allocation.limits={multiply_adds: 0.001}", output="none")


LINEARS = "{name: low_rank}, {name: sparse, options: {step: 0.05}}"
MODULES = f"""method=[{{targets: "role:ffn", candidates: [{{name: channels}}, {LINEARS}]}},
                      {{targets: "role:vo", candidates: [{{name: value_dims}}, {LINEARS}]}},
                      {{targets: "role:qk", candidates: [{{name: rotary_pairs}}, {LINEARS}]}}]"""


@pytest.mark.parametrize("keep", [0.8, 0.5])
def test_with_candidates_of_whole_modules_no_plan_is_worse_than_without(run, keep):
    _, _, plan = run(MODULES, f"allocation.keep={keep}", output="modules")
    _, _, without = run(f"method=[{{candidates: [{LINEARS}]}}]", f"allocation.keep={keep}")
    kinds = {"channels", "value_dims", "rotary_pairs", "low_rank", "sparse"}
    assert (
        plan["contest"].keys() <= {"all", "single_linears"} | kinds
        and {"all", "single_linears"} <= plan["contest"].keys()
    )
    assert (
        plan["contest"]["single_linears"] == without["contest"]["all"]
    )  # to the last bit: what modules do leaves no trace
    assert min(plan["contest"].values()) <= min(without["contest"].values())
    spent = [sum(choice["bits"] for choice in each["linears"].values()) for each in (plan, without)]
    dense = sum(choice["dense_bits"] for choice in plan["linears"].values())
    assert max(spent) <= keep * dense


def test_low_rank_attention_pruned_channels_and_integers_make_one_model(run, tmp_path):
    """Of one recipe, by a plan edited by hand: attention of low rank, channels of the first block,
    the second in four bits.
    """
    four = "{name: quantize, options: {bits: [4], group: ['auto:16']}}"
    entries = """method=[{targets: "role:ffn", candidates: [%s], dense: false}, {targets: "role:attention", candidates: [%s], dense: false}]"""
    recipe = entries % ("{name: channels}, " + four, "{name: low_rank}, " + four)
    pruned, packed = (
        run(entries % pair, "allocation.keep=0.6", "evaluation.enabled=false", output=output)[2][
            "linears"
        ]
        for output, pair in (
            ("pruned", ("{name: channels}", "{name: low_rank}")),
            ("packed", (four, four)),
        )
    )
    wanted = {name: (packed if "layers.1.mlp" in name else pruned)[name] for name in pruned}
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps({"linears": wanted}))
    folder, report, _ = run(recipe, "allocation.keep=0.5", output="mixed", plan=edited)
    assert {linear["method"] for linear in report["linears"]} == {
        "low_rank",
        "channels",
        "quantize",
    }
    assert pipeline.verify(folder) == [] and 0 < report["kl"] < 1
    model, _ = compressor.load(folder)
    kinds = {type(module).__name__ for module in model.modules() if hasattr(module, "to_dense")}
    assert kinds == {"LowRank", "Pruned", "Packed"}


def test_linears_that_share_store_one_dictionary(run):
    folder, report, plan = run(SHARED, "allocation.keep=0.6")
    model, _ = compressor.load(folder)
    lenders = [module.lender for module in model.modules() if isinstance(module, Dictionary)]
    assert any(lenders)
    shared = [name for name, choice in plan["linears"].items() if choice["members"]]
    for name in shared:
        choice, module = plan["linears"][name], model.get_submodule(name)
        assert name in choice["members"] and choice["bits"] == module.bits()
        assert choice["measured"] == pytest.approx(choice["predicted"], rel=0.05)
    assert report["kept"]["targets"] <= 0.6
    assert pipeline.verify(folder) == []
    again, _, _ = run(SHARED, "allocation.keep=0.6", output="again", plan=folder / "plan.json")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_sharing_is_chosen_only_where_it_is_better(run):
    both = (
        "method=[{candidates: [{name: cospadi, options: {rounds: 2}}, {name: cospadi, share: "
        "[qkv], options: {rounds: 2}}]}]"
    )
    _, report, _ = run(both, "allocation.keep=0.6")
    _, alone, _ = run(
        "method=[{candidates: [{name: cospadi, options: {rounds: 2}}]}]",
        "allocation.keep=0.6",
        output="alone",
    )
    assert report["heldout"]["kl"] <= alone["heldout"]["kl"] * 1.02


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["method=[{candidates: [{name: low_rank, share: [qkv]}]}]"],
            r"q_proj.*method 'low_rank' decomposes single linears",
        ),
        (
            ["method=[{targets: '*down_proj', candidates: [{name: cospadi, share: [qkv]}]}]"],
            "no targets .* have the roles q, k, v",
        ),
        (
            [
                "method=[{targets: '*q_proj', candidates: [{name: cospadi}]}, {candidates: "
                "[{name: cospadi, share: [qkv]}]}]"
            ],
            "must belong to one entry of the recipe",
        ),
        (["allocation.tie=[qkv]", "allocation.keep={'*q_proj': 0.5, '*': 0.8}"], "need one budget"),
        (["allocation.tie=[qkv]", "allocation.kind=by_role"], "need allocation.kind"),
    ],
)
def test_what_cannot_be_grouped_says_so(run, overrides, message):
    with pytest.raises(ConfigError, match=message):
        run(*overrides)
