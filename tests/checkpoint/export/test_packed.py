# ruff: noqa: F401 - fixtures come from neighbouring files
"""Exports that the libraries they are for read without this package: integers by
compressed-tensors, residuals by PEFT.
"""

import math

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import contents, logits, without_plugin
from support.models import read_json, tiny_model, tiny_tokenizer
from support.recipes import recipe
from support.sameness import assert_same_output
from transformers import AutoModelForCausalLM

from compressor.checkpoint.export import packed as exchange
from compressor.checkpoint.verify import verify
from compressor.errors import CheckpointError, ConfigError
from compressor.linears import Adapted, Packed
from compressor.models.linears import linears
from compressor.models.load import load
from compressor.pipeline import run

OPTIONS = "method.0.candidates.0.options"
LOOSE = {"float32": 1e-5, "bfloat16": 0.03}  # of the largest logit: PEFT adds residuals in float32


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    """Folders of tiny models whose linears matter: weights ten times those of a fresh one, so that
    what is wrong shows in the logits.
    """
    made = {}

    def folder(kind: str, dtype: str):
        if (kind, dtype) not in made:
            path = made[kind, dtype] = tmp_path_factory.mktemp("loud") / kind
            model = tiny_model(kind)
            with torch.no_grad():
                for info in linears(model).values():
                    info.module.weight.mul_(10)
            model.to(getattr(torch, dtype)).save_pretrained(path)
            tiny_tokenizer().save_pretrained(path)
        return made[kind, dtype]

    return folder


@pytest.fixture
def compressed(loud, text_file, tmp_path):
    def make(kind: str, dtype: str, *overrides: str, config: str = "gptq_w4"):
        overrides = [
            override if "." in override.partition("=")[0] else f"{OPTIONS}.{override}"
            for override in overrides
        ]
        made = recipe(
            loud(kind, dtype),
            text_file,
            "evaluation.enabled=false",
            "calibration.sequential=false",
            *overrides,
            config=config,
        )
        run.compress(made, tmp_path / "checkpoint")
        return tmp_path / "checkpoint", load(tmp_path / "checkpoint")[0]

    return make


