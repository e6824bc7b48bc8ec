"""Healing, and whole runs that train: frozen where they should be, kept only where held-out
divergence falls, the same bytes again.
"""

import json

import pytest
import torch
from support.activations import windows
from support.blocks import DOWN, MADE, low_rank_pair
from support.jobs import built
from support.models import read_json, tiny_model
from support.modules import low_rank
from support.processes import contents, interrupted
from support.recipes import recipe
from support.training import NOISE, SECTION, loss_of, modules_of
from torch.nn import functional

import compressor
from compressor.errors import ConfigError, NumericalError
from compressor.evaluation import perplexity
from compressor.linears import Adapted, Packed
from compressor.models.install import installed
from compressor.models.linears import blocks, linears
from compressor.pipeline import job as jobs
from compressor.pipeline import run as pipeline
from compressor.pipeline import stages
from compressor.pipeline import train as recovery
from compressor.pipeline.train import training
from compressor.recipe.training import Heal
from compressor.resume.store import FolderStore
from compressor.training import loop as trainer
from compressor.training.learners import Learners, learning_parameters, rebuild
from compressor.training.loop import Task, fit
from compressor.training.losses import Divergence
from compressor.training.teacher import Teacher

CLOSE = 1e-5
QUICK = [
    f"{stage}.{key}"
    for stage in ("repair", "heal")
    for key in ("enabled=true", "steps=12", "check=4", "learning_rate=0.01")
]


def task_of(model, modules, kind="kl", train="everything"):
    original = Teacher(model, [windows()])
    learners = Learners(model, modules, blocks(model)[1], train)
    return (
        original,
        learners,
        Task("heal", learners.parameters, 1, loss_of(original, kind), original.divergence),
    )


