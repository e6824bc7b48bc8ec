"""Pairs that share a dictionary: the objective by hand, equal Grams, sizes, whole models with an
even and an odd number of blocks.
"""

import pytest
import torch
from support.models import read_json, save_tiny
from support.sameness import assert_same_output
from support.units import compress_members
from torch import Tensor

import compressor
from compressor.errors import ConfigError, NumericalError
from compressor.linears import Dense, Dictionary
from compressor.methods import build
from compressor.methods.base import Member
from compressor.methods.dictionary import geopair
from compressor.methods.dictionary.base import basis_of
from compressor.pipeline import run
from compressor.recipe.load import load_recipe
from compressor.statistics import LinearStats

FINE = {"atom_step": 1, "ratios": [1.5, 2.0]}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def part(
    name: str,
    height: int,
    width: int = 12,
    seed: int = 0,
    inputs: int | None = None,
    bias: bool = False,
) -> Member:
    """A linear whose inputs are correlated; `inputs`: seed of these, by default another one for
    each linear.
    """
    mixing = random(width, width, seed=10 + (seed if inputs is None else inputs)) * torch.logspace(
        0, -1, width, dtype=torch.float64
    )
    x = random(150, width, seed=20) @ mixing
    dense = Dense(
        random(height, width, seed=seed), random(height, seed=30) if bias else None, torch.float64
    )
    return Member(name, dense, LinearStats(tokens=150, gram=x.T @ x))


def pair(**options) -> dict[str, Member]:
    return {
        name: part(name, height, seed=seed, **options)
        for seed, (name, height) in enumerate({"a.up": 20, "b.up": 26}.items())
    }


def objective(weights, grams, atoms: Tensor, codes: Tensor) -> Tensor:
    lost = [
        weight - code.T @ atoms
        for weight, code in zip(
            weights, codes.split([len(weight) for weight in weights], 1), strict=True
        )
    ]
    return sum((each @ gram * each).sum() for each, gram in zip(lost, grams, strict=True))


