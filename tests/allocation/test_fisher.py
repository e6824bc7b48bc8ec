"""Fisher probes: half the mean squared score of a window, and the divergence for small changes."""

from dataclasses import replace

import pytest
import torch
from support.jobs import exactly, job_of
from support.logits import few_at_a_time
from support.models import VOCABULARY, tiny_model
from torch.func import functional_call
from torch.nn import functional

from compressor.allocation import fisher
from compressor.allocation.fisher import (
    FisherProber,
    check,
    common_parent,
    probe_all,
    sites_of,
    waves,
)
from compressor.allocation.probe import Prober, ProbeResult
from compressor.calibrate.collect import draw_labels
from compressor.errors import ConfigError, NumericalError
from compressor.linears import Pruned
from compressor.pipeline import stages
from compressor.recipe.sections import Probe
from compressor.resume.store import FolderStore

ROUNDING = 1e-8  # of float64 sums in another order, relative
DRAWN = 0.06  # of SAMPLES drawn labels on these windows, relative
SAMPLES = 800
LLAMA = "model.layers.0.mlp."


def float64_model(kind: str, scale: float = 5.0):
    """A tiny model in float64 whose linears matter: weights five times those of a fresh one."""
    model = tiny_model(kind).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return model


def windows(count: int = 3, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 90, (count, length), generator=torch.Generator().manual_seed(0))


def prober_of(model, seed: int = 0, **section) -> FisherProber:
    """A prober whose spans are whole windows, so that nothing is left out of the scores."""
    generator = torch.Generator().manual_seed(seed)
    section = {"samples": 4, "span": None} | section
    return FisherProber(model, windows(), Probe(**section), generator)


def shifted(model, name: str, size: float, seed: int = 1, bias: float = 0.0) -> torch.nn.Linear:
    """The linear of a model with random changes of its weight and bias."""
    old = model.get_submodule(name)
    weight = (old.weight if isinstance(old, torch.nn.Linear) else old.weight.T).detach()
    new = torch.nn.Linear(weight.shape[1], len(weight), old.bias is not None).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        noise = torch.randn(weight.shape, dtype=torch.float64, generator=generator)
        new.weight.copy_(weight - size * noise)
        if old.bias is not None:
            noise = torch.randn(len(weight), dtype=torch.float64, generator=generator)
            new.bias.copy_(old.bias - bias * noise)
    return new


def brute_force(model, modules, numbers, temperature: float = 1.0, skip: int = 0) -> float:
    """½ mean s² / tokens of whole windows, with s = Σ ⟨gradient of the weight, D⟩ from a backward
    pass for every window and drawn label.
    """
    squares = []
    for window, drawn in zip(windows(), numbers.transpose(0, 1), strict=True):
        for number in drawn:
            logits = model(input_ids=window[None]).logits[0, skip:] / temperature
            labels = draw_labels(logits.detach(), number[skip:, None])[:, 0]
            loss = functional.cross_entropy(logits, labels, reduction="sum")
            score = 0.0
            for name, module in modules.items():
                old = model.get_submodule(name)
                parameters = [old.weight] if old.bias is None else [old.weight, old.bias]
                gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
                new = module.weight if isinstance(old, torch.nn.Linear) else module.weight.T
                score += (gradients[0] * (old.weight - new)).sum().item()
                if old.bias is not None:
                    score += (gradients[1] * (old.bias - module.bias)).sum().item()
            squares.append(score**2)
    return sum(squares) / len(squares) / 2 / (windows().shape[1] - skip)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("llama", ["model.layers.0.self_attn.q_proj"]),
        ("llama", ["model.layers.1.mlp.down_proj"]),
        ("llama", ["lm_head"]),
        ("llama", ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"]),
        ("gpt2", ["transformer.h.0.attn.c_attn"]),
        ("gpt2", ["transformer.h.1.mlp.c_fc"]),
    ],
)
@pytest.mark.parametrize("section", [{}, {"temperature": 0.6, "skip": 5, "samples": 2}], ids=str)
def test_damage_is_half_the_mean_squared_score_per_token(kind, names, section):
    model = float64_model(kind)
    prober = prober_of(model, **section)
    modules = {name: shifted(model, name, 0.1, bias=0.3) for name in names}
    expected = brute_force(
        model, modules, prober.numbers, section.get("temperature", 1.0), section.get("skip", 0)
    )
    assert expected > 1e-6
    assert prober.damages({"all": modules})["all"] == pytest.approx(expected, rel=ROUNDING)


