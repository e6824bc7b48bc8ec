"""Sequential solves: equal to the plain definition, targets anchored as the algebra says, nothing
else touched.
"""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from support.activations import windows
from support.jobs import built, exactly, job_of, received
from support.models import read_json, save_tiny, tiny_model
from support.modules import low_rank_like
from support.recipes import recipe
from support.sameness import is_same_output

from compressor import linalg
from compressor.calibrate.streams import solve_in_order
from compressor.errors import ConfigError, NumericalError
from compressor.models.linears import blocks, linears
from compressor.pipeline import run, sequential_solve, stages
from compressor.pipeline.solution import allocate
from compressor.plan import DENSE

BY_HAND = 1e-7  # relative, in float64
KEPT = ["allocation.keep=0.6", "method.0.candidates.0.options.rank_step=1"]
SEQUENTIAL = [*KEPT, "calibration.sequential=true", "output.dtype=float32"]


def by_hand(model, ranks, groups, tokens, anchor, damping):
    """Low-rank weights in the Gram metric, one group after the other, each from full passes of the
    dense and the compressed model.
    """
    compressed, weights = deepcopy(model), {}
    for names in groups:
        x, y = received(model, names[0], tokens), received(compressed, names[0], tokens)
        gram, cross = y.T @ y, x.T @ y
        for name in names:
            weight = model.get_submodule(name).weight.double()
            anchored = (
                weight @ cross + damping * gram.diagonal().mean() * weight
            )  # ridge regression of the dense outputs, towards W
            anchored = torch.linalg.solve(
                gram + damping * gram.diagonal().mean() * torch.eye(len(gram)), anchored, left=False
            )
            target = (1 - anchor) * weight + anchor * anchored
            whitened = torch.linalg.svd(target @ linalg_root(gram), full_matrices=False)[0][
                :, : ranks[name]
            ]
            weights[name] = whitened @ whitened.T @ target
        for name in names:
            compressed.get_submodule(name).weight.data = weights[name]
    return weights


def linalg_root(gram):
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp(min=0).sqrt()


@pytest.mark.parametrize("anchor", [0.0, 0.5, 1.0])
def test_equal_to_the_plain_definition(tiny_llama, text_file, anchor):
    job = exactly(job_of(tiny_llama, text_file, *SEQUENTIAL, f"calibration.anchor={anchor}"))
    before = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
    plan, modules = built(job)
    layers = [f"model.layers.{block}." for block in range(2)]
    parts = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
    )
    groups = [
        [layer + part for part in group]
        for layer in layers
        for group in (*parts, ("mlp.down_proj",))
    ]
    ranks = {name: choice.setting["rank"] for name, choice in plan.linears.items()}
    expected = by_hand(job.model, ranks, groups, job.calibration.tokens, anchor, 0.01)
    for name, weight in expected.items():
        assert (modules[name].to_dense() - weight).norm() < BY_HAND * weight.norm(), name
    for name, tensor in job.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    took = plan.linears["model.layers.1.mlp.up_proj"].sequential
    assert took == ({"anchor_damping": 0.01} if anchor else {})
    assert (
        plan.linears["model.layers.0.self_attn.q_proj"].sequential is None
    )  # its inputs are those of the dense model


def test_settings_and_sizes_are_those_of_the_plan_and_both_errors_are_reported(
    tiny_llama, text_file
):
    plan, modules = built(job_of(tiny_llama, text_file, *SEQUENTIAL))
    alone, single = built(job_of(tiny_llama, text_file, *KEPT))
    for name, choice in plan.linears.items():
        former = alone.linears[name]
        assert (choice.setting, choice.bits, choice.predicted) == (
            former.setting,
            former.bits,
            former.predicted,
        )
        assert modules[name].bits() == choice.bits
        assert former.measured == pytest.approx(former.predicted, rel=1e-3)
    changed = [
        name
        for name in plan.linears
        if not is_same_output(modules[name].to_dense(), single[name].to_dense())
    ]
    assert len(changed) == 14 - 3
    assert plan.linears[changed[-1]].measured != alone.linears[changed[-1]].measured
    assert (
        plan.linears[changed[-1]].error > alone.linears[changed[-1]].error
    )  # the plain solve is the best on the dense inputs


def test_a_dense_plan_changes_nothing(tiny_llama, text_file):
    job = job_of(tiny_llama, text_file, "allocation.keep=1.0", "calibration.sequential=true")
    plan, modules = built(job)
    assert modules == {} and {choice.method for choice in plan.linears.values()} == {DENSE}


def test_linears_kept_dense_stay_and_are_no_obstacle(tiny_llama, text_file):
    job = job_of(tiny_llama, text_file, *SEQUENTIAL, config="default")
    solution = allocate(job, stages.statistics(job))
    fewer = {
        name: module
        for name, module in solution.modules.items()
        if "layers.1.mlp" in name or "layers.0.self_attn.o_proj" in name
    }
    again = sequential_solve.solve_in_order(replace(solution, modules=fewer))
    assert again.modules.keys() == fewer.keys()
    before, after = solution.plan.linears, again.plan.linears
    assert all(after[name] == before[name] for name in before.keys() - fewer.keys())


