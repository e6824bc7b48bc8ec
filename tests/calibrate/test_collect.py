"""Statistics of tiny models against their definition, and against every way of cutting the same
work into pieces.
"""

import pytest
import torch
from support.activations import (
    ALL,
    FIELDS,
    GRAM,
    LENGTH,
    PIECES,
    assert_same,
    distance,
    everywhere,
    observed,
    windows,
)
from support.logits import few_at_a_time
from support.models import VOCABULARY, tiny_model

from compressor.calibrate.collect import collect, second_moment, waves
from compressor.models.linears import linears
from compressor.recipe.sections import Gradients

DEFINITION = 1e-5  # relative, against float64 sums over float32 activations
HALF = 5e-3  # relative, between bfloat16 and float32 forward passes of two blocks


@pytest.fixture(scope="module")
def llama():
    model = tiny_model("llama")
    return model, linears(model)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "phi3", "gpt_neox", "gemma2", "qwen3"])
def test_fields_equal_their_definition(kind):
    model = tiny_model(kind)
    found, tokens = linears(model), windows()
    stats = collect(model, found, tokens, everywhere(found), batch_size=4)
    for name, (x, g) in observed(model, found, tokens).items():
        one, x, g = stats[name], x.flatten(0, 1), g.flatten(0, 1)
        assert (one.tokens, one.grad_tokens) == (tokens.numel(), len(tokens) * (LENGTH - 1))
        per_token = torch.einsum(
            "to,ti->toi", g, x
        ).square()  # squared weight gradient of each token
        expected = (x.T @ x, x.sum(0), x.abs().sum(0), per_token.sum((0, 1)), g.T @ g)
        for field, value in zip(
            ("gram", "sum", "abs_sum", "fisher", "grad_gram"), expected, strict=True
        ):
            assert getattr(one, field).dtype == torch.float64
            assert distance(getattr(one, field), value) < DEFINITION, (name, field)


def test_inputs_and_gradients_of_a_token_belong_together(llama):
    """The tokens' outer products g xᵀ sum to the weight gradient; the last position, without a
    label, has none.
    """
    model, found = llama
    model.zero_grad()
    seen = observed(model, found, windows())
    for name, (x, g) in seen.items():
        assert (
            distance(torch.einsum("nto,nti->oi", g, x), found[name].module.weight.grad.double())
            < DEFINITION
        )
        assert g[:, -1].abs().max() == 0
    model.zero_grad()


def test_linears_fed_by_one_tensor_share_its_sums(llama):
    model, found = llama
    stats = collect(model, found, windows(), everywhere(found))
    q, k, v, o = (stats[f"model.layers.0.self_attn.{role}_proj"] for role in "qkvo")
    assert q.gram is k.gram is v.gram and q.sum is v.sum and q.abs_sum is k.abs_sum
    assert o.gram is not q.gram and k.fisher is not q.fisher


def test_only_needed_fields_are_collected(llama):
    model, found = llama
    q, k, down = (
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.mlp.down_proj",
    )
    stats = collect(
        model,
        found,
        windows(),
        {q: frozenset({"gram"}), k: frozenset({"sum", "fisher"}), down: frozenset({"grad_gram"})},
    )
    held = {
        name: {field for field in FIELDS if getattr(one, field) is not None}
        for name, one in stats.items()
    }
    assert held == {name: set() for name in found} | {
        q: {"gram"},
        k: {"sum", "fisher"},
        down: {"grad_gram"},
    }
    assert stats[q].grad_tokens == 0 and stats[down].tokens == windows().numel()


def test_a_linear_counts_even_when_the_first_of_its_siblings_is_no_target(llama):
    model, found = llama
    some = {name: info for name, info in found.items() if name.endswith(("k_proj", "v_proj"))}
    stats = collect(model, some, windows(), everywhere(some, GRAM))
    assert (
        stats["model.layers.1.self_attn.k_proj"].gram
        is stats["model.layers.1.self_attn.v_proj"].gram
    )
    assert_same(
        stats,
        {
            name: one
            for name, one in collect(model, found, windows(), everywhere(found, GRAM)).items()
            if name in some
        },
    )


OPTIONS = {
    "data": Gradients(),
    "sampled": Gradients(labels="sampled"),
    "clipped and trimmed": Gradients(clip=(0.5, 1.5), trim=0.125),
}


