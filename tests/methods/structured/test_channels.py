"""Feed-forward channels: function-preserving removals, papers' scores by hand, nested widths, whole
models.
"""

import pytest
import torch
from safetensors.torch import save_file
from support.models import VOCABULARY, save_tiny, tiny_model
from support.units import compress_members
from torch.nn import functional

from compressor.errors import ConfigError
from compressor.linears import Dense
from compressor.methods import build
from compressor.methods.base import Member
from compressor.statistics import LinearStats

SHAPES = {"gate": (12, 6), "up": (12, 6), "down": (6, 12)}


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hidden_of(weights, x):
    return functional.silu(x @ weights["gate"].T) * (x @ weights["up"].T)


def parts_of(weights, x, biases=None) -> dict[str, Member]:
    """Parts with the statistics that a calibration on x would give."""
    hidden, found = hidden_of(weights, x), {}
    for role, weight in weights.items():
        inputs = hidden if role == "down" else x
        gradients = random(len(x), len(weight), seed=5)
        stats = LinearStats(
            tokens=len(x),
            gram=inputs.T @ inputs,
            sum=inputs.sum(0),
            grad_gram=gradients.T @ gradients,
            grad_tokens=len(x),
        )
        found[role] = Member(
            role,
            Dense(weight, None if biases is None else biases.get(role), torch.float64),
            stats,
            role,
        )
    return found


@pytest.fixture
def block():
    return {
        role: random(*shape, seed=seed) for seed, (role, shape) in enumerate(SHAPES.items())
    }, random(300, 6, seed=9)