def anchored_case(seed=0, tokens=60, width=8, height=6):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    y = x + 0.4 * torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    return x, y, torch.randn(height, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(4))
def test_anchored_solves_never_lose_to_input_aware_ones_in_the_anchored_objective(seed):
    x, y, weight = anchored_case(seed)
    gram, cross = y.T @ y, x.T @ y
    shift, took = linalg.drift(gram, cross, [0.0], "linear")
    assert took == 0.0
    target = weight + weight @ shift
    torch.testing.assert_close(
        target.T, torch.linalg.lstsq(y, x @ weight.T).solution, rtol=1e-10, atol=1e-10
    )
    unreachable = (x @ weight.T - y @ target.T).square().sum().item()
    lost = []
    for anchor in (0.0, 0.25, 0.5, 1.0):
        blend = weight + anchor * weight @ shift
        vectors = linalg.principal_outputs(blend, linalg.Metric(gram), "linear")[1][:, :3]
        approximation = vectors @ vectors.T @ blend
        lost.append((x @ weight.T - y @ approximation.T).square().sum().item())
        inside = ((target - approximation) @ gram * (target - approximation)).sum().item()
        assert lost[-1] == pytest.approx(unreachable + inside, rel=1e-10)
    assert min(lost) == lost[-1] < lost[0]


def test_damping_is_taken_from_the_list_and_reported():
    x, y, _ = anchored_case()
    y[:, 3] = 0  # a dead input, a singular Gram
    shift, took = linalg.drift(y.T @ y, x.T @ y, [0.0, 0.1], "linear")
    assert took == 0.1 and torch.isfinite(shift).all()
    assert (shift[:, 3] == 0).all()  # it gets nothing
    with pytest.raises(
        NumericalError, match=r"layers\.0\.o.*dampings \[0\.0\].*calibration\.anchor_damping"
    ):
        linalg.drift(torch.zeros(2, 2), torch.zeros(2, 2), [0.0], "layers.0.o")