@pytest.mark.parametrize(
    ("dtype", "options", "schemes"),
    [
        ("bfloat16", ["bits=[3]"], {(3, "channel", None, True), (3, "group", 24, True)}),
        ("float32", ["bits=[8]", "group=[16]"], {(8, "group", 16, True)}),
        ("bfloat16", ["bits=[4]", "group=[8]", "symmetric=false"], {(4, "group", 8, False)}),
        (
            "float32",
            ["bits=[3]", "group=[channel]", "symmetric=false"],
            {(3, "channel", None, False)},
        ),
    ],
)
def test_transformers_loads_integers_with_equal_logits(
    tmp_path, compressed, dtype, options, schemes, request
):
    path, model = compressed("llama", dtype, *options)
    found = run.export(path, tmp_path / "out", "compressed-tensors")
    assert (
        "14 linears of integers (" in found["note"]
        and "), 0 residuals; loaded by transformers" in found["note"]
        and "differ by 0 at most" in found["note"]
    )
    assert verify(tmp_path / "out") == []
    section = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    weights = [group["weights"] for group in section["config_groups"].values()]
    assert {
        (w["num_bits"], w["strategy"], w["group_size"], w["symmetric"]) for w in weights
    } == schemes
    assert section["quant_method"] == "compressed-tensors" and section["ignore"] == ["lm_head"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, module in model.named_modules():
        if isinstance(module, Packed):
            words = module.out_features * math.ceil(module.in_features * module.code_bits / 32)
            zeros = (
                0
                if module.zeros is None
                else math.ceil(module.out_features * module.code_bits / 32) * module.scales.shape[1]
            )
            size = 4 * (words + zeros) + module.scales.nbytes + 16
            assert (
                sum(tensor.nbytes for key, tensor in stored.items() if key.startswith(f"{name}."))
                == size
            )
    request.getfixturevalue("without_plugin")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_output(logits(plain), logits(model))
    for name, module in model.named_modules():
        if isinstance(module, Packed):
            assert torch.equal(plain.get_submodule(name).weight, module.to_dense().to(plain.dtype))


@pytest.mark.parametrize(
    ("kind", "dtype", "overrides"),
    [
        ("llama", "float32", ["bits=[3]", "group=[16]", "residual=[2,5]", "allocation.keep=0.35"]),
        (
            "llama",
            "bfloat16",
            ["bits=[4]", "group=[16]", "residual=[3,6]", "symmetric=false", "allocation.keep=0.6"],
        ),
        (
            "llama",
            "bfloat16",
            ["bits=[3]", "group=[16]", "residual=[3,6]", "residual_bits=8", "allocation.keep=0.37"],
        ),
    ],
)
def test_transformers_and_peft_load_base_and_residuals(
    tmp_path, compressed, kind, dtype, overrides, request
):
    choice = [
        "allocation.kind=knapsack",
        "allocation.damage=relative_error",
        "method.0.dense=false",
    ]
    path, model = compressed(kind, dtype, *choice, *overrides)
    found = run.export(path, tmp_path / "out", "peft")
    adapted = {
        name: module for name, module in model.named_modules() if isinstance(module, Adapted)
    }
    assert f"), {len(adapted)} residuals" in found["note"]
    config = read_json(tmp_path / "out" / "adapter_config.json")
    ranks = {name: module.rank for name, module in adapted.items()}
    assert (
        config["rank_pattern"] == config["alpha_pattern"] == ranks and len(set(ranks.values())) == 2
    )
    assert (
        config["r"] == config["lora_alpha"] == max(ranks.values())
    )  # readers of the top level alone scale by 1 too
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")["weight_map"]
    assert (
        set(index.values()) == {"model.safetensors"}
        and index.keys() == load_file(tmp_path / "out" / "model.safetensors").keys()
    )
    request.getfixturevalue("without_plugin")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, module in adapted.items():
        lora = plain.get_submodule(name)
        assert lora.scaling == {"default": 1.0} and lora.r == {"default": ranks[name]}
        assert torch.equal(lora.base_layer.weight, module.base.to_dense().to(plain.dtype))
        up, down = module.pair()
        assert torch.equal(lora.lora_A["default"].weight.to(down.dtype), down)
        assert torch.equal(lora.lora_B["default"].weight.to(up.dtype), up)
    scale = logits(model).abs().max()
    assert (logits(plain) - logits(model)).abs().max() <= LOOSE[dtype] * scale
    plain.disable_adapters()
    assert (logits(plain) - logits(model)).abs().max() > 0.03 * scale  # the residuals matter here


@pytest.mark.parametrize("form", ["compressed-tensors", "peft"])
def test_several_schemes_that_transformers_unpacks_are_written_as_one(
    tmp_path, compressed, form, request
):
    """Bits 3 and 5 in groups of a row, 32 or 48, and of 16: zero points or adapters leave room for
    one scheme, which holds them all.
    """
    options = ["bits=[3,5]", "group=[16,channel]", "method.0.dense=false"]
    options += (
        ["symmetric=false", "allocation.keep=0.16"]
        if form == "compressed-tensors"
        else ["residual=[1]", "allocation.keep=0.2"]
    )
    path, model = compressed(
        "llama", "float32", "allocation.kind=knapsack", "allocation.damage=relative_error", *options
    )
    packed = {
        name: getattr(m, "base", m)
        for name, m in model.named_modules()
        if isinstance(m, Packed | Adapted)
    }
    assert {base.code_bits for base in packed.values()} == {3, 5} and len(
        {base.group for base in packed.values()}
    ) > 1
    assert (
        "14 linears of integers (5 bits in groups of 16)"
        in run.export(path, tmp_path / "out", form)["note"]
    )
    request.getfixturevalue("without_plugin")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_output(logits(plain), logits(model))


def test_one_scheme_that_is_no_smaller_than_dense_is_refused(tmp_path, compressed):
    """Groups of 7 and 8 would share groups of 1, and a scale for each code is more than a dense
    weight.
    """
    path, _ = compressed("llama", "float32", "group=[channel]", "residual=[1]", "bits=[8]")
    opened = exchange.take_apart(path, exchange.read_skeleton(path))
    base = Packed.of_codes(torch.zeros(4, 7), torch.ones(4, 1), None, None, 8)
    odd = opened.__class__(
        path, opened.stock, opened.model, None, opened.bases | {"odd": base}, opened.pairs
    )
    with pytest.raises(
        ConfigError,
        match=r"would take [0-9,]+ bits as the one of 8 bits in groups of 1 that transformers unpacks here",
    ):
        exchange.unify_schemes(odd)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_sparse_base_with_residuals_is_written_dense(tmp_path, compressed, kind, request):
    overrides = [
        "pattern=layer",
        "iterations=4",
        "rank_share=0.3",
        "allocation.keep=0.6",
        "allocation.kind=uniform",
    ]
    path, model = compressed(kind, "float32", *overrides, config="sparse_low_rank")
    assert "0 linears of integers" in run.export(path, tmp_path / "out", "peft")["note"]
    assert "quantization_config" not in read_json(tmp_path / "out" / "config.json")
    request.getfixturevalue("without_plugin")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(plain) - logits(model)).abs().max() <= 1e-5 * logits(model).abs().max()