OPTIONS = pytest.mark.parametrize(
    "options",
    [
        {},
        {"metric": "two_sided"},
        {"refit": "affine"},
        {"refit": "none"},
        {"score": "lorap", "refit": "none", "keep_least": True},
        {"score": "lorap"},
        {"score": "flap", "refit": "affine"},
        {"score": "wanda", "refit": "none"},
        {"score": "transact"},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)


@OPTIONS
def test_contract(block, options):
    weights, _ = block
    method, parts = build("channels", options), parts_of(*block)
    state = method.prepare_unit("mlp", parts)
    curve = method.candidates(state)
    assert [size.setting["channels"] for size in curve.candidates] == list(
        range(1, 1 + len(curve.candidates))
    )
    assert all(
        one.error >= two.error - 1e-12
        for one, two in zip(curve.candidates, curve.candidates[1:], strict=False)
    ) or "none" in str(options)
    offered = {size.setting["channels"]: size for size in method.sizes_of_unit(parts)}
    for candidate in curve.candidates:
        modules = compress_members(method, state, candidate.setting, state.parts.values())
        assert (
            candidate.bits
            == sum(module.bits() for module in modules.values())
            == offered[candidate.setting["channels"]].bits
        )
        assert candidate.parameters == sum(
            module.stored_parameters() for module in modules.values()
        )
        assert candidate.multiply_adds == sum(module.multiply_adds() for module in modules.values())
        assert method.measure_unit(state, modules) == pytest.approx(
            candidate.error, rel=1e-8, abs=1e-12
        )
        kept = {
            role: set(module.places("columns" if role == "down" else "rows").tolist())
            for role, module in modules.items()
        }
        assert (
            kept["gate"] == kept["up"] == kept["down"]
            and len(kept["down"]) == candidate.setting["channels"]
        )
    for part, (role, weight) in zip(parts.values(), weights.items(), strict=True):
        assert torch.equal(part.dense.weight, weight), role


def outputs(method, block, channels: int, parts=None):
    """Hidden activations of the pruned block through its last linear, and those of the dense
    one.
    """
    weights, x = block
    state = method.prepare_unit("mlp", parts or parts_of(*block))
    modules = compress_members(method, state, {"channels": channels}, state.parts.values())
    hidden = functional.silu(modules["gate"](x)) * modules["up"](x)
    return modules["down"](hidden), hidden_of(weights, x) @ weights["down"].T, modules


def test_a_duplicated_channel_is_removed_at_no_cost_and_the_other_doubles(block):
    weights, x = block
    weights["gate"][7], weights["up"][7] = weights["gate"][2], weights["up"][2]
    weights["down"][:, 7] = weights["down"][:, 2]
    method = build("channels", {"ridge": 1e-12})
    found, wanted, modules = outputs(method, (weights, x), 11)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    left = ({2, 7} & set(modules["down"].places("columns").tolist())).pop()
    torch.testing.assert_close(
        modules["down"].to_dense()[:, left], 2 * weights["down"][:, 2], rtol=1e-4, atol=1e-4
    )


def test_a_constant_channel_is_removed_at_no_cost_by_the_affine_refit_alone(block):
    weights, x = block
    x = torch.cat([x[:, :5], torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    weights["gate"][4], weights["up"][4] = 0.0, 0.0
    weights["gate"][4, 5], weights["up"][4, 5] = 2.0, 3.0  # depends on the constant input alone
    found, wanted, modules = outputs(
        build("channels", {"refit": "affine", "ridge": 1e-12}), (weights, x), 11
    )
    assert 4 not in modules["down"].places("columns").tolist()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    without = outputs(build("channels", {"refit": "linear", "ridge": 1e-12}), (weights, x), 11)[0]
    assert (without - wanted).square().sum() > 100 * (found - wanted).square().sum()


def test_lorap_scores_by_hand_and_the_least_important_are_kept(block):
    weights, x = block
    hidden = hidden_of(weights, x)
    s_x, s_h = x.square().mean(0), hidden.square().mean(0)
    score = [
        (weights["gate"][c] ** 2 * s_x).sum().sqrt()
        + (weights["up"][c] ** 2 * s_x).sum().sqrt()
        + weights["down"][:, c].norm() * s_h[c].sqrt()
        for c in range(12)
    ]
    by_score = sorted(range(12), key=lambda c: float(score[c]))
    method = build("channels", {"score": "lorap", "refit": "none"})
    assert method.prepare_unit("mlp", parts_of(*block)).order.tolist() == by_score
    wide = {
        "gate": random(200, 6, seed=1),
        "up": random(200, 6, seed=2),
        "down": random(6, 200, seed=3),
    }
    kept = (
        build("channels", {"score": "lorap", "refit": "none", "keep_least": True})
        .prepare_unit("mlp", parts_of(wide, x))
        .order.tolist()
    )
    plain = method.prepare_unit("mlp", parts_of(wide, x)).order.tolist()
    assert kept == plain[2:] + plain[:2]  # 1 % of 200


def test_transact_goes_by_the_norm_of_the_activations_and_refits_the_rest(block):
    hidden, down = hidden_of(*block), block[0]["down"]
    method = build("channels", {"score": "transact", "ridge": 1e-12})
    state = method.prepare_unit("mlp", parts_of(*block))
    assert state.order.tolist() == hidden.square().sum(0).argsort().tolist()
    reader = compress_members(method, state, {"channels": 5}, state.parts.values())["down"]
    kept = reader.places("columns")
    refitted = torch.linalg.lstsq(hidden[:, kept], hidden @ down.T).solution.T
    torch.testing.assert_close(reader.matrix(), refitted, rtol=1e-5, atol=1e-6)


def test_the_refit_never_loses_to_dropping(block):
    with_refit, without = (
        build("channels", {"score": "wanda", "refit": refit, "ridge": 0.0})
        for refit in ("linear", "none")
    )
    one, two = (
        method.candidates(method.prepare_unit("mlp", parts_of(*block))).candidates
        for method in (with_refit, without)
    )
    assert all(a.error <= b.error * (1 + 1e-9) for a, b in zip(one, two, strict=True))
    assert any(a.error < 0.9 * b.error for a, b in zip(one, two, strict=True))


def test_dead_channels_leave_first_and_cost_nothing(block):
    weights, x = block
    weights["gate"][3], weights["up"][8] = 0.0, 0.0
    for options in ({}, {"ridge": 0.0}, {"refit": "affine", "ridge": 0.0}):
        method = build("channels", options)
        state = method.prepare_unit("mlp", parts_of(weights, x))
        assert set(state.order[:2].tolist()) == {3, 8}
        assert state.errors[1] < (1e-10 if "ridge" in options else 1e-2) * state.energy


def test_rescaling_up_against_down_changes_nothing(block):
    weights, x = block
    scale = torch.exp(random(12, seed=4))
    scaled = weights | {"up": weights["up"] * scale[:, None], "down": weights["down"] / scale}
    method = build("channels", {"ridge": 0.0})
    one, two = (method.prepare_unit("mlp", parts_of(each, x)) for each in (weights, scaled))
    assert one.order.tolist() == two.order.tolist()
    torch.testing.assert_close(one.errors, two.errors, rtol=1e-7, atol=1e-12)


def test_what_is_no_feed_forward_block_is_refused(block):
    parts = parts_of(*block)
    with pytest.raises(ConfigError, match="mlp: not a feed-forward block"):
        build("channels", {}).prepare_unit("mlp", {"gate": parts["gate"], "up": parts["up"]})
    with pytest.raises(ConfigError, match="mlp: not a feed-forward block"):
        build("channels", {}).prepare_unit("mlp", {"down": parts["down"]})


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "phi3", "gpt2", "opt", "gpt_neox"])
@torch.no_grad()
def test_a_pruned_model_is_the_model_with_its_channels_masked(kind, tmp_path):
    """Through a whole run: logits equal those of the dense model with zeros, also token by token
    with a cache.
    """
    import compressor
    from compressor.models.linears import dense_of, linears
    from compressor.pipeline import run
    from compressor.recipe.load import load_recipe

    source, model = save_tiny(tmp_path / kind, kind), tiny_model(kind)
    save_file(
        {
            "windows": torch.randint(
                3, VOCABULARY, (12, 32), generator=torch.Generator().manual_seed(0)
            )
        },
        tmp_path / "tokens.safetensors",
    )
    small = [
        "calibration.windows=8",
        "calibration.length=32",
        "calibration.heldout=2",
        "evaluation.enabled=false",
        "model.device=cpu",
    ]
    recipe = load_recipe(
        "channels",
        [*small, "allocation.keep=0.6"],
        {
            "model.name": str(source),
            "calibration.source": f"{tmp_path / 'tokens.safetensors'}:windows",
        },
    )
    run.compress(recipe, tmp_path / "out")
    pruned, _ = compressor.load(tmp_path / "out")
    ids = torch.arange(3, 19).view(1, -1)
    logits = pruned(ids).logits
    for name, info in linears(model).items():
        module = pruned.get_submodule(name)
        if hasattr(module, "to_dense"):
            dense = module.to_dense()
            info.module.weight.copy_(dense.T if info.conv1d else dense)
            rows = torch.arange(info.out_features) if module.rows is None else module.places("rows")
            bias = torch.zeros(len(rows)) if module.bias is None else module.bias
            info.module.bias = torch.nn.Parameter(
                torch.zeros(info.out_features).index_copy(0, rows, bias)
            )
            assert dense_of(info, torch.float32).bias is not None
    assert any(hasattr(module, "places") for module in pruned.modules())
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    cache, steps = None, []
    for place in range(ids.shape[1]):
        out = pruned(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2", "opt"])
@torch.no_grad()
def test_uniform_widths_export_as_a_smaller_stock_model(kind, tmp_path):
    import compressor
    from compressor.pipeline import run
    from compressor.recipe.load import load_recipe

    save_file(
        {
            "windows": torch.randint(
                3, VOCABULARY, (12, 32), generator=torch.Generator().manual_seed(0)
            )
        },
        tmp_path / "tokens.safetensors",
    )
    small = [
        "calibration.windows=8",
        "calibration.length=32",
        "calibration.heldout=2",
        "evaluation.enabled=false",
        "model.device=cpu",
    ]
    named = {
        "model.name": str(save_tiny(tmp_path / kind, kind)),
        "calibration.source": f"{tmp_path / 'tokens.safetensors'}:windows",
    }
    recipe = load_recipe(
        "channels", [*small, "allocation.kind=uniform", "allocation.keep=0.6"], named
    )
    run.compress(recipe, tmp_path / "out")
    note = run.export(tmp_path / "out", tmp_path / "dense")["note"]
    model, _ = compressor.load(tmp_path / "dense")
    ids = torch.arange(3, 19).view(1, -1)
    torch.testing.assert_close(
        model(ids).logits, compressor.load(tmp_path / "out")[0](ids).logits, rtol=1e-4, atol=1e-5
    )
    config = model.config
    width = next(
        getattr(config, field)
        for field in ("intermediate_size", "ffn_dim", "n_inner")
        if getattr(config, field, None)
    )
    assert f"feed-forward blocks of {width} channels" in note
    size = [
        sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors"))
        for name in ("dense", kind)
    ]
    assert size[0] < 0.97 * size[1]