def test_same_seed_same_bytes_in_bfloat16(tiny_llama, text_file, tmp_path):
    made = recipe(
        tiny_llama,
        text_file,
        "calibration.sequential=true",
        "allocation.keep=0.6",
        "output.dtype=bfloat16",
    )
    run.compress(made, tmp_path / "a")
    report = run.compress(made, tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()
    assert report["kl"] > 0
    plan = read_json(tmp_path / "a" / "plan.json")["linears"]
    assert any(choice["sequential"] == {"anchor_damping": 0.01} for choice in plan.values())
    again = run.compress(made, tmp_path / "c", plan=tmp_path / "a" / "plan.json")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "c" / "model.safetensors"
    ).read_bytes()
    assert again["kl"] == report["kl"]


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "phi3", "mixtral", "opt", "gpt_neox"])
def test_architectures(kind, text_file, tmp_path):
    folder = save_tiny(tmp_path / kind, kind)
    job = job_of(folder, text_file, "calibration.sequential=true", "allocation.keep=0.7")
    plan, modules = built(job)
    assert sum(choice.sequential is not None for choice in plan.linears.values()) > len(modules) / 2
    stages.install(job, modules)
    ids = torch.arange(3, 13).view(2, 5)
    found = job.model.generate(
        ids, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    assert all(torch.isfinite(step).all() for step in found.logits)


def test_a_target_behind_the_blocks_sees_all_of_them_compressed(tiny_llama, text_file):
    entries = 'method=[{targets: "*down_proj"}, {targets: lm_head, dense: false}]'
    job = job_of(
        tiny_llama,
        text_file,
        entries,
        "allocation.keep=0.6",
        "calibration.sequential=true",
        config="default",
    )
    _, modules = built(job)
    seen = {}

    def solve(names, stats):
        seen.update(dict.fromkeys(names, stats))
        return {name: modules[name] for name in names}

    infos = {name: assignment.info for name, assignment in job.assignments.items()}
    batches, needs = [job.calibration.tokens], dict.fromkeys(infos, frozenset({"gram", "sum"}))
    solve_in_order(job.model, infos, batches, needs, True, solve)
    dense = received(job.model, "lm_head", job.calibration.tokens)
    stages.install(job, {name: module for name, module in modules.items() if name != "lm_head"})
    x = received(job.model, "lm_head", job.calibration.tokens)
    torch.testing.assert_close(seen["lm_head"].gram, x.T @ x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen["lm_head"].cross_gram, dense.T @ x, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(seen["lm_head"].sum, x.sum(0), rtol=1e-5, atol=1e-3)


def test_candidates_of_one_engine_are_told_apart_by_the_options_in_which_they_differ(
    tiny_llama, text_file, tmp_path
):
    twice = "method=[{candidates: [{name: low_rank}, {name: low_rank, options: {metric: gram}}]}]"
    sets = [
        twice,
        "allocation.keep=0.6",
        "calibration.sequential=true",
        "output.dtype=bfloat16",
        "evaluation.enabled=false",
    ]
    made = recipe(
        tiny_llama, text_file, *sets, "repair.enabled=true", "repair.steps=4", config="default"
    )
    run.compress(made, tmp_path / "out")
    path = tmp_path / "out" / "plan.json"
    plan = read_json(path)
    chosen = {name: choice for name, choice in plan["linears"].items() if choice["method"] != DENSE}
    labels = [choice["options"]["metric"] for choice in chosen.values()]
    assert {*labels} == {"gram", "two_sided"} and all(
        choice["options"].keys() == {"metric"} for choice in chosen.values()
    )
    run.compress(made, tmp_path / "again", plan=path)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
    name, choice = next(
        (name, choice) for name, choice in chosen.items() if choice["options"]["metric"] == "gram"
    )
    faults = {
        r"several candidates 'low_rank' offer .*'rank'.* `options`: \{'metric': 'two_sided'\} or \{'metric': 'gram'\}": None,
        r"says 'low_rank' with \{'metric': 'diagonal'\}, which the recipe does not offer": {
            "metric": "diagonal"
        },
    }
    for number, (message, options) in enumerate(faults.items()):
        edited = tmp_path / f"{number}.json"
        edited.write_text(
            json.dumps(plan | {"linears": plan["linears"] | {name: choice | {"options": options}}})
        )
        with pytest.raises(ConfigError, match=message):
            run.compress(made, tmp_path / "edited", plan=edited)


def test_routed_tokens_cannot_be_anchored_and_nothing_stays_behind():
    model, tokens = tiny_model("llama"), [windows()]
    found = {
        name: info
        for name, info in linears(model).items()
        if name.endswith(("v_proj", "down_proj"))
    }
    mlp = blocks(model)[1][0].mlp
    dense = mlp.forward
    mlp.forward = lambda x: torch.cat([dense(x[:, ::2]), torch.zeros_like(x[:, 1::2])], dim=1)
    seen = {}

    def solve(names, stats):
        seen.update(dict.fromkeys(names, stats))
        return {
            name: torch.nn.Linear(found[name].in_features, found[name].out_features, bias=False)
            for name in names
        }

    solve_in_order(model, found, tokens, dict.fromkeys(found, frozenset()), False, solve)
    assert seen["model.layers.0.mlp.down_proj"].tokens == windows().numel() // 2
    with pytest.raises(
        ConfigError, match=r"layers\.0\.mlp\.down_proj sees routed tokens.*calibration\.anchor to 0"
    ):
        solve_in_order(model, found, tokens, dict.fromkeys(found, frozenset()), True, solve)
    assert all(
        "forward" not in block.__dict__ and not block._forward_hooks for block in blocks(model)[1]
    )
    assert all(
        model.get_submodule(name) is info.module and not info.module._forward_pre_hooks
        for name, info in found.items()
    )


def test_linears_that_share_a_dictionary_are_solved_and_compensated_together(
    tiny_llama, text_file, tmp_path
):
    share = (
        "method=[{dense: false, candidates: [{name: compot, options: {rounds: 3}, share: [qkv, "
        "gate_up]}]}]"
    )
    sets = [
        share,
        "allocation.keep=0.8",
        "calibration.sequential=true",
        "compensation.keep=0.1",
        "output.dtype=bfloat16",
    ]
    made = recipe(tiny_llama, text_file, *sets, config="default")
    report = run.compress(made, tmp_path / "out")
    plan = read_json(tmp_path / "out" / "plan.json")["linears"]
    gate, up = (plan[f"model.layers.1.mlp.{part}_proj"] for part in ("gate", "up"))
    assert gate["members"] == up["members"] and gate["members"][0].endswith("gate_proj")
    assert gate["measured"] == up["measured"] and gate["sequential"] == {"anchor_damping": 0.01}
    assert any(choice["residual"] for choice in plan.values())
    assert report["kept"]["targets"] <= 0.8 and report["kl"] > 0


def test_offloaded_models_are_solved_alike():
    from accelerate import cpu_offload

    def statistics(model, found):
        seen = {}

        def solve(names, stats):
            seen.update(dict.fromkeys(names, stats))
            return {name: low_rank_like(modules[name], 5, False) for name in names}

        solve_in_order(
            model,
            found,
            [windows()[:3], windows()[3:]],
            dict.fromkeys(found, frozenset()),
            True,
            solve,
        )
        return seen

    modules = {name: info.module for name, info in linears(tiny_model("llama")).items()}
    model, offloaded = tiny_model("llama"), tiny_model("llama")
    expected, found = statistics(model, linears(model)), linears(offloaded)
    cpu_offload(offloaded, execution_device="cpu")
    again = statistics(offloaded, found)
    assert sum(stats is not None for stats in expected.values()) == 11
    for name, stats in expected.items():
        assert stats is None or is_same_output(stats.cross_gram, again[name].cross_gram)