def test_many_drawn_labels_give_the_fisher_quadratic_form_of_the_logits():
    model = float64_model("llama")
    name = "model.layers.0.self_attn.o_proj"
    new = shifted(model, name, 0.1)
    change = {f"{name}.weight": model.get_submodule(name).weight.detach() - new.weight.detach()}
    rest = {key: value.detach() for key, value in model.named_parameters()}

    def logits(changed):
        return functional_call(model, rest | changed, kwargs={"input_ids": windows()}).logits

    moved = {f"{name}.weight": rest[f"{name}.weight"]}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        value, slope = torch.func.jvp(logits, (moved,), (change,))
    p = value.softmax(-1)
    variance = (p * slope.square()).sum(-1) - (p * slope).sum(-1).square()
    found = prober_of(model, samples=SAMPLES).damages({0: {name: new}})[0]
    assert found == pytest.approx(variance.mean().item() / 2, rel=DRAWN)


def test_the_smaller_the_change_the_nearer_the_damage_to_the_divergence():
    model, name = float64_model("llama"), "model.layers.1.mlp.up_proj"
    exact = Prober(model, windows(), batch_size=3)
    fisher_prober = prober_of(model, samples=SAMPLES)
    ratios = []
    for size in (0.3, 0.003):
        modules = {name: shifted(model, name, size)}
        ratios.append(fisher_prober.damages({0: modules})[0] / exact.kl(modules, 0))
    assert ratios[1] == pytest.approx(1.0, rel=DRAWN)
    assert abs(ratios[0] - 1) > abs(ratios[1] - 1)


def without_channels(model) -> dict[str, Pruned]:
    """A feed-forward block without half of its channels."""
    kept = torch.arange(48) % 2 > 0
    masks = {"gate_proj": (kept, None), "up_proj": (kept, None), "down_proj": (None, kept)}
    return {
        LLAMA + role: Pruned.of(
            model.get_submodule(LLAMA + role).weight.detach(), None, rows, columns, torch.float64
        )
        for role, (rows, columns) in masks.items()
    }


def test_channels_that_leave_several_linears_count_once():
    model = float64_model("llama")
    modules = without_channels(model)
    prober = prober_of(model)
    consumer = {LLAMA + "down_proj": modules[LLAMA + "down_proj"]}
    found = prober.damages({"module": modules, "consumer": consumer})
    assert found["consumer"] > 1e-6
    assert found["module"] == pytest.approx(found["consumer"], rel=ROUNDING)


def test_heads_in_another_basis_cost_nothing():
    model = float64_model("llama")
    prefix = "model.layers.0.self_attn."
    turn = torch.linalg.qr(
        torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )[0]
    new_v, new_o = (shifted(model, prefix + name, 0.0) for name in ("v_proj", "o_proj"))
    with torch.no_grad():
        new_v.weight.copy_((turn @ new_v.weight.unflatten(0, (-1, 8))).flatten(0, 1))
        new_o.weight.copy_((new_o.weight.unflatten(1, (-1, 8)) @ turn.T).flatten(1))
    prober = prober_of(model)
    both = {prefix + "v_proj": new_v, prefix + "o_proj": new_o}
    found = prober.damages({"both": both, "v alone": {prefix + "v_proj": new_v}})
    assert found["v alone"] > 1e-4
    assert found["both"] < ROUNDING * found["v alone"]


def test_estimates_are_checked_until_enough_in_a_row_agree():
    estimates = {
        key: ProbeResult({}, 0.1, 0.1, kl)
        for key, kl in {"tiny": 0.01, "a": 0.5, "b": 0.4, "c": 0.3, "d": 0.2, "e": 0.1}.items()
    }
    truth = {"a": 0.5, "b": 0.6, "c": 0.3, "d": 0.17, "e": 0.2, "tiny": 0.02}
    asked = []

    def measure(key: str) -> ProbeResult:
        asked.append(key)
        return replace(estimates[key], kl=truth[key])

    results = check(estimates, measure, enough=2)
    assert asked == ["a", "b", "c", "d"]  # b is 1.5 times its estimate, c and d agree
    assert {key: result.kl for key, result in results.items()} == {
        key: (truth[key] if key in asked else estimates[key].kl) for key in estimates
    }
    assert check(estimates, measure, enough=0) == estimates
    assert [*results] == [*estimates]
    silent = {"a": replace(estimates["a"], kl=0.0)}
    assert check(silent, measure, enough=1) == silent


