"""The loss of healing with features of the blocks, and with a teacher of which the likeliest tokens
are known.
"""

import pytest
import torch
from support.activations import windows
from support.logits import few_at_a_time
from support.models import VOCABULARY, tiny_model
from support.modules import low_rank
from support.recipes import recipe
from support.training import NOISE, SECTION, loss_of, modules_of
from torch.nn import functional

from compressor.errors import ConfigError
from compressor.evaluation.perplexity import kl_sum
from compressor.models.install import installed
from compressor.models.linears import blocks
from compressor.pipeline import run
from compressor.pipeline.train import training
from compressor.training.learners import Learners
from compressor.training.loop import Task, fit, taking_gradients
from compressor.training.losses import Divergence, coarsen, feature_distance
from compressor.training.teacher import Teacher

CLOSE = 1e-5


def test_features_are_compared_block_by_block_relative_to_their_size():
    model, batch = tiny_model("llama"), windows()
    modules = modules_of(model)
    with training(model):
        original = Teacher(model, [batch])
        wanted = model(input_ids=batch, output_hidden_states=True)
        with installed(model, modules):
            found = model(input_ids=batch, output_hidden_states=True)
            losses = {
                weight: loss_of(original, features=weight)(0).item() for weight in (0.0, 1.0, 3.0)
            }
    with torch.no_grad():
        first = (found.hidden_states[1] - wanted.hidden_states[1]).square().sum(
            -1
        ) / wanted.hidden_states[1].square().sum(-1)
    added = losses[1.0] - losses[0.0]
    assert (
        losses[3.0] - losses[0.0] == pytest.approx(3 * added, rel=1e-4)
        and added > first.mean().item() / 2 > 0
    )
    seen = feature_distance(found.hidden_states[1], wanted.hidden_states[1]).item()
    assert seen == pytest.approx(first.mean().item(), rel=CLOSE)


@pytest.mark.parametrize(
    "settings",
    [{"features": 2.0}, {"teacher": "cached", "top": 7}, {"teacher": "cached", "top": VOCABULARY}],
)
def test_a_student_that_is_the_teacher_has_neither_loss_nor_gradient(settings):
    model = tiny_model("llama")
    with training(model):
        original = Teacher(model, [windows()], keep=settings.get("teacher") != "cached")
        learners = Learners(model, {}, blocks(model)[1], "everything")
        with (
            installed(model, learners.copies),
            torch.enable_grad(),
            taking_gradients(learners.parameters.values()),
        ):
            loss = loss_of(original, **settings)(0)
            loss.backward()
            assert loss.item() == 0 and len(learners.parameters) == 18
            assert all(not parameter.grad.any() for parameter in learners.parameters.values())


