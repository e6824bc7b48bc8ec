"""The loop that repair and healing share: AdamW from look to look at the held-out windows, the best
state kept.

The learning rate of a tensor is relative to the median of its absolute values, since factors,
scales and norms differ by orders of magnitude; some atoms and factors have a few entries a thousand
times the others, which inputs hardly reach and a mean would follow.

References: settings after AA-SVD's block refinement (arXiv 2604.02119; low-rank card 2.17): AdamW,
warm-up of a tenth, cosine to a tenth, clipping at 1. Differs: no weight decay; relative learning
rates; early stop; after a look that is much worse than the best one, on from the best state at half
the rate, since one rate does not suit a model that has lost half of everything and one that has
lost a percent.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CompressorError, NumericalError
from compressor.recipe.training import Training
from compressor.resume.store import NOWHERE, Store
from compressor.runtime.progress import Progress, silent
from compressor.training.optimizers import Moments, moments_of, optimizer_of
from compressor.training.team import ALONE, Team

ZERO = (
    1e-2  # what the learning rate of a tensor is relative to whose median is zero, such as a bias
)
# times the best score: a rate that leads there is too high; less is noise, which the cosine takes
# away
OVERSHOT = 1.1
WARM, END = (
    0.1,
    0.1,
)  # the learning rate rises in this fraction of the steps, and falls to this fraction


@dataclass(frozen=True)
class State:
    """Where training stands: all of it, so that it goes on to the same bits."""

    step: int
    parameters: dict[str, Tensor]
    moments: dict[str, Moments]  # of the optimizer; the steps that go on from here use them up
    best: dict[str, Tensor]
    scores: tuple[float, ...]  # on the held-out windows at each look, the first before any step


@dataclass(frozen=True)
class Task:
    """What is trained on what. batches: how many there are; loss(index): of one, with autograd;
    score(): on the held-out windows.
    """

    title: str
    parameters: dict[str, nn.Parameter]
    batches: int
    loss: Callable[[int], Tensor]
    score: Callable[[], float]
    windows: tuple[
        int, ...
    ] = ()  # in each batch; several processes need it where batches are not equally large


@dataclass(frozen=True)
class Leg:
    """What the main process tells the others: the steps up to the next look, from number `first`;
    or, without sizes, what came out.
    """

    scope: Any  # of the main process's store
    parameters: dict[str, Tensor]
    sizes: dict[str, float] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)
    first: int = 0


@dataclass(frozen=True)
class Course:
    """How one training goes: what step s sees, in each process, and how far it may move each
    tensor.
    """

    task: Task
    section: Training
    order: list[
        int
    ]  # of the rounds: `processes` batches that follow each other, one for each process
    sizes: dict[str, float]
    team: Team = ALONE

    def share(self, step: int) -> tuple[int, float] | None:
        """The batch of this process in a step, and its weight in a mean over the processes; None
        where no batch is left for it.
        """
        each = self.team.processes
        first = self.order[step] * each
        batches = range(first, min(first + each, self.task.batches))
        if self.team.rank >= len(batches):
            return None
        windows = self.task.windows or (1,) * self.task.batches
        return batches[self.team.rank], each * windows[batches[self.team.rank]] / sum(
            windows[batch] for batch in batches
        )


def course(task: Task, section: Training, seed: int, team: Team = ALONE) -> Course:
    """The course of a training that starts from the parameters as they are."""
    sizes = {
        name: parameter.detach().abs().median().item() or ZERO
        for name, parameter in task.parameters.items()
    }
    return Course(
        task, section, drawn(-(-task.batches // team.processes), section.steps, seed), sizes, team
    )


def fit(
    task: Task,
    section: Training,
    seed: int,
    store: Store = NOWHERE,
    progress: Progress = silent,
    team: Team = ALONE,
) -> State:
    """Train, and leave the parameters at the best held-out score that was seen, which may be the
    first.

    The state at the last look is kept in `store`: 8 bytes for each number that learns, and its
    moments. The processes of `team` take the steps together, as the main one says, and all get its
    parameters; the others return no scores. Raises NumericalError where the loss is not finite,
    CompressorError where another process is gone, or trains something else.
    """
    going = course(task, section, seed, team)
    if team.rank:
        return _follow(going, store.scope)
    values = {name: parameter.detach().clone() for name, parameter in task.parameters.items()}
    state = State(0, values, {name: {} for name in values}, values, (task.score(),))
    ends = [*range(section.check, section.steps, section.check), section.steps]
    newest = max((end for end in ends if store.holds("training", [task.title, end])), default=0)
    for end in progress([end for end in ends if end >= newest], task.title):
        if (
            len(state.scores)
            - 1
            - max(state.scores.index(min(state.scores)), *overshot(state.scores), 0)
            >= section.patience
        ):
            break
        former, state = (
            state,
            store.recall(
                "training", [task.title, end], partial(_reach, going, state, end, store.scope)
            ),
        )
        store.forget("training", [task.title, former.step])
    team.tell(Leg(store.scope, state.best))
    _load(task.parameters, state.best)
    return state


def overshot(scores: Sequence[float]) -> list[int]:
    """Looks that were so much worse than the best one before that training goes on from that one,
    at half the rate from then on.
    """
    best = list(accumulate(scores, min))
    return [look for look in range(1, len(scores)) if scores[look] > OVERSHOT * best[look - 1]]


def drawn(batches: int, steps: int, seed: int) -> list[int]:
    """Which batch each step sees: all of them in one random order after the other."""
    generator = torch.Generator().manual_seed(seed)
    rounds = (
        torch.randperm(batches, generator=generator).tolist() for _ in range(-(-steps // batches))
    )
    return [index for each in rounds for index in each][:steps]


def rate(step: int, section: Training) -> float:
    """Learning rate of a step, from 0, relative to the largest: a line up, then half a cosine down
    to END.
    """
    warm = max(1, round(WARM * section.steps))
    if step < warm:
        return (step + 1) / warm
    return (
        END + (1 - END) * (1 + math.cos(math.pi * (step - warm) / max(1, section.steps - warm))) / 2
    )


def _reach(going: Course, state: State, end: int, scope: Any) -> State:
    while state.step < end:
        state = _advance(going, state, scope)
    return state


def _follow(going: Course, scope: Any) -> State:
    """Take the steps that the main process says, until it says what came out."""
    while True:
        leg: Leg = going.team.hear()
        if leg.scope != scope:
            who = f"{going.task.title}: process {going.team.rank}"
            raise CompressorError(
                f"{who} came to another model than the main one; are their files the same?"
            )
        if not leg.sizes:
            _load(going.task.parameters, leg.parameters)
            return State(leg.first, leg.parameters, {}, leg.parameters, ())
        _steps(replace(going, sizes=leg.sizes), leg.parameters, leg.moments, leg.first)


def _advance(going: Course, state: State, scope: Any) -> State:
    """The steps up to the next look, by all processes, and the look."""
    far = overshot(state.scores)
    start = state.best if far and far[-1] == len(state.scores) - 1 else state.parameters
    going = replace(going, sizes={name: size / 2 ** len(far) for name, size in going.sizes.items()})
    going.team.tell(Leg(scope, start, going.sizes, state.moments, state.step))
    optimizer = _steps(going, start, state.moments, state.step)
    values = {name: parameter.detach().clone() for name, parameter in going.task.parameters.items()}
    score = going.task.score()
    best = values if score < min(state.scores) else state.best
    step = min(state.step + going.section.check, going.section.steps)
    return State(
        step, values, moments_of(optimizer, going.task.parameters), best, (*state.scores, score)
    )


def _steps(
    going: Course, start: Mapping[str, Tensor], moments: Mapping[str, Moments], first: int
) -> torch.optim.Optimizer:
    """The steps from number `first` up to the next look, by this process; the parameters are left
    there. Returns the optimizer.
    """
    task, section, team = going.task, going.section, going.team
    _load(task.parameters, start)
    optimizer = optimizer_of(section.optimizer, task.parameters, moments)
    with torch.enable_grad(), attached(task.parameters.values()):
        for step in range(first, min(first + section.check, section.steps)):
            for group, name in zip(optimizer.param_groups, task.parameters, strict=True):
                group["lr"] = section.learning_rate * going.sizes[name] * rate(step, section)
            share = going.share(step)
            loss = task.loss(share[0]) * share[1] if share else torch.zeros((), device=team.device)
            if not math.isfinite(value := team.mean(loss.detach())):
                raise NumericalError(
                    f"{task.title}: the loss is {value} at step {step + 1}; lower the "
                    "learning_rate of that section"
                )
            if share:
                loss.backward()
            team.average(task.parameters.values())
            torch.nn.utils.clip_grad_norm_(task.parameters.values(), section.clip)
            optimizer.step()
            optimizer.zero_grad()
    return optimizer


class attached:
    """Parameters take gradients inside the `with`."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters = list(parameters)

    def __enter__(self) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    def __exit__(self, *error: Any) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


@torch.no_grad()
def _load(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
