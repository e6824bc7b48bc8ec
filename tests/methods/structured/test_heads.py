"""Attention modules: value dimensions, heads and rotary pairs, on hand-made projections and in
whole models.
"""

import pytest
import torch
from safetensors.torch import save_file
from support.models import VOCABULARY, save_tiny
from support.units import compress_members

import compressor
from compressor.errors import ConfigError
from compressor.linears import Dense
from compressor.methods import build
from compressor.methods.base import Member
from compressor.pipeline import run
from compressor.recipe.load import load_recipe
from compressor.statistics import LinearStats

DIM, KV, GROUP, WIDTH = 4, 2, 2, 10  # two key–value heads for two query heads each


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def attention():
    weights = {
        role: random(rows, WIDTH, seed=seed)
        for seed, (role, rows) in enumerate({"q": 16, "k": 8, "v": 8}.items())
    }
    return weights | {"o": random(WIDTH, 16, seed=3)}, random(200, WIDTH, seed=4)


def mixed(weights, x, bias=None) -> torch.Tensor:
    """Inputs of o: values of every query head, averaged over some positions as attention would,
    another way for each head.
    """
    values = (
        (x @ weights["v"].T + (0 if bias is None else bias))
        .view(-1, KV, DIM)
        .repeat_interleave(GROUP, 1)
    )
    weight = torch.softmax(random(KV * GROUP, len(x), len(x), seed=6) * 2, -1)
    return torch.einsum("hst,thd->shd", weight, values).flatten(1)


def parts_of(weights, x, roles: str, biases=None) -> dict[str, Member]:
    found = {}
    for role in roles:
        inputs = mixed(weights, x, (biases or {}).get("v")) if role == "o" else x
        gradients = random(len(x), len(weights[role]), seed=7)
        stats = LinearStats(
            tokens=len(x),
            gram=inputs.T @ inputs,
            grad_gram=gradients.T @ gradients,
            grad_tokens=len(x),
        )
        dense = Dense(weights[role], (biases or {}).get(role), torch.float64, head_dim=DIM)
        found[role] = Member(role, dense, stats, role)
    return found


METHODS = {"value_dims": "vo", "heads": "qkvo", "rotary_pairs": "qk"}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (name, options)
        for name in ("value_dims", "heads")
        for options in ({}, {"metric": "two_sided"}, {"score": "transact"})
    ]
    + [("rotary_pairs", {})],
)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_contract(attention, name, options, biased):
    weights, x = attention
    biases = (
        {role: random(len(weight), seed=8) for role, weight in weights.items()} if biased else None
    )
    method, parts = build(name, options), parts_of(weights, x, METHODS[name], biases)
    state = method.prepare_unit("attn", parts)
    curve = method.candidates(state)
    offered = {tuple(size.setting.items()): size.bits for size in method.sizes_of_unit(parts)}
    assert curve.candidates and all(
        one.error >= two.error
        for one, two in zip(curve.candidates, curve.candidates[1:], strict=False)
    )
    for candidate in curve.candidates:
        modules = compress_members(method, state, candidate.setting, state.parts.values())
        assert (
            candidate.bits
            == sum(module.bits() for module in modules.values())
            == offered[tuple(candidate.setting.items())]
        )
        assert candidate.parameters == sum(
            module.stored_parameters() for module in modules.values()
        )
        assert candidate.multiply_adds == sum(module.multiply_adds() for module in modules.values())
        assert method.measure_unit(state, modules) == pytest.approx(
            candidate.error, rel=1e-7, abs=1e-12
        )


def test_value_dimensions_that_carry_nothing_leave_at_no_cost(attention):
    """Values of one head in a plane, and an output that sees a plane of the other head only: four
    dimensions are free.
    """
    weights, x = attention
    weights["v"][:DIM] = random(DIM, 2, seed=11) @ random(2, WIDTH, seed=12)
    weights["o"][:, 8:] = torch.cat(
        [random(WIDTH, 2, seed=13) @ random(2, DIM, seed=15)] * 2, dim=1
    )
    method = build("value_dims", {"ridge": 1e-12})
    state = method.prepare_unit("attn", parts_of(weights, x, "vo"))
    modules = compress_members(method, state, {"value_dims": 4}, state.parts.values())
    wanted = mixed(weights, x) @ weights["o"].T
    found = mixed({"v": modules["v"].to_dense()}, x) @ modules["o"].to_dense().T
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    fewer = compress_members(method, state, {"value_dims": 3}, state.parts.values())
    worse = mixed({"v": fewer["v"].to_dense()}, x) @ fewer["o"].to_dense().T
    assert (worse - wanted).square().sum() > 100 * (found - wanted).square().sum()


def test_the_error_of_value_dimensions_is_that_of_the_output(attention):
    weights, x = attention
    method = build("value_dims", {"ridge": 1e-12})
    state = method.prepare_unit("attn", parts_of(weights, x, "vo"))
    wanted = mixed(weights, x) @ weights["o"].T
    for candidate in method.candidates(state).candidates:
        modules = compress_members(method, state, candidate.setting, state.parts.values())
        found = mixed({"v": modules["v"].to_dense()}, x) @ modules["o"].to_dense().T
        assert (found - wanted).square().sum() / wanted.square().sum() == pytest.approx(
            candidate.error, rel=1e-4, abs=1e-9
        )