def test_sites_are_the_smallest_modules_around_the_linears_of_a_block():
    model = tiny_model("llama")
    names = ["self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj"]
    module = torch.nn.Identity()

    def sites(*names):
        return set(sites_of(model, dict.fromkeys(names, module)))

    layers = [f"model.layers.{number}" for number in (0, 1)]
    assert sites(f"{layers[0]}.{names[1]}", f"{layers[0]}.{names[2]}") == {f"{layers[0]}.mlp"}
    assert sites(f"{layers[0]}.{names[0]}", f"{layers[0]}.{names[1]}") == {layers[0]}
    assert sites(f"{layers[0]}.{names[1]}", f"{layers[1]}.{names[1]}", "lm_head") == {
        f"{layers[0]}.{names[1]}",
        f"{layers[1]}.{names[1]}",
        "lm_head",
    }
    assert common_parent(["a.b.c", "a.b.cd"]) == "a.b"


def position_scores(model, name, module, numbers) -> torch.Tensor:
    """gᵀ D x of every position, (windows, samples, length), of windows one by one."""
    scores = []
    old = model.get_submodule(name)
    for window, drawn in zip(windows(), numbers.transpose(0, 1), strict=True):
        seen = {}

        def watch(_, args, output, seen=seen):
            seen["change"] = output - module(args[0])
            output.register_hook(lambda gradient: seen.update(gradient=gradient))

        for number in drawn:
            handle = old.register_forward_hook(watch)
            logits = model(input_ids=window[None]).logits[0]
            handle.remove()
            labels = draw_labels(logits.detach(), number[:, None])[:, 0]
            functional.cross_entropy(logits, labels, reduction="sum").backward()
            scores.append((seen["gradient"] * seen["change"]).sum(-1)[0].detach())
    model.zero_grad()
    return torch.stack(scores).view(len(windows()), len(numbers), -1)


@pytest.mark.parametrize("name", [LLAMA + "up_proj", "lm_head"])
@pytest.mark.parametrize("span", [1, 5, 12, 100])
def test_scores_are_squared_by_spans_of_positions(name, span, monkeypatch):
    model = float64_model("llama")
    module = shifted(model, name, 0.1)
    prober = prober_of(model, span=span)
    scores = position_scores(model, name, module, prober.numbers)
    squares = torch.stack([part.sum(-1) ** 2 for part in scores.split(span, dim=-1)], -1)
    expected = squares.sum(-1).mean().item() / 2 / scores.shape[-1]
    with few_at_a_time(monkeypatch, VOCABULARY, rows=7):  # pieces of the head end within spans
        found = prober.damages({0: {name: module}})[0]
    assert found == pytest.approx(expected, rel=ROUNDING)


def test_spans_lower_the_deviation_between_draws():
    model, name = float64_model("llama"), "model.layers.1.mlp.up_proj"
    modules = {name: shifted(model, name, 0.1)}

    def deviation(span: int | None) -> float:
        draws = [
            prober_of(model, seed, samples=1, span=span).damages({0: modules})[0]
            for seed in range(20)
        ]
        return (torch.tensor(draws).std() / torch.tensor(draws).mean()).item()

    assert deviation(2) < 0.7 * deviation(None)


def test_candidates_beside_each_other_do_not_change_each_other():
    model = float64_model("llama")
    candidates = {
        "module": without_channels(model),
        "gate": {LLAMA + "gate_proj": shifted(model, LLAMA + "gate_proj", 0.1)},
        "later": {"model.layers.1.mlp.up_proj": shifted(model, "model.layers.1.mlp.up_proj", 0.1)},
        "again": {LLAMA + "gate_proj": shifted(model, LLAMA + "gate_proj", 0.2)},
    }
    prober = prober_of(model)
    together = prober.damages(candidates)
    assert together["again"] == pytest.approx(4 * together["gate"], rel=ROUNDING)
    for key, modules in candidates.items():
        assert prober.damages({key: modules})[key] == pytest.approx(together[key], rel=ROUNDING)