def test_what_an_export_cannot_hold_is_refused_before_anything_is_written(
    tmp_path, compressed, loud
):
    out, make = tmp_path / "out", compressed

    def refused(path, form: str, words: str, error=ConfigError):
        with pytest.raises(error, match=words) as caught:
            run.export(path, out, form)
        assert "\n" not in str(caught.value) and not out.exists()

    refused(
        loud("llama", "float32"), "peft", "is not a checkpoint of this package", CheckpointError
    )
    path, _ = make("llama", "float32", "residual=[2]", "symmetric=false")
    refused(
        path,
        "compressed-tensors",
        "has residuals, which the layout has no place for; use --format peft",
    )
    refused(path, "pefd", "there is no export format 'pefd'; did you mean 'peft'")
    make = lambda *a, **k: (path, compressed(*a, "output.overwrite=true", **k))[0]  # noqa: E731
    refused(
        make("llama", "float32"),
        "peft",
        "has no residuals to make an adapter of; use --format compressed-tensors or dense",
    )
    refused(
        make("gpt2", "float32"),
        "compressed-tensors",
        r"c_attn is a Conv1D, whose integers compressed-tensors does not read",
    )
    refused(
        make("llama", "float32", config="svd"),
        "compressed-tensors",
        "has no integers; use --format dense",
    )


def test_an_export_that_loads_as_something_else_is_not_put_in_place(
    tmp_path, compressed, monkeypatch
):
    path, _ = compressed("llama", "float32", "residual=[2]", "group=[16]")
    monkeypatch.setattr(exchange, "is_residual", lambda *_: False)
    with pytest.raises(
        CheckpointError, match="transformers loads another weight than was written in"
    ):
        run.export(path, tmp_path / "out", "peft")
    assert sorted(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    monkeypatch.setattr(exchange, "compute_logits", lambda model: torch.rand(1))
    with pytest.raises(
        CheckpointError, match=r"logits of the export, loaded by transformers, are off by"
    ):
        run.export(path, tmp_path / "out", "peft")
    monkeypatch.undo()
    run.export(path, tmp_path / "out", "peft")
    before = contents(tmp_path / "out")
    run.export(path, tmp_path / "out", "peft", overwrite=True)
    assert contents(tmp_path / "out") == before  # same input, same bytes
    with pytest.raises(CheckpointError, match="holds a PEFT adapter"):
        load(tmp_path / "out")