def test_a_head_that_the_output_ignores_leaves_first_with_its_queries(attention):
    weights, x = attention
    weights["o"][:, :8] = 0.0
    method = build("heads", {})
    state = method.prepare_unit("attn", parts_of(weights, x, "qkvo"))
    modules = compress_members(method, state, {"heads": 1}, state.parts.values())
    assert (
        modules["o"].places("columns").tolist()
        == list(range(8, 16))
        == modules["q"].places("rows").tolist()
    )
    assert (
        modules["k"].places("rows").tolist() == modules["v"].places("rows").tolist() == [4, 5, 6, 7]
    )


@pytest.mark.parametrize(
    ("name", "roles", "size"), [("value_dims", "vo", 1), ("heads", "qkvo", DIM)]
)
def test_transact_goes_by_the_norm_of_what_o_reads_over_all_query_heads(
    attention, name, roles, size
):
    weights, x = attention
    z = mixed(weights, x)
    energy = (
        z.square().sum(0).view(KV, GROUP, DIM).sum(1).view(-1, size).sum(1)
    )  # of every value dimension or head
    method = build(name, {"score": "transact", "ridge": 1e-12})
    state = method.prepare_unit("attn", parts_of(weights, x, roles))
    assert state.order.tolist() == energy.argsort().tolist()
    modules = compress_members(method, state, {method.name: len(energy) // 2}, state.parts.values())
    units = energy.argsort(descending=True)[: len(energy) // 2].sort().values
    rows = (units[:, None] * size + torch.arange(size)).flatten()
    assert modules["v"].places("rows").tolist() == rows.tolist()
    assert torch.equal(modules["v"].matrix(), weights["v"][rows])  # in the basis that the model has
    columns = modules["o"].places("columns")
    refitted = torch.linalg.lstsq(z[:, columns], z @ weights["o"].T).solution.T
    torch.testing.assert_close(modules["o"].matrix(), refitted, rtol=1e-5, atol=1e-6)


def test_pairs_stay_or_leave_together_in_all_query_heads(attention):
    weights, x = attention
    weights["k"][[1, 3]] = 0.0  # the second pair of the first key head never matters
    method = build("rotary_pairs", {})
    state = method.prepare_unit("attn", parts_of(weights, x, "qk"))
    modules = compress_members(method, state, {"pairs": 3}, state.parts.values())
    assert modules["k"].places("rows").tolist() == [0, 2, 4, 5, 6, 7]
    assert modules["q"].places("rows").tolist() == [0, 2, 4, 6, *range(8, 16)]
    query, key = x @ weights["q"].T, x @ weights["k"].T
    by_hand = [
        sum(
            ((query[:, 4 * j + i] ** 2).mean() + (query[:, 4 * j + i + 2] ** 2).mean())
            for j in (2, 3)
        )
        * ((key[:, 4 + i] ** 2).mean() + (key[:, 6 + i] ** 2).mean())
        for i in (0, 1)
    ]
    torch.testing.assert_close(state.scores[1], torch.stack(by_hand))


def recipe(kind: str, folder, *overrides: str, config: str = "modules"):
    save_file(
        {
            "windows": torch.randint(
                3, VOCABULARY, (12, 32), generator=torch.Generator().manual_seed(0)
            )
        },
        folder / "tokens.safetensors",
    )
    small = [
        "calibration.windows=8",
        "calibration.length=32",
        "calibration.heldout=2",
        "evaluation.enabled=false",
        "model.device=cpu",
    ]
    named = {
        "model.name": str(save_tiny(folder / kind, kind)),
        "calibration.source": f"{folder / 'tokens.safetensors'}:windows",
    }
    return load_recipe(config, [*small, "allocation.keep=0.6", *overrides], named)


HEADS = "method=[{targets: 'role:attention', candidates: [{name: heads}]}]"


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [("llama", ()), ("qwen2", ()), ("mistral", ()), ("gemma2", ()), ("qwen2", (HEADS,))],
)
@torch.no_grad()
def test_token_by_token_equals_the_whole_window_and_the_dense_export(kind, overrides, tmp_path):
    report = run.compress(recipe(kind, tmp_path, *overrides), tmp_path / "out")
    errors: dict[tuple[str, str], set[float]] = {}
    for linear in report["linears"]:
        errors.setdefault((linear["name"].rpartition(".")[0], linear["method"]), set()).add(
            linear["error"]
        )
    assert any(found != {0.0} for found in errors.values())
    assert all(
        len(found) == 1 for found in errors.values()
    )  # of the module: one by one, linears in another basis are far off
    pruned, _ = compressor.load(tmp_path / "out")
    pruned.set_attn_implementation("eager")
    ids = torch.arange(3, 19).view(1, -1)
    logits, cache, steps = pruned(ids).logits, None, []
    for place in range(ids.shape[1]):
        out = pruned(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), logits, rtol=1e-3, atol=1e-4)
    run.export(tmp_path / "out", tmp_path / "dense")
    torch.testing.assert_close(
        compressor.load(tmp_path / "dense")[0](ids).logits, logits, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("qwen3", r"self_attn.*normalised; leave it out of the targets"),
        (
            "phi3",
            r"target 'role:qk' selects no linear of this model; its roles are down, gate_up, o, qkv",
        ),
        (
            "gpt2",
            r"target 'role:qk' selects no linear of this model; its roles are fc1, fc2, o, qkv",
        ),
    ],
)
def test_layouts_that_are_not_known_are_refused(kind, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run.compress(recipe(kind, tmp_path), tmp_path / "out")
