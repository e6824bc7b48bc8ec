"""LoRA beside compressed linears: nothing at the start, trained alone, merged exactly where that is
possible, and in no more bits.
"""

from copy import deepcopy

import pytest
import torch
from support.activations import windows
from support.blocks import DOWN, MADE
from support.models import read_json, tiny_model
from support.modules import compressed
from support.processes import contents, interrupted
from support.recipes import recipe
from support.sameness import assert_same_output
from support.training import SECTION, loss_of
from torch.nn import functional

from compressor.errors import ConfigError
from compressor.linalg import Metric
from compressor.linears import KINDS
from compressor.models.install import installed
from compressor.models.linears import blocks
from compressor.pipeline import job as jobs
from compressor.pipeline import run as pipeline
from compressor.pipeline.solution import Solution
from compressor.pipeline.train import train, training
from compressor.plan import Plan
from compressor.training import loop as trainer
from compressor.training.learners import rebuild
from compressor.training.loop import Task, fit
from compressor.training.lora import Lora, Loras
from compressor.training.teacher import Teacher

CLOSE = 1e-5
RANK = 3
FROZEN = {"packed", "chained"}
TRUNCATED = {"low_rank", "adapted"}


def disturbed(module, rank=RANK):
    """A Lora whose product is not zero."""
    lora = Lora(module.requires_grad_(False), rank, torch.Generator().manual_seed(0))
    lora.up.data.normal_(std=0.1 / lora.scale, generator=torch.Generator().manual_seed(1))
    return lora


def merged(module, lora, metric=None):
    values = {
        key: tensor.float() if tensor.is_floating_point() else tensor
        for key, tensor in lora.merge(metric or Metric(), "it").items()
    }
    return rebuild({"it": module}, {"it": values})["it"]


def made(kind):
    weight = tiny_model("llama").get_submodule(DOWN).weight.detach()
    return MADE[kind](weight, torch.linspace(-1, 1, len(weight)))


@pytest.mark.parametrize(
    "kind",
    ["dense", "conv1d", *(kind for kind in MADE if kind.split()[0] not in FROZEN | TRUNCATED)],
)
def test_merging_is_exact_where_entries_or_whole_weights_are_stored(kind):
    match kind:
        case "dense":
            module = tiny_model("llama", mlp_bias=True).get_submodule(DOWN)
        case "conv1d":
            module = tiny_model("gpt2").transformer.h[0].mlp.c_fc
        case _:
            module = made(kind)
    lora = disturbed(module)
    x = torch.randn(5, 32 if kind == "conv1d" else 48, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = merged(module, lora)
        torch.testing.assert_close(found(x), lora(x), rtol=CLOSE, atol=CLOSE)
        assert (found(x) - module(x)).norm() > 0.05 * module(x).norm()
    for key, tensor in found.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[key]) == (key != "weight"), key