def test_the_losses_are_those_of_the_definition():
    model, batch = tiny_model("llama"), windows()
    modules = modules_of(model)
    with training(model):
        expected = functional.log_softmax(model(input_ids=batch).logits, -1)
        original = Teacher(model, [batch])
        with installed(model, modules):
            found = functional.log_softmax(model(input_ids=batch).logits, -1)
            losses = {kind: loss_of(original, kind)(0).item() for kind in ("kl", "ce", "both")}
            divergence = original.divergence()
    kl = (expected.exp() * (expected - found)).sum(-1).mean().item()
    ce = functional.cross_entropy(found[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).item()
    assert losses["kl"] == pytest.approx(kl, abs=1e-7) and losses["ce"] == pytest.approx(
        ce, rel=CLOSE
    )
    assert losses["both"] == pytest.approx(kl + ce, rel=CLOSE) and divergence == pytest.approx(
        kl, abs=1e-7
    )


@pytest.mark.parametrize("keep", [True, False])
def test_the_original_speaks_through_its_own_head(keep):
    model, batch = tiny_model("llama"), windows()
    with training(model), torch.no_grad():
        expected, original = model(input_ids=batch).logits, Teacher(model, [batch], keep)
        with installed(
            model, modules_of(model) | {"lm_head": low_rank(model.lm_head.weight, None, 2, True)}
        ):
            found = original.logits(0, original.hidden(0), slice(None))
            torch.testing.assert_close(found, expected.flatten(0, 1))


def test_a_student_that_is_the_teacher_has_no_loss_and_does_not_move():
    model = tiny_model("llama")
    with training(model):
        original, learners, task = task_of(model, {})
        before = {name: tensor.detach().clone() for name, tensor in learners.parameters.items()}
        with installed(model, learners.copies):
            assert loss_of(original)(0).item() == 0 and original.divergence() == 0
            state = fit(task, SECTION, 0)
    assert state.scores[-1] == 0 and len(learners.parameters) == 18
    assert all(torch.equal(tensor, before[name]) for name, tensor in learners.parameters.items())


@pytest.mark.parametrize("kind", ["kl", "ce", "both"])
def test_the_loss_of_one_batch_falls(kind):
    model = tiny_model("llama")
    with training(model):
        original, learners, task = task_of(model, modules_of(model), kind)
        with installed(model, learners.copies):
            before = loss_of(original, kind)(0).item()
            task = Task(
                "heal", task.parameters, 1, task.loss, lambda: loss_of(original, kind)(0).item()
            )
            state = fit(task, SECTION, 0)
            assert loss_of(original, kind)(0).item() == pytest.approx(min(state.scores), rel=CLOSE)
    assert min(state.scores) < {"kl": 0.5, "ce": 0.99, "both": 0.99}[kind] * before


def test_training_stops_after_some_looks_without_improvement_and_the_best_is_back():
    parameter = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    scores = iter([5.0, 3.0, 3.2, 3.2, 1.0])
    seen = []

    def score():
        seen.append(parameter.clone())
        return next(scores)

    task = Task("toy", {"it": parameter}, 1, lambda index: parameter.square().sum(), score)
    state = fit(task, Heal(steps=50, check=2, patience=2), 0)
    assert state.scores == (5.0, 3.0, 3.2, 3.2) and state.step == 6
    assert torch.equal(parameter, seen[1]) and not torch.equal(seen[1], seen[0])


def test_a_loss_that_is_not_finite_stops_with_the_cure():
    parameter = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(
        NumericalError, match=r"toy: the loss is nan at step 1; lower the learning_rate"
    ):
        fit(
            Task(
                "toy",
                {"it": parameter},
                1,
                lambda index: (parameter * torch.nan).sum(),
                lambda: 1.0,
            ),
            Heal(),
            0,
        )


def test_it_goes_on_to_the_same_bits(tmp_path):
    def run(store, stop_at=None):
        model = tiny_model("llama")
        with training(model):
            _, learners, task = task_of(model, modules_of(model))
            calls = []

            def loss(index):
                calls.append(index)
                if len(calls) == stop_at:
                    raise KeyboardInterrupt
                return task.loss(index)

            with installed(model, learners.copies):
                fit(Task("heal", task.parameters, 1, loss, task.score), SECTION, 0, store)
        return [parameter.clone() for parameter in learners.parameters.values()], len(calls)

    expected, steps = run(FolderStore(tmp_path / "unbroken"))
    with pytest.raises(KeyboardInterrupt):
        run(FolderStore(tmp_path / "store"), stop_at=25)
    for damaged, made in ((False, 10), (False, 0), (True, 30)):
        (piece,) = (tmp_path / "store").iterdir()  # of the last look alone
        if damaged:
            piece.write_bytes(piece.read_bytes()[:-1])
        again, left = run(FolderStore(tmp_path / "store"))
        assert (steps, left) == (30, made)
        assert all(torch.equal(one, other) for one, other in zip(expected, again, strict=True))


FACTORS = {
    "low_rank": {"weight", "up"},
    "chained": {"scales", "up_scales"},
    "adapted": {"up", "down"},
}


@pytest.mark.parametrize("kind", [*MADE, "adapted integers"])
def test_low_rank_trains_factors_and_no_other_number_of_a_linear(kind):
    weight, bias = tiny_model("llama").get_submodule(DOWN).weight.detach(), torch.ones(32)
    expected = FACTORS.get(kind.split()[0], set())
    if kind == "adapted integers":
        up, down = low_rank_pair(weight, 4)
        factors = (
            Packed.of_codes((part * 9).round().clamp(-4, 3), part.new_ones(4, 4), None, None, 3)
            for part in (up.T, down)
        )
        module, expected = (
            Adapted(MADE["sparse"](weight, bias), *factors),
            {"up_scales", "down_scales"},
        )
    else:
        module = MADE[kind](weight, bias)
    assert learning_parameters(module, "low_rank").keys() == expected
    assert learning_parameters(torch.nn.Linear(3, 2), "low_rank") == {} and learning_parameters(
        torch.nn.LayerNorm(3), "low_rank"
    ).keys() == {"weight", "bias"}


def test_low_rank_leaves_everything_but_factors_and_norms_bit_identical():
    model = tiny_model("llama")
    weights = {name: info.module.weight.detach() for name, info in linears(model).items()}
    modules = {
        name: low_rank(weight, torch.ones(len(weight)), 4, True)
        for name, weight in weights.items()
        if "down" in name
    }
    modules |= {
        name: MADE["sparse"](weight, None) for name, weight in weights.items() if "up" in name
    }
    with training(model):
        _, learners, task = task_of(model, modules, train="low_rank")
        with installed(model, learners.copies):
            state = fit(task, SECTION, 0)
        found = rebuild(
            learners.originals, learners.values(dict.fromkeys(learners.parameters, torch.float32))
        )
    assert min(state.scores) < state.scores[0]
    assert {name.split(".")[-1] for name in found} == {
        "input_layernorm",
        "post_attention_layernorm",
        "down_proj",
    } and len(found) == 6
    for name, module in found.items():
        before = modules.get(name, model.get_submodule(name)).state_dict()
        for key, tensor in module.state_dict().items():
            assert torch.equal(tensor, before[key]) == (key in ("bias", "pivots")), (name, key)


@pytest.fixture(scope="module")
def trained(tiny_llama, text_file, tmp_path_factory):
    """A run of every stage that trains, in bfloat16: (recipe, folder, report)."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    made = recipe(tiny_llama, text_file, "allocation.keep=0.5", "output.dtype=bfloat16", *QUICK)
    return made, folder, pipeline.compress(made, folder)


def test_a_run_says_what_training_did_on_all_three_texts(trained, tiny_llama, text_file, tmp_path):
    _, folder, report = trained
    plan = read_json(folder / "plan.json")
    assert plan["trained"] == report["trained"] and list(plan["trained"]) == ["repair", "heal"]
    last = plan["trained"]["heal"]
    assert last["kept"] and last["before"] == plan["trained"]["repair"]["after"]
    assert last["after"]["heldout"] < last["before"]["heldout"]
    assert report["heldout"]["kl"] == pytest.approx(last["after"]["heldout"], rel=NOISE)
    assert report["calibration"]["kl"] == pytest.approx(last["after"]["calibration"], rel=NOISE)
    plain = pipeline.compress(
        recipe(tiny_llama, text_file, "allocation.keep=0.5", "output.dtype=bfloat16"),
        tmp_path / "plain",
    )
    assert report["kept"] == plain["kept"] and report["kl"] != plain["kl"]
    assert (
        last["after"]["heldout"] < plain["heldout"]["kl"]
        and plain["calibration"] is None
        and plain["trained"] == {}
    )


def test_errors_are_those_of_what_is_stored_and_norms_and_dense_weights_are_written(
    trained, tiny_llama
):
    _, folder, report = trained
    model, source = compressor.load(folder)[0], compressor.load(tiny_llama)[0]
    linears_ = {linear["name"]: linear for linear in report["linears"]}
    kept = [name for name, linear in linears_.items() if linear["method"] == "dense"]
    assert all(linear["error"] > 0 for linear in linears_.values())
    norm = "model.layers.1.post_attention_layernorm"
    for name in [*kept, norm]:
        assert not torch.equal(
            model.get_submodule(name).weight, source.get_submodule(name).weight.bfloat16()
        ), name
    assert torch.equal(model.model.embed_tokens.weight, source.model.embed_tokens.weight.bfloat16())
    assert torch.equal(model.model.norm.weight, source.model.norm.weight.bfloat16())


def test_the_job_is_left_as_it_was_and_measured_errors_follow(tiny_llama, text_file):
    made = recipe(tiny_llama, text_file, "allocation.keep=0.5", *QUICK)
    job = jobs.start(made, jobs.open_source(str(tiny_llama), None))
    before = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
    plan, modules = built(job)
    assert all(torch.equal(tensor, before[name]) for name, tensor in job.model.state_dict().items())
    assert all(parameter.requires_grad for parameter in job.model.parameters())
    changed = [choice for choice in plan.linears.values() if choice.method == "low_rank"]
    assert changed and all(
        choice.measured != pytest.approx(choice.predicted, rel=1e-6) for choice in changed
    )
    stages.install(job, modules)
    original = compressor.load(tiny_llama)[0]
    found = perplexity.compare(original, job.model, job.heldout.tokens).kl
    assert found == pytest.approx(plan.trained["heal"]["after"]["heldout"], rel=NOISE)


@pytest.mark.parametrize("stage", ["repair", "heal"])
def test_what_helps_on_too_few_tokens_only_is_not_kept(tiny_llama, text_file, stage):
    few = [
        "calibration.windows=10",
        "calibration.length=2",
        "calibration.heldout=9",
        "allocation.keep=0.9",
    ]
    sets = [
        f"{stage}.{value}"
        for value in ("enabled=true", "steps=40", "check=40", "learning_rate=0.1")
    ]
    made = recipe(
        tiny_llama, text_file, *few, *sets, "allocation.damage=two_sided", "allocation.keep=0.8"
    )
    job = jobs.start(made, jobs.open_source(str(tiny_llama), None))
    plan, modules = built(job)
    done = plan.trained[stage]
    assert not done["kept"] and all(name in plan.linears for name in modules)
    if stage == "heal":
        assert done["after"]["heldout"] >= done["before"]["heldout"]


def test_a_stopped_run_goes_on_to_the_same_bytes(trained, tmp_path):
    made, folder, _ = trained
    for at in (2, 8):  # in the repair of the first block and in healing
        with interrupted(trainer, "_advance", at):
            pipeline.compress(made, tmp_path / "out")
    pipeline.compress(made, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(folder)


def test_planning_does_not_train(trained, tmp_path, monkeypatch):
    made, _, _ = trained
    pipeline.calibrate(made, tmp_path / "stats")
    monkeypatch.setattr(recovery, "_Recovery", None)
    assert json.dumps(pipeline.plan(made, stats=tmp_path / "stats"))


def test_training_without_held_out_windows_is_refused_before_anything_is_collected(
    tiny_llama, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(stages, "statistics", None)
    sets = ["calibration.heldout=0", "allocation.damage=two_sided", "repair.enabled=true"]
    with pytest.raises(
        ConfigError, match=r"held-out windows to be judged on; set calibration\.heldout above 0"
    ):
        pipeline.compress(recipe(tiny_llama, text_file, *sets), tmp_path / "out")


def test_linears_that_are_stored_together_are_trained_and_measured_together(
    tiny_llama, text_file, tmp_path
):
    share = (
        "method=[{dense: false, candidates: [{name: compot, options: {rounds: 3}, share: [qkv, "
        "gate_up]}]}]"
    )
    report = pipeline.compress(
        recipe(tiny_llama, text_file, share, "allocation.keep=0.8", *QUICK), tmp_path / "out"
    )
    linears_ = {linear["name"]: linear for linear in report["linears"]}
    gate, up = (linears_[f"model.layers.1.mlp.{part}_proj"] for part in ("gate", "up"))
    assert (
        report["trained"]["heal"]["kept"]
        and gate["measured"] == up["measured"] != gate["predicted"]
    )
    model = compressor.load(tmp_path / "out")[0]
    found = perplexity.compare(compressor.load(tiny_llama)[0], model, windows(40, 20)).kl
    assert found > 0 and report["heldout"]["kl"] == pytest.approx(
        report["trained"]["heal"]["after"]["heldout"], rel=NOISE
    )


def test_the_gradient_of_the_divergence_is_that_of_its_definition():
    generator = torch.Generator().manual_seed(0)
    logits, expected = (
        torch.randn(4, 7, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    expected[:, 2] = -torch.inf
    assert torch.autograd.gradcheck(
        lambda found: Divergence.apply(found, expected), logits.requires_grad_(True)
    )
    assert Divergence.apply(logits, expected).item() == pytest.approx(
        perplexity.kl_sum(expected[None], logits[None]).item()
    )


def test_looks_in_between_do_not_disturb_training():
    def trained_with(check):
        parameter = torch.nn.Parameter(torch.linspace(0.5, 2, 6), requires_grad=False)
        task = Task(
            "toy",
            {"it": parameter},
            3,
            lambda index: ((index + 1) * parameter.square()).sum(),
            lambda: parameter.sum().item(),
        )
        return fit(task, Heal(steps=12, check=check), 0)

    often, once = trained_with(3), trained_with(12)
    assert torch.equal(often.parameters["it"], once.parameters["it"]) and len(often.scores) == 5
