"""Supports that learn: the same number of entries in the same pattern, a gradient for entries that
are not stored, and the same bytes.
"""

import pytest
import torch
from support.activations import windows
from support.blocks import DOWN, MADE, dictionary, low_rank_pair, sparse
from support.models import read_json, tiny_model
from support.processes import contents, interrupted
from support.recipes import recipe
from support.training import loss_of

from compressor.errors import ConfigError
from compressor.linears import Adapted, Sparse
from compressor.linears.masks import pack_mask
from compressor.models.install import installed
from compressor.models.linears import blocks
from compressor.pipeline import run as pipeline
from compressor.pipeline.train import training
from compressor.recipe.training import Heal
from compressor.training import loop as trainer
from compressor.training.learners import rebuild
from compressor.training.loop import Task, fit, taking_gradients
from compressor.training.supports import Latent, Pattern, Supports, split_section
from compressor.training.teacher import Teacher

CLOSE = 1e-5
STORING = ["sparse", "dictionary", "adapted sparse"]


def patterned(weight, pattern):
    mask = pattern.largest(weight.abs())
    return Sparse(weight[mask], pack_mask(mask.flatten()), None, weight.shape[1], weight.shape[0])


def weight_of(name=DOWN):
    return tiny_model("llama").get_submodule(name).weight.detach()


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (Pattern(4, 2), Pattern(4, 2)),
        (Pattern(8, 5), Pattern(8, 5)),
        (Pattern(48, 20), Pattern(48, 20)),
        (Pattern(32, 9, True), Pattern(32, 9, True)),
        (Pattern(32 * 48, 700), Pattern(32 * 48, 700)),
    ],
)
def test_the_pattern_of_a_mask_is_kept_by_what_learns(pattern, found):
    module = patterned(weight_of(), pattern)
    latent = Latent(module.requires_grad_(False))
    assert latent.pattern == found and torch.equal(
        latent.support(latent.latent()), module.support()
    )
    latent.outside.data.normal_(std=2.0, generator=torch.Generator().manual_seed(0)).mul_(
        1 / latent.unit
    )
    stored = latent.stored_tensors()
    made = rebuild({"it": module}, {"it": stored})["it"]
    assert (
        made.spec() == module.spec()
        and made.bits() == module.bits()
        and Pattern.of(made.support()) == found
    )
    assert not torch.equal(made.mask, module.mask)


@pytest.mark.parametrize("kind", STORING)
def test_what_runs_is_the_masked_product_and_masked_entries_have_a_gradient(kind):
    module = MADE[kind](weight_of(), torch.linspace(-1, 1, 32)).requires_grad_(False)
    latent, x = Latent(module), torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(latent(x), module(x), rtol=CLOSE, atol=CLOSE)
    latent.outside.data.normal_(std=0.5, generator=torch.Generator().manual_seed(0)).mul_(
        latent.inside.std() / latent.unit
    )
    made = rebuild({"it": module}, {"it": latent.stored_tensors()})["it"]
    with torch.no_grad():
        torch.testing.assert_close(latent(x), made(x), rtol=CLOSE, atol=CLOSE)
        assert (made(x) - module(x)).norm() > 0.02 * module(x).norm() and not torch.equal(
            made.mask, module.mask
        )
    with taking_gradients([latent.inside, latent.outside]), torch.enable_grad():
        latent(x).square().sum().backward()
        assert latent.outside.grad.count_nonzero() > 0.9 * latent.outside.numel()
        straight = latent.projected().detach().requires_grad_(True)
        torch.func.functional_call(
            module, {"weight": straight.flatten(), "mask": latent.everything}, (x,)
        ).square().sum().backward()
        torch.testing.assert_close(
            latent.inside.grad, straight.grad[latent.start], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            latent.outside.grad, latent.unit * straight.grad[~latent.start], rtol=1e-4, atol=1e-4
        )


def test_the_penalty_is_what_lies_outside_the_support():
    latent = Latent(patterned(weight_of(), Pattern(4, 2)))
    assert latent.pull().item() == 0
    latent.outside.data.fill_(1e-3 / latent.unit)
    outside = latent.latent()[~latent.support(latent.latent())]
    inside = latent.latent()[latent.support(latent.latent())]
    assert (
        latent.pull().item()
        == pytest.approx((outside.square().sum() / inside.square().sum()).item(), rel=CLOSE)
        and outside.any()
    )


