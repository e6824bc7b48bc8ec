"""Block repair: every storage kind learns, nothing else changes, and what does not help on held-out
windows is dropped.
"""

from copy import deepcopy

import pytest
import torch
from support.activations import windows
from support.blocks import DOWN, MADE, SECTION, dictionary, repaired
from support.models import tiny_model
from support.modules import low_rank

from compressor.linears import KINDS
from compressor.models.linears import linears
from compressor.recipe.training import Repair
from compressor.training.learners import Learners
from compressor.training.loop import draw_batches, relative_rate


def test_every_storage_kind_is_here():
    assert {name.split()[0] for name in MADE} == set(KINDS)


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_what_a_kind_stores_is_fitted_and_nothing_else_changes(kind, dtype):
    model = tiny_model("llama", mlp_bias=True).to(dtype)
    linear = model.get_submodule(DOWN)
    torch.nn.init.normal_(linear.bias, std=0.02, generator=torch.Generator().manual_seed(0))
    module = MADE[kind](linear.weight.detach().float(), linear.bias.detach().float()).to(dtype)
    before, stored = deepcopy(model.state_dict()), deepcopy(module.state_dict())
    found, outcomes = repaired(model, {DOWN: module}, dtype=dtype)
    assert (
        list(found) == [DOWN]
        and type(found[DOWN]) is type(module)
        and found[DOWN].spec() == module.spec()
    )
    within_reach = 1 if kind == "pruned" else 0.9  # outputs that are gone stay away
    assert outcomes[0].after < within_reach * outcomes[0].before and outcomes[0].steps == 40
    learned = dict(module.named_parameters())
    for name, tensor in found[DOWN].state_dict().items():
        assert tensor.dtype == stored[name].dtype and tensor.shape == stored[name].shape
        assert torch.equal(tensor, stored[name]) == (name not in learned), name
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, stored[name])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype
    assert all(
        parameter.requires_grad and parameter.grad is None for parameter in model.parameters()
    )
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(1)).to(dtype).float()
    dense = found[DOWN].to_dense().float()
    with torch.no_grad():
        torch.testing.assert_close(
            deepcopy(found[DOWN]).float()(x),
            x @ dense.T + found[DOWN].dense_bias().float(),
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.parametrize(
    ("train", "inside"),
    [("compressed", set()), ("norms", {"norm"}), ("everything", {"norm", "proj"})],
)
def test_norms_and_dense_weights_of_compressed_and_later_blocks_learn_if_they_are_to(train, inside):
    model = tiny_model("llama")
    module = low_rank(model.get_submodule(DOWN).weight, None, 8, False)
    found, outcomes = repaired(model, {DOWN: module}, SECTION.model_copy(update={"train": train}))
    assert {name.rpartition("_")[2].removeprefix("layer") for name in found} - {
        "proj"
    } == inside - {"proj"}
    assert len(found) == {"compressed": 1, "norms": 5, "everything": 18}[train]
    assert [outcome.block for outcome in outcomes] == [0, 1][: 1 if train == "compressed" else 2]
    assert all(outcome.after < outcome.before for outcome in outcomes)
    for name, one in found.items():
        assert one is not model.get_submodule(name) and type(one) in (
            type(model.get_submodule(name)),
            type(module),
        )


def test_a_fit_that_does_not_help_on_held_out_windows_is_dropped():
    model = tiny_model("llama")
    module = low_rank(model.get_submodule(DOWN).weight, None, 8, False)
    few, others = [windows(1, 2)], [windows(12, 24) + 1]
    section = SECTION.model_copy(
        update={"train": "everything", "steps": 60, "check": 60, "learning_rate": 0.2}
    )
    found, outcomes = repaired(
        model, {DOWN: module}, section, few, [batch % 90 for batch in others]
    )
    assert found == {DOWN: module} and found[DOWN] is module
    assert all(
        outcome.values == {} and outcome.after == outcome.before and outcome.steps > 0
        for outcome in outcomes
    )


def test_blocks_before_the_first_compressed_one_are_left_alone():
    model, late = tiny_model("llama"), DOWN.replace("0", "1")
    section = SECTION.model_copy(update={"train": "everything"})
    found, outcomes = repaired(
        model, {late: low_rank(model.get_submodule(late).weight, None, 8, True)}, section
    )
    assert [outcome.block for outcome in outcomes] == [1] and all(
        ".layers.1." in name for name in found
    )
    assert outcomes[0].after < outcomes[0].before


def test_without_anything_compressed_nothing_is_done():
    assert repaired(tiny_model("llama"), {}) == ({}, [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "phi3", "mixtral", "opt", "gpt_neox"])
def test_architectures(kind):
    model = tiny_model(kind)
    name, info = next(iter(linears(model).items()))
    weight = info.module.weight.T if info.conv1d else info.module.weight
    bias = None if info.module.bias is None else info.module.bias.detach()
    found, outcomes = repaired(
        model,
        {name: low_rank(weight, bias, 6, True)},
        SECTION.model_copy(update={"train": "everything"}),
    )
    assert outcomes[0].after < outcomes[0].before and len(found) > 1


def test_borrowed_atoms_learn_once_and_stay_shared():
    model = tiny_model("llama")
    names = {
        f"model.layers.0.self_attn.{part}_proj": height
        for part, height in (("q", 32), ("k", 16), ("v", 16))
    }
    whole = dictionary(
        torch.cat([model.get_submodule(name).weight.detach() for name in names]), None
    )
    found, outcomes = repaired(model, whole.split(names))
    lender, *borrowers = (found[name] for name in names)
    assert outcomes[0].after < outcomes[0].before
    assert not torch.equal(lender.atoms, whole.atoms)
    assert all(
        borrower.lent is lender and "atoms" not in borrower.state_dict() for borrower in borrowers
    )


def test_atoms_lent_by_an_earlier_block_do_not_learn_again():
    model, late = tiny_model("llama"), DOWN.replace("0", "1")
    whole = dictionary(
        torch.cat([model.get_submodule(name).weight.detach() for name in (DOWN, late)]), None
    )
    found, outcomes = repaired(model, whole.split({DOWN: 32, late: 32}))
    assert len(outcomes) == 2 and all(outcome.after < outcome.before for outcome in outcomes)
    assert (
        found[late].lent is found[DOWN]
        and list(outcomes[1].values) == [late]
        and list(outcomes[1].values[late]) == ["weight"]
    )


def test_learners_share_no_memory_with_what_they_come_from():
    model = tiny_model("llama")
    module = low_rank(model.get_submodule(DOWN).weight, None, 8, False)
    learners = Learners(model, {DOWN: module}, [model.model.layers[0]], "everything")
    addresses = {tensor.data_ptr() for tensor in [*model.parameters(), *module.parameters()]}
    assert len(learners.parameters) == 2 + 6 + 2 and not addresses & {
        tensor.data_ptr() for tensor in learners.parameters.values()
    }


def test_batches_come_in_turn_and_the_rate_rises_and_falls():
    order = draw_batches(5, 12, seed=3)
    assert (
        len(order) == 12
        and sorted(order[:5]) == sorted(order[5:10]) == list(range(5))
        and order == draw_batches(5, 12, seed=3)
    )
    rates = [relative_rate(step, Repair(steps=100)) for step in range(100)]
    assert (
        rates[:2] == [0.1, 0.2]
        and rates[9] == rates[10] == 1.0
        and rates[-1] == pytest.approx(0.1, abs=1e-3)
    )
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert relative_rate(0, Repair(steps=1)) == 1.0
