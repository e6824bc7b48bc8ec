"""Whole runs with integers: bits on disk are those of the plan, one fixed setting, the joint choice
of bits and rank, what is refused.
"""

import pytest
import torch
from safetensors import safe_open
from support.models import read_json
from support.recipes import recipe

import compressor
from compressor.checkpoint.verify import verify
from compressor.errors import ConfigError
from compressor.linears import Adapted, Chained, CompressedLinear, Packed
from compressor.pipeline import run
from compressor.recipe.load import load_recipe

OPTIONS = "method.0.candidates.0.options"


def stored_bits(folder, name: str) -> int:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return 8 * sum(
            file.get_tensor(key).nbytes for key in file.keys() if key.startswith(f"{name}.")
        )


@pytest.mark.parametrize(
    ("model", "dtype", "options"),
    [
        ("tiny_llama", "bfloat16", ["bits=[3]"]),
        ("tiny_llama", "float32", ["bits=[4]", "symmetric=false", "group=[16]"]),
        ("tiny_gpt2", "bfloat16", ["bits=[8]", "residual=[3]", "group=[channel]"]),
        (
            "tiny_llama",
            "bfloat16",
            ["bits=[3]", "residual=[3]", "residual_bits=4", "residual_group=auto:16"],
        ),
    ],
    ids=["3 bits", "4 bits asymmetric", "8 bits and residual", "3 bits and integer residual"],
)
def test_bits_on_disk_are_those_of_the_plan(request, tmp_path, text_file, model, dtype, options):
    source, overrides = (
        request.getfixturevalue(model),
        [f"{OPTIONS}.{option}" for option in options],
    )
    overrides += [
        f"output.dtype={dtype}",
        "evaluation.enabled=false",
        "calibration.sequential=false",
    ]
    made = recipe(source, text_file, *overrides, config="gptq_w4")
    report = run.compress(made, tmp_path / "out")
    plan = read_json(tmp_path / "out" / "plan.json")["linears"]
    assert {choice["method"] for choice in plan.values()} == {"quantize"}
    assert all(
        choice["bits"] == stored_bits(tmp_path / "out", name) < choice["dense_bits"]
        for name, choice in plan.items()
    )
    assert all(
        choice["measured"] == pytest.approx(choice["predicted"], rel=0.1)
        for choice in plan.values()
    )
    assert report["kept"]["bits"] == sum(choice["bits"] for choice in plan.values()) / sum(
        c["dense_bits"] for c in plan.values()
    )
    assert verify(tmp_path / "out") == []
    assert all(
        row["bits"] == plan[row["name"]]["bits"] for row in run.inspect(tmp_path / "out")["linears"]
    )
    model, _ = compressor.load(tmp_path / "out")
    kinds = {type(module) for module in model.modules() if isinstance(module, CompressedLinear)}
    assert kinds == {Adapted if "residual=[3]" in options else Packed}
    model.generate(torch.tensor([[3, 4]]), max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
def test_factors_of_integers_spend_a_budget_and_read_back(request, tmp_path, text_file, model):
    source = request.getfixturevalue(model)
    overrides = [
        "allocation.keep=0.2",
        "output.dtype=bfloat16",
        "evaluation.enabled=false",
        f"{OPTIONS}.rank_step=3",
    ]
    report = run.compress(
        recipe(source, text_file, *overrides, config="svd_llm_gptq"), tmp_path / "out"
    )
    plan = read_json(tmp_path / "out" / "plan.json")["linears"]
    assert all(
        choice["bits"] == stored_bits(tmp_path / "out", name) for name, choice in plan.items()
    )
    assert 0.1 < report["kept"]["bits"] <= 0.2 and verify(tmp_path / "out") == []
    model, _ = compressor.load(tmp_path / "out")
    chained = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    assert {type(module) for module in chained} == {Chained} and len(chained) == len(plan)
    model.generate(torch.tensor([[3, 4]]), max_new_tokens=2, do_sample=False)


@pytest.mark.slow
def test_bits_and_ranks_are_chosen_together(tmp_path, tiny_llama, text_file):
    made = recipe(
        tiny_llama,
        text_file,
        f"{OPTIONS}.group=[auto:16]",
        "allocation.keep=0.45",
        "evaluation.enabled=false",
        config="mlorq",
    )
    found = run.compress(made, tmp_path / "out")
    settings = [linear["setting"] for linear in found["linears"]]
    assert (
        found["kept"]["targets"] <= 0.45 and len({setting.get("bits") for setting in settings}) > 1
    )
    again = run.compress(made.model_copy(), tmp_path / "again", plan=tmp_path / "out" / "plan.json")
    assert [linear["setting"] for linear in again["linears"]] == settings
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_tied_linears_get_one_scheme(tmp_path, tiny_llama, text_file):
    overrides = [
        f"{OPTIONS}.group=[auto:16]",
        f"{OPTIONS}.residual=[0]",
        "allocation.tie=[qkv,gate_up]",
        "evaluation.enabled=false",
    ]
    found = run.compress(
        recipe(tiny_llama, text_file, *overrides, config="mlorq"), tmp_path / "out"
    )
    settings = {linear["name"]: linear["setting"] for linear in found["linears"]}
    for block in ("model.layers.0", "model.layers.1"):
        assert (
            settings[f"{block}.self_attn.q_proj"]
            == settings[f"{block}.self_attn.k_proj"]
            == settings[f"{block}.self_attn.v_proj"]
        )
        assert settings[f"{block}.mlp.gate_proj"] == settings[f"{block}.mlp.up_proj"]


def test_the_plan_of_a_fixed_recipe_knows_its_size(tiny_llama, text_file):
    made = recipe(tiny_llama, text_file, config="gptq_w4")
    outline = run.plan(made)
    linears = outline["linears"]
    assert all(
        linear["candidates"] == 1 and linear["least_bits"] == linear["most_bits"]
        for linear in linears
    )
    assert outline["kept"] == pytest.approx(
        sum(x["least_bits"] for x in linears) / sum(x["dense_bits"] for x in linears)
    )


@pytest.mark.parametrize("size", ["allocation.keep=0.5", "allocation.target_size=3MB"])
def test_a_fixed_recipe_takes_no_size(size):
    with pytest.raises(
        ConfigError,
        match=r"allocation of kind 'fixed' has one size and takes no (keep|target_size)",
    ) as caught:
        load_recipe("gptq_w4", [size])
    assert "\n" not in str(caught.value)
    assert load_recipe("gptq_w4").allocation.keep is None
    assert load_recipe("gptq_w4", [size, "allocation.kind=knapsack"]).allocation.kind == "knapsack"


def test_what_does_not_fit_integers_is_refused(tmp_path, tiny_llama, text_file):
    with pytest.raises(
        ConfigError, match=r"q_proj: 'quantize' offers several sizes, allocation 'fixed' takes one"
    ):
        run.compress(
            recipe(tiny_llama, text_file, f"{OPTIONS}.bits=[3,4]", config="gptq_w4"),
            tmp_path / "out",
        )
    with pytest.raises(
        ConfigError,
        match=r"q_proj: integers are not counted as parameters; set allocation\.count to bits",
    ):
        run.compress(
            recipe(tiny_llama, text_file, "allocation.count=parameters", config="mlorq"),
            tmp_path / "out",
        )
    with pytest.raises(ConfigError, match=r"groups of 24 do not divide its 32 inputs"):
        run.compress(
            recipe(tiny_llama, text_file, f"{OPTIONS}.group=[24]", config="rtn_w4"),
            tmp_path / "out",
        )
    with pytest.raises(ConfigError, match=r"residual rank 64 is above its smaller side"):
        run.compress(recipe(tiny_llama, text_file, config="eora_w3_r64"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_residual_that_saves_nothing_leaves_the_linear_dense(tmp_path, tiny_llama, text_file):
    made = recipe(
        tiny_llama,
        text_file,
        f"{OPTIONS}.residual=[16]",
        "evaluation.enabled=false",
        config="eora_w4_r32",
    )
    found = run.compress(made, tmp_path / "out")
    methods = {linear["name"].rpartition(".")[2]: linear["method"] for linear in found["linears"]}
    assert (
        methods["q_proj"] == "dense" and methods["up_proj"] == "quantize"
    )  # rank 16 of 32 × 32 is all of it, of 48 × 32 it is not