def test_the_loss_falls_and_a_student_that_is_the_teacher_stays():
    model = tiny_model("llama")
    modules = {
        DOWN: sparse(weight_of(), None, 0.3),
        DOWN.replace("down", "up"): dictionary(weight_of(DOWN.replace("down", "up")), None),
    }
    with training(model):
        original = Teacher(model, [windows()])
        latents = Supports(model, modules, blocks(model)[1], "compressed")
        assert len(latents.latents) == 2 and len(latents.parameters) == 2 * 2 + 1
        loss = loss_of(original)
        with installed(model, modules | latents.copies):
            task = Task(
                "supports",
                latents.parameters,
                1,
                lambda index: latents.penalise(loss(index)),
                original.divergence,
            )
            state = fit(task, Heal(steps=30, check=10, learning_rate=0.05), 0)
            best = original.divergence()
        found = latents.masters()
        with installed(model, modules | found):
            assert (
                original.divergence()
                == pytest.approx(best, rel=1e-2)
                == pytest.approx(min(state.scores), rel=1e-2)
            )
        assert best < 0.8 * state.scores[0]
        assert all(
            found[name].spec() == module.spec() and not torch.equal(found[name].mask, module.mask)
            for name, module in modules.items()
        )
        whole = {DOWN: patterned(weight_of(), Pattern(48, 48))}
        same = Supports(model, whole, blocks(model)[1], "everything")
        with (
            installed(model, same.copies),
            torch.enable_grad(),
            taking_gradients(same.parameters.values()),
        ):
            same.penalise(loss(0)).backward()
            assert all(not parameter.grad.any() for parameter in same.parameters.values())


def test_residuals_and_shared_atoms_learn_beside_supports():
    model, names = (
        tiny_model("llama"),
        {
            f"model.layers.0.self_attn.{part}_proj": size
            for part, size in (("q", 32), ("k", 16), ("v", 16))
        },
    )
    modules = dictionary(torch.cat([weight_of(name) for name in names]), None).split(names)
    modules[DOWN] = Adapted(sparse(weight_of(), None), *low_rank_pair(weight_of(), 3))
    with training(model):
        latents = Supports(model, modules, blocks(model)[1], "compressed")
        assert {key.removeprefix(DOWN) for key in latents.parameters if key.startswith(DOWN)} == {
            ".inside",
            ".outside",
            ".up",
            ".down",
        }
        lender, *borrowers = names
        with torch.no_grad():
            latents.parameters[f"{lender}.atoms"].mul_(2)
        found = latents.masters()
    assert all(found[name].lent is found[lender] for name in borrowers)
    torch.testing.assert_close(found[borrowers[0]].to_dense(), 2 * modules[borrowers[0]].to_dense())


@pytest.mark.parametrize("method", ["sparse", pytest.param("rocket", marks=pytest.mark.slow)])
def test_a_run_keeps_its_size_and_goes_on_to_the_same_bytes(
    tiny_llama, text_file, tmp_path, method
):
    sets = [
        f"method=[{{dense: false, candidates: [{{name: {method}}}]}}]",
        "allocation={kind: uniform, keep: 0.6}",
    ]
    sets.append("output.dtype=bfloat16")
    quick = [
        f"heal.{value}"
        for value in (
            "enabled=true",
            "supports=learned",
            "steps=15",
            "check=4",
            "learning_rate=0.05",
        )
    ]
    made = recipe(tiny_llama, text_file, *sets, *quick)
    expected = pipeline.compress(made, tmp_path / "whole")
    before = pipeline.compress(recipe(tiny_llama, text_file, *sets), tmp_path / "plain")
    healed = expected["trained"]["heal"]
    assert (
        healed["kept"]
        and healed["steps"] == 15
        and len(healed["looks"]) == 4 + 2
        and expected["kept"] == before["kept"]
    )
    specs = [
        read_json(tmp_path / run / "config.json")["quantization_config"]["linears"]
        for run in ("plain", "whole")
    ]
    assert specs[0] == specs[1] and expected["heldout"]["kl"] == pytest.approx(
        healed["after"]["heldout"], rel=2e-2
    )
    for at in (3,) if method == "rocket" else (2, 3):
        with interrupted(trainer, "_advance", at):
            pipeline.compress(made, tmp_path / "out")
    pipeline.compress(made, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_support_outside_the_blocks_stays(tiny_llama, text_file, tmp_path):
    methods = (
        "method=[{targets: lm_head, candidates: [{name: sparse}]}, {candidates: [{name: "
        "low_rank}]}]"
    )
    quick = [
        f"heal.{value}" for value in ("enabled=true", "supports=learned", "steps=4", "check=2")
    ]
    report = pipeline.compress(
        recipe(tiny_llama, text_file, methods, "allocation={kind: uniform, keep: 0.6}", *quick),
        tmp_path / "out",
    )
    assert report["trained"]["heal"]["steps"] == 4
    assert report["trained"]["heal"]["after"]["heldout"] == pytest.approx(
        report["heldout"]["kl"], rel=2e-2
    )


def test_steps_are_parted_and_training_without_stored_entries_is_refused(tiny_llama, text_file):
    first, second = split_section(Heal(steps=200, supports="learned"))
    assert (first.steps, second.steps, first.supports, second.supports) == (
        160,
        40,
        "learned",
        "fixed",
    )
    assert first.learning_rate == Heal().learning_rate == 5 * second.learning_rate
    for train in ("low_rank", "lora"):
        with pytest.raises(ConfigError, match=rf"heal.*learns no supports where train: {train}"):
            recipe(tiny_llama, text_file, "heal.supports=learned", f"heal.train={train}")