def test_damage_is_the_same_with_the_head_in_pieces(monkeypatch):
    model = float64_model("llama")
    candidates = {
        name: {name: shifted(model, name, 0.1)} for name in (LLAMA + "up_proj", "lm_head")
    }
    expected = prober_of(model, skip=2).damages(candidates)
    with few_at_a_time(monkeypatch, VOCABULARY, rows=5):
        pieces = prober_of(model, skip=2).damages(candidates)
    assert pieces == pytest.approx(expected, rel=ROUNDING)


def test_a_head_that_says_nothing_makes_damages_zero():
    model = float64_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    name = LLAMA + "up_proj"
    assert prober_of(model).damages({0: {name: shifted(model, name, 0.1)}}) == {0: 0.0}


def test_a_linear_that_is_never_called_has_damage_zero():
    model = float64_model("llama")
    model.model.layers[0].mlp.forward = lambda x: x
    name = LLAMA + "up_proj"
    assert prober_of(model).damages({0: {name: shifted(model, name, 0.1)}}) == {0: 0.0}


def test_linears_that_see_routed_tokens_have_their_window_score():
    model = float64_model("llama")
    mlp = model.model.layers[0].mlp
    dense = mlp.forward
    mlp.forward = lambda x: torch.cat([dense(x[:, ::2]), torch.zeros_like(x[:, 1::2])], dim=1)
    modules = {LLAMA + "up_proj": shifted(model, LLAMA + "up_proj", 0.1)}
    prober = prober_of(model)
    expected = brute_force(model, modules, prober.numbers)
    assert prober.damages({0: modules})[0] == pytest.approx(expected, rel=ROUNDING)


def test_the_model_is_as_it_was_afterwards():
    model = float64_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prober_of(model).damages({0: without_channels(model)})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_candidates_that_are_not_finite_are_named():
    model = float64_model("llama")
    broken = shifted(model, LLAMA + "up_proj", 0.1)
    with torch.no_grad():
        broken.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"model\.layers\.0\.mlp\.up_proj: .* not finite"):
        prober_of(model).damages({0: {LLAMA + "up_proj": broken}})


def test_offloaded_models_are_refused():
    from accelerate import cpu_offload

    model = tiny_model("llama")
    cpu_offload(model, execution_device="cpu")
    with pytest.raises(ConfigError, match=r"'fisher_probe' needs gradients.*'kl_probe'"):
        prober_of(model)


@pytest.fixture
def job(tiny_llama, text_file):
    return exactly(job_of(tiny_llama, text_file, config=None))


def parts_of(job):
    found = stages.decompose_all(job, stages.statistics(job))
    return {name: parts[0] for name, parts in found.items() if parts}


def job_prober(job) -> FisherProber:
    generator = torch.Generator().manual_seed(0)
    return FisherProber(job.model, job.heldout.tokens, Probe(), generator)


def test_passes_that_are_split_by_memory_give_the_same_damages(job):
    parts = parts_of(job)
    one = probe_all(job_prober(job), parts, 0.3, 2**30, job.store)
    assert [len(keys) for keys in waves(parts, 2**30)] == [len(parts)]
    assert [len(keys) for keys in waves(parts, 1)] == [1] * len(parts)
    several = probe_all(job_prober(job), parts, 0.3, 1, job.store)
    assert several.keys() == one.keys()
    for name, result in several.items():
        assert result.kl == pytest.approx(one[name].kl, rel=ROUNDING) and result.kl > 0
        assert result.setting == one[name].setting and result.measured == one[name].measured


def test_finished_damages_are_not_estimated_again(job, tmp_path, monkeypatch):
    parts, store = parts_of(job), FolderStore(tmp_path)
    first = probe_all(job_prober(job), parts, 0.3, 2**30, store)
    name = next(iter(parts))
    missing = store.path("fisher", parts[name].key)
    missing.write_bytes(b"damaged")
    asked = []
    original = FisherProber.damages

    def damages(self, candidates, *args):
        asked.extend(candidates)
        return original(self, candidates, *args)

    monkeypatch.setattr(fisher.FisherProber, "damages", damages)
    again = probe_all(job_prober(job), parts, 0.3, 2**30, store)
    assert asked == [name]
    for key, result in again.items():
        assert result.kl == pytest.approx(first[key].kl, rel=ROUNDING)
        assert key == name or result == first[key]