@pytest.mark.parametrize(
    "kind", ["low_rank", "low_rank pivoted", "adapted sparse", "adapted packed"]
)
def test_low_rank_parts_become_the_best_of_their_rank(kind):
    module = made(kind)
    lora, rank = disturbed(module), module.rank
    base = module.base.to_dense() if kind.startswith("adapted") else torch.zeros(32, 48)
    whole = (module.to_dense() - base + lora.scale * lora.up @ lora.down).double()
    squares = torch.linspace(0.1, 4, 48).double()
    for metric, roots in ((Metric(), torch.ones(48)), (Metric(squares), squares.sqrt())):
        found = merged(module, lora, metric)
        assert found.spec() == module.spec() and found.bits() == module.bits()
        error = (whole - (found.to_dense() - base).double()) * roots
        tail = torch.linalg.svdvals(whole * roots)[rank:]
        assert (
            error.square().sum().item() == pytest.approx(tail.square().sum().item(), rel=1e-3)
            and len(tail) > RANK - 1
        )
        x = torch.randn(4, 48, generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(
            found(x), functional.linear(x, found.to_dense(), found.bias), rtol=1e-4, atol=1e-4
        )


def test_a_start_changes_nothing_and_a_small_rank_is_enough_for_itself():
    module = made("low_rank pivoted")
    lora = Lora(module, 100, torch.Generator().manual_seed(0))
    x = torch.randn(4, 48, generator=torch.Generator().manual_seed(2))
    assert lora.down.shape == (32, 48) and not lora.up.any()
    assert_same_output(lora(x), module(x))
    torch.testing.assert_close(
        merged(module, lora).to_dense(), module.to_dense(), rtol=CLOSE, atol=CLOSE
    )
    masked = made("dictionary")
    assert_same_output(Lora(masked, 2, torch.Generator())(x), masked(x))


def test_only_products_learn_and_the_loss_falls():
    model = compressed("gpt2")
    names = [
        name for name, module in model.named_modules() if getattr(module, "kind", None) in KINDS
    ]
    modules, dense = {name: model.get_submodule(name) for name in names}, tiny_model("gpt2")
    with training(dense):
        original = Teacher(dense, [windows()])
        loras = Loras(dense, modules, blocks(dense)[1], 4, 0)
        before = deepcopy({name: lora.module.state_dict() for name, lora in loras.loras.items()})
        assert len(loras.loras) == 8 and {key.rpartition(".")[2] for key in loras.parameters} == {
            "up",
            "down",
        }
        with installed(dense, modules | loras.loras):
            task = Task("heal", loras.parameters, 1, loss_of(original), original.divergence)
            scores = fit(task, SECTION, 0).scores
            loras.measure_inputs(dense, original.batches)
            metrics = loras.metrics
    assert min(scores) < 0.8 * scores[0] and metrics.keys() == set(names)
    assert all(metrics[name].moment.shape == (dense.get_submodule(name).nx,) for name in names)
    for name, state in before.items():
        assert all(
            torch.equal(tensor, state[key])
            for key, tensor in loras.loras[name].module.state_dict().items()
        )
    again = Loras(dense, modules, blocks(dense)[1], 4, 0)
    assert all(
        torch.equal(again.parameters[name], torch.zeros_like(p))
        for name, p in loras.parameters.items()
        if name.endswith("up")
    )


def test_integers_stay_as_they_are_and_nothing_but_integers_is_refused(tiny_llama, text_file):
    model = tiny_model("llama")
    modules = {DOWN: made("packed")}
    assert DOWN not in Loras(model, modules, blocks(model)[1], 4, 0).copies
    job = jobs.start(
        recipe(tiny_llama, text_file, "heal.enabled=true", "heal.train=lora"),
        jobs.open_source(str(tiny_llama), None),
    )
    weights = {
        name: module
        for name, module in job.model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in name
    }
    packed = {
        name: MADE["packed"](module.weight.detach(), None) for name, module in weights.items()
    }
    with pytest.raises(
        ConfigError,
        match=r"heal\.train: lora has nothing to merge into.*\(packed\); set heal\.train to compressed",
    ):
        train(Solution(job, {}, {}, Plan({}), packed))


def test_a_run_keeps_its_size_and_goes_on_to_the_same_bytes(tiny_llama, text_file, tmp_path):
    quick = [
        f"heal.{value}"
        for value in (
            "enabled=true",
            "train=lora",
            "steps=12",
            "check=4",
            "learning_rate=0.01",
            "rank=2",
        )
    ]
    plain = recipe(tiny_llama, text_file, "allocation.keep=0.7", "output.dtype=bfloat16")
    healed = recipe(tiny_llama, text_file, "allocation.keep=0.7", "output.dtype=bfloat16", *quick)
    expected = pipeline.compress(healed, tmp_path / "whole")
    assert expected["trained"]["heal"]["kept"]
    before = pipeline.compress(plain, tmp_path / "plain")
    assert before["kept"] == expected["kept"] and before["kl"] != expected["kl"]
    specs = [
        read_json(tmp_path / run / "config.json")["quantization_config"]["linears"]
        for run in ("plain", "whole")
    ]
    assert specs[0] == specs[1]
    with interrupted(trainer, "_advance", 2):
        pipeline.compress(healed, tmp_path / "out")
    pipeline.compress(healed, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