@pytest.mark.parametrize("gradients", OPTIONS.values(), ids=OPTIONS.keys())
def test_batch_size_and_passes_change_nothing(llama, gradients):
    model, found = llama

    def run(**changes):
        generator = torch.Generator().manual_seed(5)
        return collect(
            model,
            found,
            windows(),
            everywhere(found),
            gradients=gradients,
            generator=generator,
            **changes,
        )

    whole = run(batch_size=6)
    for size in (1, 4):
        assert_same(run(batch_size=size), whole)
    assert_same(run(batch_size=6, memory=20_000), whole)


@pytest.mark.parametrize("gradients", OPTIONS.values(), ids=OPTIONS.keys())
def test_chunks_of_the_head_change_nothing_and_bound_the_logits(llama, gradients, monkeypatch):
    model, found = llama

    def run():
        return collect(
            model,
            found,
            windows(),
            everywhere(found),
            batch_size=4,
            gradients=gradients,
            generator=torch.Generator().manual_seed(5),
        )

    expected = run()
    with few_at_a_time(monkeypatch, VOCABULARY, rows=5):
        found_in_chunks = run()
    assert_same(found_in_chunks, expected)


def test_linears_behind_the_trunk_see_whole_windows(monkeypatch):
    model = tiny_model("llama")
    head, tokens = linears(model, ["lm_head"]), windows()
    clipped = Gradients(clip=(0.5, 1.5), trim=0.125)
    expected = collect(model, head, tokens, everywhere(head), batch_size=4, gradients=clipped)
    x, g = observed(model, head, tokens)["lm_head"]
    one = collect(model, head, tokens, everywhere(head), batch_size=4)["lm_head"]
    assert distance(one.grad_gram, torch.einsum("nto,ntp->op", g, g)) < DEFINITION
    assert distance(one.gram, torch.einsum("nti,ntj->ij", x, x)) < DEFINITION
    monkeypatch.setattr("compressor.models.head.CPU_CHUNK", 1)
    monkeypatch.setattr("compressor.models.head.LEAST_ROWS", 1)
    again = collect(model, head, tokens, everywhere(head), batch_size=1, gradients=clipped)
    assert_same(again, expected)


