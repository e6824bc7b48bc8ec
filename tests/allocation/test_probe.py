"""Probes: the divergence is that of the whole model, and damages scale with the curve."""

import pytest
import torch
from support.logits import few_at_a_time
from support.models import VOCABULARY, tiny_model
from support.modules import low_rank_like, tokens

from compressor.allocation.decompose import Decomposition
from compressor.allocation.probe import Prober, ProbeResult, predict_damages, probe, probe_candidate
from compressor.evaluation.perplexity import kl_sum
from compressor.linears import Dense
from compressor.methods import build
from compressor.models.install import replace
from compressor.models.linears import blocks, linears
from compressor.plan import Candidate, Curve
from compressor.statistics import LinearStats

ROUNDING = 1e-6  # nats per token, of a model against itself in float32


def curve(*sizes: int) -> Curve:
    candidates = tuple(
        Candidate("m", {"rank": size}, 16 * size, size, error=1 / size) for size in sizes
    )
    return Curve("linear", "m", candidates, 1600, 100, 1.0)


def test_probe_is_the_candidate_nearest_to_the_fraction():
    assert probe_candidate(curve(10, 28, 33, 60), 0.3).setting == {"rank": 28}
    assert probe_candidate(curve(50, 60), 0.3).setting == {"rank": 50}


def test_damage_is_the_probe_scaled_along_the_curve():
    result = ProbeResult({"rank": 20}, predicted=1 / 20, measured=0.04, kl=0.5)
    assert predict_damages(curve(10, 20, 40), result) == pytest.approx([1.0, 0.5, 0.25])
    assert predict_damages(curve(10, 20, 40), result, weight=3) == pytest.approx([3.0, 1.5, 0.75])
    assert result.departure == pytest.approx(0.8)
    assert predict_damages(curve(10, 20), ProbeResult({}, 0.0, 0.0, 0.0)) == [0.0, 0.0]


@torch.no_grad()
def loud_model(kind: str):
    """A tiny model whose linears matter: weights five times those of a fresh one, so that
    divergences are far above rounding.
    """
    model = tiny_model(kind)
    for info in linears(model).values():
        info.module.weight.mul_(5)
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("skip", [0, 5])
def test_the_divergence_is_that_of_a_full_forward_pass(kind, temperature, skip):
    model = loud_model(kind)
    tokens = torch.randint(3, 90, (5, 16), generator=torch.Generator().manual_seed(0))
    infos = list(linears(model).values())
    prober = Prober(model, tokens, batch_size=2, temperature=temperature, skip=skip)
    with torch.no_grad():
        original = model(tokens).logits
    for info in (infos[0], infos[-1]):
        weight = info.module.weight.detach().T if info.conv1d else info.module.weight.detach()
        dense = Dense(
            weight, None if info.module.bias is None else info.module.bias.detach(), torch.float32
        )
        method = build("low_rank", {"metric": "gram"})
        state = method.prepare(
            info.name,
            dense,
            LinearStats(tokens=1, gram=torch.eye(weight.shape[1], dtype=torch.float64)),
        )
        part = Decomposition(
            method, state, method.candidates(state), {info.name: info.out_features}
        )
        found = probe(prober, part, info.block, 0.3)
        changed = loud_model(kind)
        replace(changed, info.name, method.compress(state, found.setting))
        with torch.no_grad():
            rows = [
                logits[:, skip:].flatten(0, 1) / temperature
                for logits in (original, changed(tokens).logits)
            ]
        assert found.kl == pytest.approx(kl_sum(*rows).item() / len(rows[0]), rel=1e-2)
        assert found.kl > 0
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, original)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj", "lm_head"])
def test_probabilities_that_are_not_kept_are_computed_again(kind, name, monkeypatch):
    model, ids = loud_model(kind), tokens(3)
    info = linears(model, ["*", "lm_head"])[name]
    modules = {name: low_rank_like(info.module, 3, False)}
    kept = Prober(model, ids, 2)
    expected = kept.kl(modules, info.block)
    monkeypatch.setattr("compressor.allocation.probe.KNOWN_BYTES", 0)
    prober = Prober(model, ids, 2)
    assert prober.kl(modules, info.block) == expected > 0
    assert not prober.known and kept.known
    assert prober.kl({}, len(blocks(model)[1])) == pytest.approx(0, abs=ROUNDING)


def test_a_probe_never_holds_the_logits_of_a_window(monkeypatch):
    model, ids = tiny_model("llama"), tokens(3)
    modules = {
        "model.layers.0.mlp.up_proj": low_rank_like(model.model.layers[0].mlp.up_proj, 3, False)
    }
    monkeypatch.setattr("compressor.allocation.probe.KNOWN_BYTES", 0)
    with few_at_a_time(monkeypatch, VOCABULARY, rows=5):
        assert Prober(model, ids, 2).kl(modules, 0) > 0