@pytest.mark.parametrize(
    "settings",
    [{"features": 1.0}, {"features": 0.1, "kind": "ce"}, {"teacher": "cached", "top": 9}],
)
def test_the_loss_of_one_batch_falls_and_the_original_is_as_it_was(settings):
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = modules_of(model)
    with training(model):
        original = Teacher(model, [windows()], keep="teacher" not in settings)
        learners, loss = (
            Learners(model, modules, blocks(model)[1], "everything"),
            loss_of(original, **settings),
        )
        with installed(model, modules | learners.copies):
            start = loss(0).item()
            fit(Task("heal", learners.parameters, 1, loss, lambda: loss(0).item()), SECTION, 0)
            assert loss(0).item() < (0.6 if "kind" not in settings else 0.99) * start
            assert original.divergence() > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_coarser_distributions_are_no_farther_apart():
    generator = torch.Generator().manual_seed(0)
    logits, expected = (
        3 * torch.randn(5, 4, 30, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    whole, last = kl_sum(expected, logits).item(), 0.0
    for top in (1, 2, 8, 20, 29, 30):
        tokens = expected.topk(top).indices
        made = coarsen(expected, tokens)
        assert made.shape == (5, 4, min(top + 1, 30))
        masses = functional.softmax(expected, -1).gather(-1, tokens)
        torch.testing.assert_close(functional.softmax(made, -1)[..., :top], masses)
        found = Divergence.apply(coarsen(logits, tokens), made).item()
        assert last <= found + 1e-12 and found <= whole + 1e-12
        last = found
    assert last == pytest.approx(whole, rel=1e-12)
    tokens = expected.topk(6).indices
    assert torch.autograd.gradcheck(
        lambda found: Divergence.apply(coarsen(found, tokens), coarsen(expected, tokens)),
        logits.requires_grad_(True),
    )


@pytest.mark.parametrize(
    "settings",
    [{"kind": "both"}, {"features": 2.0}, {"teacher": "cached", "top": 7}],
    ids=["both", "features", "cached"],
)
def test_chunks_of_positions_change_neither_loss_nor_gradients(settings, monkeypatch):
    model = tiny_model("llama")

    def run():
        with training(model):
            original = Teacher(model, [windows()], keep=settings.get("teacher") != "cached")
            modules = modules_of(model) | {"lm_head": low_rank(model.lm_head.weight, None, 8, True)}
            learners = Learners(model, modules, blocks(model)[1], "everything")
            parameters = list(learners.parameters.values())
            with (
                installed(model, modules | learners.copies),
                torch.enable_grad(),
                taking_gradients(learners.parameters.values()),
            ):
                loss = loss_of(original, **settings)(0)
                loss.backward()
                return loss.item(), [parameter.grad.clone() for parameter in parameters]

    loss, gradients = run()
    monkeypatch.setattr("compressor.training.losses.CHUNK", VOCABULARY * 4 * 5)
    with few_at_a_time(monkeypatch, VOCABULARY, rows=5):
        again, others = run()
    assert again == pytest.approx(loss, rel=CLOSE)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-3, atol=CLOSE * gradient.abs().max())


def test_a_cached_teacher_of_the_whole_vocabulary_is_the_online_one():
    model, batch = tiny_model("llama"), windows()
    modules = modules_of(model)
    with training(model):
        kept, asked = Teacher(model, [batch]), Teacher(model, [batch], keep=False)
        with installed(model, modules):
            expected = loss_of(kept)(0).item()
            assert loss_of(asked, teacher="cached", top=10 * VOCABULARY)(0).item() == pytest.approx(
                expected, rel=NOISE
            )
            assert 0 < loss_of(asked, teacher="cached", top=5)(0).item() < expected
            assert (
                asked.divergence() == pytest.approx(kept.divergence(), rel=NOISE)
                and len(asked.states) == 0
            )


@pytest.mark.parametrize(
    "settings", [("teacher=cached", "top=64"), ("features=0.5",)], ids=["cached", "features"]
)
def test_runs_are_judged_on_whole_distributions(tiny_llama, text_file, tmp_path, settings):
    sets = [
        f"heal.{value}"
        for value in ("enabled=true", "steps=8", "check=4", "learning_rate=0.01", *settings)
    ]
    report = run.compress(
        recipe(tiny_llama, text_file, "allocation.keep=0.5", *sets), tmp_path / "out"
    )
    healed = report["trained"]["heal"]
    assert healed["kept"] and report["heldout"]["kl"] == pytest.approx(
        healed["after"]["heldout"], rel=NOISE
    )
    assert report["calibration"]["kl"] == pytest.approx(healed["after"]["calibration"], rel=NOISE)


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["teacher=cached", "loss=ce"], r"heal.*needs no teacher for loss: ce"),
        (["teacher=cached", "features=1"], r"heal.*set teacher to online or features to 0"),
    ],
)
def test_what_cannot_go_together_is_refused(tiny_llama, text_file, sets, says):
    with pytest.raises(ConfigError, match=says) as refused:
        recipe(tiny_llama, text_file, *[f"heal.{one}" for one in sets])
    assert "\n" not in str(refused.value)