@pytest.mark.parametrize("width", [1, 128, 129, 300, 515])
def test_second_moments_by_halves_are_those_of_one_product(width):
    x = torch.randn(40, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moment = second_moment(x)
    torch.testing.assert_close(moment, x.T @ x, rtol=1e-12, atol=1e-12)


def test_waves_keep_to_the_budget_and_siblings_together(llama):
    found = llama[1]
    needs = everywhere(found, GRAM)
    assert len(waves(found, needs, None)) == 1
    width = 8 * 32**2
    passes = waves(found, needs, 2 * width)
    assert [name for wave in passes for name in wave] == list(found)
    for wave in passes:
        inputs = {info.feeds: 8 * info.in_features**2 for info in wave.values()}
        assert sum(inputs.values()) <= 2 * width or len(inputs) == 1
    assert sum(len({info.feeds for info in wave.values()}) for wave in passes) == 8
    assert waves(found, {}, None) == []


def test_clipping_bounds_each_token_by_the_mean_norm_of_its_window(llama):
    model, found = llama
    low, high = 0.5, 1.5
    stats = collect(
        model, found, windows(), everywhere(found), gradients=Gradients(clip=(low, high))
    )
    for name, (x, g) in observed(model, found, windows()).items():
        x, g = x[:, :-1], g[:, :-1]
        norms = g.norm(dim=-1, keepdim=True)
        mean = norms.mean(1, keepdim=True)
        clipped = (
            g * norms.clamp(low * mean, high * mean) / norms
        ).nan_to_num()  # q of the first position has no gradient
        assert (
            distance(stats[name].grad_gram, torch.einsum("nto,ntp->op", clipped, clipped))
            < DEFINITION
        )
        assert (
            distance(
                stats[name].fisher,
                (clipped.square().sum(-1, keepdim=True) * x.square()).sum((0, 1)),
            )
            < DEFINITION
        )


def test_trimming_drops_positions_at_both_ends(llama):
    model, found = llama
    stats = collect(model, found, windows(), everywhere(found), gradients=Gradients(trim=0.25))
    for name, (x, g) in observed(model, found, windows()).items():
        x, g = x[:, 3:9], g[:, 3:9]
        assert (stats[name].tokens, stats[name].grad_tokens) == (windows().numel(), 6 * 6)
        assert distance(stats[name].grad_gram, torch.einsum("nto,ntp->op", g, g)) < DEFINITION
        assert (
            distance(
                stats[name].fisher, (g.square().sum(-1, keepdim=True) * x.square()).sum((0, 1))
            )
            < DEFINITION
        )


def test_sampled_labels_come_from_the_model(llama):
    """A model that is certain of its own next token has no gradient under sampled labels, and a
    large one under the data's.
    """
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight *= 1e4
    found = {name: info for name, info in linears(model).items() if name.endswith("down_proj")}
    generator = torch.Generator().manual_seed(0)
    needs = everywhere(found, frozenset({"grad_gram"}))
    sampled = collect(
        model, found, windows(), needs, gradients=Gradients(labels="sampled"), generator=generator
    )
    data = collect(model, found, windows(), needs)
    for name in found:
        assert sampled[name].grad_gram.trace() < 1e-6 * data[name].grad_gram.trace()
        assert sampled[name].grad_tokens == data[name].grad_tokens


def test_sampled_labels_follow_the_generator(llama):
    model, found = llama
    runs = [
        collect(
            model,
            found,
            windows(),
            everywhere(found),
            gradients=OPTIONS["sampled"],
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (0, 0, 1)
    ]
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(runs[0][name].grad_gram, runs[1][name].grad_gram)
    assert distance(runs[2][name].grad_gram, runs[0][name].grad_gram) > 1e-2


def test_sampled_labels_have_the_model_s_frequencies():
    """With uniform logits each label is equally likely: the expected second moment of the logit
    gradient is known.
    """
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    head = linears(model, ["lm_head"])
    tokens = windows(count=40, length=64)
    gradients = Gradients(labels="sampled")
    stats = collect(
        model,
        head,
        tokens,
        {"lm_head": frozenset({"grad_gram"})},
        gradients=gradients,
        generator=torch.Generator().manual_seed(0),
    )
    counts = (
        stats["lm_head"].grad_gram.diagonal() / stats["lm_head"].grad_tokens
    )  # E(1{label} − 1/V)² = (1 − 1/V) / V
    assert (counts * VOCABULARY / (1 - 1 / VOCABULARY) - 1).abs().mean() < 0.25
    assert abs(counts.mean().item() * VOCABULARY / (1 - 1 / VOCABULARY) - 1) < 1e-3


def test_the_pass_ends_behind_the_last_needed_block(llama):
    model, found = llama
    ran = []
    watched = (model.model.layers[0], model.model.layers[1], model.model.norm, model.lm_head)
    handles = [
        module.register_forward_pre_hook(lambda module, args: ran.append(module))
        for module in watched
    ]
    first = {name: info for name, info in found.items() if info.block == 0}
    collect(model, found, windows(2), everywhere(first, GRAM))
    assert ran == [model.model.layers[0]]
    ran.clear()
    collect(model, found, windows(2), everywhere(found, GRAM))
    assert ran == [model.model.layers[0], model.model.layers[1]]
    for handle in handles:
        handle.remove()


def test_the_model_is_left_as_it_was(llama):
    model = tiny_model("llama").train()
    found, tokens = linears(model), windows(2)
    model.model.norm.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for fields in (ALL, GRAM):
        collect(model, found, tokens, everywhere(found, fields))
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and parameter.requires_grad == (name != "model.norm.weight")
        assert torch.equal(parameter, before[name])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_backward_pass_starts_where_it_is_needed(llama):
    """Nothing before the first block that needs gradients takes part in the backward pass."""
    model, found = llama
    last = {name: info for name, info in found.items() if info.block == 1}
    reached = []
    handle = model.model.layers[0].register_forward_hook(
        lambda module, args, output: reached.append(output.requires_grad)
    )
    collect(model, found, windows(2), everywhere(last))
    handle.remove()
    assert set(reached) == {False}


def test_half_precision_is_summed_in_single():
    model = tiny_model("llama")
    single = collect(model, linears(model), windows(), everywhere(linears(model)))
    model = model.bfloat16()
    found = linears(model)
    half = collect(model, found, windows(), everywhere(found))
    first = "model.layers.0.self_attn.q_proj"
    x = observed(model, found, windows())[first][0].flatten(0, 1)
    assert distance(half[first].gram, x.T @ x) < PIECES
    assert distance(half[first].gram, single[first].gram) < HALF
    assert {one.gram.dtype for one in half.values()} == {torch.float64}


def test_progress_is_told_of_every_pass(llama):
    model, found = llama
    told = []

    def progress(items, title, total=None):
        told.append((title, len(items)))
        return items

    collect(model, found, windows(), everywhere(found, GRAM), batch_size=4, progress=progress)
    assert told == [("calibrate", 2)]
    told.clear()
    collect(
        model, found, windows(), everywhere(found, GRAM), batch_size=4, memory=1, progress=progress
    )
    assert told == [(f"calibrate, pass {number} of 8", 2) for number in range(1, 9)]
