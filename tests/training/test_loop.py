"""The training loop: its optimizers, and what they remember."""

import itertools
import sys

import pytest
import torch
from support.jobs import built
from support.recipes import recipe

from compressor.errors import ConfigError
from compressor.models.partial_forward import recomputing
from compressor.pipeline import job as jobs
from compressor.pipeline import run as pipeline
from compressor.pipeline import train
from compressor.recipe.training import Heal
from compressor.resume.store import FolderStore
from compressor.training import step_budget
from compressor.training.loop import State, Task, find_overshoots, fit, is_stale
from compressor.training.optimizers import INSTALL

SECTION = Heal(steps=12, check=4, learning_rate=0.05)
BYTES = {"adamw": 8.0, "adamw_8bit": 2.05}  # of moments for each number of a large tensor


def toy() -> Task:
    """Distance from a target: of a tensor that fills no whole number of blocks of 256, a small one,
    and one that no loss depends on.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = {"large": (80, 61), "small": (7,), "idle": (80, 61)}
    parameters = {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator), requires_grad=False)
        for name, shape in shapes.items()
    }
    parameters["small"].mul_(1e-3)
    targets = {
        name: parameter + 0.2 * parameter.abs().median() for name, parameter in parameters.items()
    }

    def distance(index: int = 0) -> torch.Tensor:
        parts = [
            (parameters[name] - targets[name]) / targets[name].abs().median()
            for name in ("large", "small")
        ]
        return (index + 1) * sum(part.square().mean() for part in parts)

    return Task("toy", parameters, 3, distance, lambda: distance().item())


def moment_bytes(state: State, name: str) -> int:
    tables = ("qmap1", "qmap2", "step")  # the same for all tensors
    return sum(value.nbytes for key, value in state.moments[name].items() if key not in tables)


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_optimizers_lower_the_loss_at_rates_relative_to_each_tensor(kind):
    task = toy()
    before = {name: parameter.clone() for name, parameter in task.parameters.items()}
    state = fit(task, SECTION.model_copy(update={"optimizer": kind}), 0)
    assert state.scores[-1] < 0.2 * state.scores[0]
    moved = {
        name: (task.parameters[name] - before[name]).abs().max() / before[name].abs().median()
        for name in before
    }
    assert moved["idle"] == 0 and 0.1 < moved["small"] < 0.6 and 0.1 < moved["large"] < 0.6
    numbers = task.parameters["large"].numel()
    assert (
        moment_bytes(state, "large") == pytest.approx(BYTES[kind] * numbers, rel=0.02)
        and moment_bytes(state, "idle") == 0
    )
    assert moment_bytes(state, "small") == 8 * 7


def test_after_a_look_that_is_much_worse_it_goes_on_from_the_best_state_at_half_the_rate():
    task = toy()
    steep = SECTION.model_copy(update={"steps": 40, "learning_rate": 4.0, "patience": 9})
    scores = fit(task, steep, 0).scores
    assert max(scores[1:4]) > scores[0] > 5 * min(scores) and len(scores) == 11
    assert task.score() == min(scores)
    seen = list(itertools.accumulate(scores, min))
    assert scores[-1] < 2 * seen[-2]  # far from the best it has not gone again
    assert (
        find_overshoots(scores)[0] < 4
        and find_overshoots((3.0, 2.0, 2.1, 1.9, 2.2, 1.0)) == [4]
        and find_overshoots((0.0, 0.1)) == [1]
    )


@pytest.mark.parametrize(
    ("scores", "stale"),
    [
        ((3.0, 2.0, 2.0), False),
        ((3.0, 2.0, 2.0, 2.0), True),
        ((3.0, 2.0, 2.0, 2.5), False),  # the rate was cut at the last look
        ((3.0, 2.0, 2.5, 2.0, 2.0), True),
    ],
)
def test_training_ends_two_looks_after_the_best_one_or_the_last_cut(scores, stale):
    assert is_stale(scores, patience=2) is stale


def test_moments_of_8_bits_are_about_those_of_32():
    task, other = toy(), toy()
    before = task.parameters["large"].clone()
    fit(task, SECTION, 0)
    fit(other, SECTION.model_copy(update={"optimizer": "adamw_8bit"}), 0)
    apart = (task.parameters["large"] - other.parameters["large"]).norm() / (
        task.parameters["large"] - before
    ).norm()
    assert 0 < apart < 0.05
    torch.testing.assert_close(
        task.parameters["small"], other.parameters["small"], rtol=1e-2, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_a_stopped_fit_goes_on_to_the_same_bits(kind, tmp_path):
    section = SECTION.model_copy(update={"optimizer": kind, "learning_rate": 0.02})

    def run(folder, stop_at=None, section=section):
        task, calls = toy(), []

        def loss(index):
            calls.append(index)
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            return task.loss(index)

        state = fit(
            Task(task.title, task.parameters, task.batches, loss, task.score),
            section,
            0,
            FolderStore(tmp_path / folder),
        )
        return state, task.parameters, len(calls)

    expected, parameters, steps = run("unbroken")
    with pytest.raises(KeyboardInterrupt):
        run("store", stop_at=11)
    found, again, left = run("store")
    assert (steps, left) == (12, 4) and found.scores == expected.scores
    assert all(torch.equal(parameters[name], again[name]) for name in parameters)
    once, _, _ = run("once", section=section.model_copy(update={"check": 12}))
    assert all(torch.equal(expected.parameters[name], once.parameters[name]) for name in parameters)
    for name, moments in expected.moments.items():
        assert moments.keys() == found.moments[name].keys() and ("state1" in moments) == (
            kind == "adamw_8bit" and name != "idle"
        )
        assert all(
            torch.equal(torch.as_tensor(value), torch.as_tensor(found.moments[name][key]))
            for key, value in moments.items()
        )


def test_a_missing_library_is_named_before_any_work(tiny_llama, text_file, tmp_path, monkeypatch):
    made = recipe(tiny_llama, text_file, "heal.enabled=true", "heal.optimizer=adamw_8bit")
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ConfigError, match=r"optimizer 'adamw_8bit' needs bitsandbytes 0\.50 or later; run"
    ) as caught:
        pipeline.compress(made, tmp_path / "out")
    assert INSTALL in str(caught.value) and not list(tmp_path.iterdir())


def test_healing_with_blocks_that_run_again_is_the_same(tiny_llama, text_file, monkeypatch):
    calls = []
    monkeypatch.setattr(
        train, "recomputing", lambda model: calls.append(model) or recomputing(model)
    )
    found = []
    for value in ("false", "true"):
        sets = ["heal.enabled=true", "heal.steps=4", "heal.check=2", f"heal.checkpointing={value}"]
        made = recipe(
            tiny_llama, text_file, "allocation.keep=0.5", "allocation.damage=two_sided", *sets
        )
        job = jobs.start(made, jobs.open_source(str(tiny_llama), None))
        plan, modules = built(job)
        found.append(
            (
                plan.trained,
                [tensor for module in modules.values() for tensor in module.state_dict().values()],
            )
        )
    assert (
        found[0][0] == found[1][0]
        and all(map(torch.equal, found[0][1], found[1][1]))
        and len(calls) == 1
    )


def test_steps_are_timed_to_their_end_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    now = itertools.count()
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waited.append(next(now)))
    monkeypatch.setattr(step_budget.time, "monotonic", lambda: float(next(now)))
    pace = step_budget.time_step(lambda index: torch.ones(1, requires_grad=True).sum(), lambda: 0.0)
    assert pace == step_budget.StepTimes(2.0, 2.0)
    assert len(waited) == 6