@pytest.mark.parametrize("options", [{}, {"relative": False}, {"start": "plain"}], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_contract(options, bias):
    parts = pair(bias=bias)
    method = build("geopair", FINE | options | {"anchors": None, "rounds": 6})
    state = method.prepare_unit("pair", parts)
    curve = method.candidates(state)
    offered = {str(size.setting): size.bits for size in method.sizes_of_unit(parts)}
    assert len(curve.candidates) > 5 and curve.dense_bits == sum(
        each.dense.bits for each in parts.values()
    )
    for candidate in curve.candidates[::3]:
        modules = compress_members(method, state, candidate.setting, state.parts)
        assert [module.lender for module in modules.values()] == [None, "a.up"]
        assert (
            candidate.bits
            == sum(module.bits() for module in modules.values())
            == offered[str(candidate.setting)]
        )
        assert candidate.parameters == sum(
            module.stored_parameters() for module in modules.values()
        )
        assert candidate.multiply_adds == sum(module.multiply_adds() for module in modules.values())
        assert method.measure_unit(state, modules) == pytest.approx(
            candidate.error, rel=1e-6, abs=1e-10
        )
        for name, module in modules.items():
            assert (module.codes() != 0).sum(1).max() <= candidate.setting["nonzeros"]
            assert bias == (module.bias is not None) and (
                not bias or torch.equal(module.bias, parts[name].dense.bias)
            )


def test_bits_by_hand():
    sizes = build("geopair", {"atom_step": 8, "ratios": [2.0]}).sizes_of_unit(pair())
    size = next(size for size in sizes if size.setting == {"atoms": 8, "nonzeros": 4})
    assert size.parameters == 8 * 12 + 4 * 20 + 4 * 26
    assert size.bits == 64 * size.parameters + 8 * 20 + 8 * 26  # a mask of 8 bits for each output


@pytest.mark.parametrize("options", [{}, {"relative": False}, {"start": "plain"}], ids=str)
def test_the_dictionary_is_the_least_squares_one_and_rounds_never_lose_to_the_start(options):
    parts = pair()
    found = {}
    for rounds in (0, 1, 12):
        method = build("geopair", options | {"rounds": rounds})
        state = method.prepare_unit("pair", parts)
        atoms, codes, found[rounds] = method.fit(state, 7, 3)
        assert found[rounds] == pytest.approx(
            objective(state.weights, state.grams, atoms, codes).item(), rel=1e-9
        )
        # brute force: vec(S_iᵀ Dᵀ L_i) = (S_iᵀ ⊗ L_iᵀ) vec(Dᵀ), both linears below each other
        roots = [torch.linalg.cholesky(gram) for gram in state.grams]
        heights = [len(weight) for weight in state.weights]
        pairs = zip(codes.split(heights, 1), roots, strict=True)
        system = torch.cat(
            [torch.kron(code.T.contiguous(), root.T.contiguous()) for code, root in pairs]
        )
        target = torch.cat(
            [(weight @ root).flatten() for weight, root in zip(state.weights, roots, strict=True)]
        )
        exact = torch.linalg.lstsq(system, target[:, None]).solution.view(7, 12)
        torch.testing.assert_close(atoms, exact, rtol=1e-3, atol=1e-4)
        assert (
            found[rounds] <= objective(state.weights, state.grams, state.start[:7], codes) + 1e-12
        )
    assert found[12] < 0.97 * found[0] and found[12] <= found[1] <= found[0]


def test_the_best_round_is_kept_when_coding_goes_astray(monkeypatch):
    state = build("geopair", {}).prepare_unit("pair", pair())
    wanted = build("geopair", {"rounds": 0}).fit(state, 7, 3)
    coded = geopair.code_columns
    monkeypatch.setattr(
        geopair,
        "code_columns",
        lambda gram, right, codes, *rest: (
            codes * 0 if codes.any() else coded(gram, right, codes, *rest)
        ),
    )
    found = build("geopair", {"rounds": 1}).fit(state, 7, 3)
    assert found[2] == pytest.approx(wanted[2])
    assert_same_output(found[1], wanted[1])


def test_every_code_kept_is_the_best_subspace_of_the_first_directions():
    method = build("geopair", {"rounds": 0, "steps": 30})
    state = method.prepare_unit("pair", pair())
    lost = sum(
        (weight @ gram * weight).sum() - (torch.linalg.solve(h, r) * r).sum()
        for weight, gram in zip(state.weights, state.grams, strict=True)
        for h, r in [
            (state.start[:5] @ gram @ state.start[:5].T, state.start[:5] @ gram @ weight.T)
        ]
    )
    assert state.energy - state.coordinates[:5].square().sum().item() == pytest.approx(
        lost.item(), rel=1e-9
    )
    assert method.fit(state, 5, 5)[2] <= lost * (1 + 1e-6)


def test_equal_grams_are_the_problem_of_one_stacked_linear():
    parts = pair(inputs=0)
    method = build("geopair", {"shrink_gram": 0.01, "relative": False})
    state = method.prepare_unit("pair", parts)
    whole = Dense(torch.cat([each.dense.weight for each in parts.values()]), None, torch.float64)
    basis = basis_of("whole", whole, parts["a.up"].stats, "gram", 0.01, 0.1)
    assert state.basis is None
    torch.testing.assert_close(2 * state.energy, 2 * basis.energy)
    torch.testing.assert_close(
        state.coordinates.square(), basis.coordinates.square(), rtol=1e-6, atol=1e-8
    )
    modules = compress_members(method, state, {"atoms": 7, "nonzeros": 3}, state.parts)
    together = torch.cat([module.to_dense() for module in modules.values()])
    lost = basis.metric.energy(whole.weight - together) / basis.energy
    assert method.measure_unit(state, modules) == pytest.approx(lost, rel=1e-9)


def test_zero_weights_cost_nothing():
    parts = pair()
    for names in (["a.up"], ["a.up", "b.up"]):
        for name in names:
            parts[name].dense.weight.zero_()
        method = build("geopair", {"anchors": 2, "rounds": 3})
        state = method.prepare_unit("pair", parts)
        modules = compress_members(method, state, {"atoms": 6, "nonzeros": 3}, state.parts)
        assert not modules["a.up"].to_dense().any() and method.candidates(state).candidates
    assert method.measure_unit(state, modules) == 0.0


def test_what_cannot_share_is_refused():
    method, parts = build("geopair", {}), pair()
    with pytest.raises(
        ConfigError, match=r"a\.up and b\.up: 12 and 14 inputs cannot share a dictionary"
    ):
        method.sizes_of_unit({"a.up": parts["a.up"], "b.up": part("b.up", 26, 14)})
    with pytest.raises(ConfigError, match=r"one has a bias and one has none"):
        method.prepare_unit("pair", parts | {"b.up": part("b.up", 26, bias=True)})
    parts["a.up"].stats.gram.zero_()
    with pytest.raises(NumericalError, match=r"a\.up: the Gram .*shrink_gram"):
        method.prepare_unit("pair", parts)


SMALL = [
    "calibration.windows=6",
    "calibration.length=32",
    "calibration.heldout=2",
    "evaluation.enabled=false",
    "model.device=cpu",
]
ENGINE = "{name: geopair, options: {rounds: 3}}"
ODD = f"method=[{{candidates: [{ENGINE}]}}]"


@pytest.fixture
def recipe(text_file, tmp_path):
    def made(*overrides: str, blocks: int = 3):
        folder = tmp_path / f"llama{blocks}"
        if not folder.exists():
            save_tiny(folder, "llama", num_hidden_layers=blocks)
        return load_recipe(
            "geopair",
            [*SMALL, *overrides],
            {"model.name": str(folder), "calibration.source": str(text_file)},
        )

    return made


@torch.no_grad()
def test_a_whole_run_with_an_odd_number_of_blocks(recipe, tmp_path):
    run.compress(recipe(ODD), tmp_path / "out")
    model, _ = compressor.load(tmp_path / "out")
    lenders = {
        name: module.lender
        for name, module in model.named_modules()
        if isinstance(module, Dictionary)
    }
    assert len(lenders) == 3 * 7
    for name, lender in lenders.items():
        assert lender == (name.replace("layers.1", "layers.0") if "layers.1" in name else None), (
            name
        )
    plan = read_json(tmp_path / "out" / "plan.json")["linears"]
    shared = [plan[f"model.layers.{block}.mlp.up_proj"]["members"] for block in range(3)]
    assert shared == 2 * [["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]] + [
        ["model.layers.2.mlp.up_proj"]
    ]
    whole = sum(choice["dense_bits"] for choice in plan.values())
    assert 0.65 * whole < sum(choice["bits"] for choice in plan.values()) <= 0.8 * whole
    assert run.verify(tmp_path / "out") == []
    run.compress(recipe(ODD), tmp_path / "again", plan=tmp_path / "out" / "plan.json")
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_pairs_compete_in_the_knapsack_and_stay_as_planned_in_order(recipe, tmp_path):
    several = f"method=[{{candidates: [{ENGINE}, {{name: low_rank}}]}}]"
    knapsack = "allocation={kind: knapsack, keep: 0.6, damage: relative_error}"
    report = run.compress(
        recipe(several, knapsack, "calibration.sequential=true"), tmp_path / "out"
    )
    methods = {
        choice["method"] for choice in read_json(tmp_path / "out" / "plan.json")["linears"].values()
    }
    assert "geopair" in methods and report["kept"]["targets"] <= 0.6
    assert run.verify(tmp_path / "out") == []


def test_a_plan_is_outlined_and_stays_within_its_size(recipe):
    outlined = run.plan(recipe())
    assert outlined["kept"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            (f"method=[{{targets: lm_head, candidates: [{ENGINE}]}}]",),
            r"lm_head: its role is unknown, and .* other modules: pair \(q, k",
        ),
        (
            ("compensation.rank=2",),
            r"q_proj: 'geopair' fits pairs of linears, which get no residuals",
        ),
        (
            (
                f"method=[{{targets: '*.0.*', candidates: [{ENGINE}]}}, {{candidates: [{ENGINE}], "
                f"dense: false}}]",
            ),
            "one entry",
        ),
    ],
)
def test_recipes_that_cannot_work_are_refused(overrides, message, recipe, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run.compress(recipe(*overrides, blocks=2), tmp_path / "out")
