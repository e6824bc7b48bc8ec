"""Training loop of repair and healing: AdamW from look to look at the held-out windows, the best
state kept.

The learning rate of a tensor is relative to the median of its absolute values, since factors,
scales and norms differ by orders of magnitude; some atoms and factors have a few entries a thousand
times the others, which inputs hardly reach and a mean would follow.

References: settings after AA-SVD's block refinement (arXiv 2604.02119): AdamW,
warm-up of a tenth, cosine to a tenth, clipping at 1. Differs: no weight decay; relative learning
rates; early stop; after a look that is much worse than the best one, on from the best state at half
the rate, since one rate does not suit a model that has lost half of everything and one that has
lost a percent.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from compressor.training.optimizers import Moments, build_optimizer, read_moments
from compressor.training.team import ALONE, Team

# what the learning rate of a tensor is relative to whose median is zero, such as a bias
ZERO = 1e-2
# times the best score: a rate that leads there is too high; less is noise, which the cosine takes
# away
OVERSHOT = 1.1
WARM = 0.1  # fraction of the steps in which the learning rate rises
END = 0.1  # of the largest learning rate, which the last step has


@dataclass(frozen=True)
class State:
    """Progress of training, complete, so that it goes on to the same bits."""

    step: int
    parameters: dict[str, Tensor]
    moments: dict[str, Moments]  # of the optimizer; the steps that go on from here use them up
    best: dict[str, Tensor]
    scores: tuple[float, ...]  # on the held-out windows at each look, the first before any step


@dataclass(frozen=True)
class Task:
    """Parameters to train, and the functions that judge them."""

    title: str
    parameters: dict[str, nn.Parameter]
    batches: int  # how many there are
    loss: Callable[[int], Tensor]  # of one batch, by its index, with autograd
    score: Callable[[], float]  # on the held-out windows
    # windows in each batch; several processes need it where batches are not equally large
    windows: tuple[int, ...] = ()


@dataclass(frozen=True)
class Orders:
    """Message of the main process to the others: the steps up to the next look, or, without sizes,
    the final parameters.
    """

    scope: Any  # of the main process's store
    parameters: dict[str, Tensor]
    sizes: dict[str, float] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)
    first: int = 0  # number of the first step


@dataclass(frozen=True)
class Schedule:
    """Batches that the steps see, in each process, and how far they may move each tensor."""

    task: Task
    section: Training
    # of rounds: `processes` batches that follow each other, one for each process
    order: list[int]
    sizes: dict[str, float]
    team: Team = ALONE

    @classmethod
    def of(cls, task: Task, section: Training, seed: int, team: Team = ALONE) -> "Schedule":
        """Schedule a training that starts from the parameters as they are."""
        sizes = {
            name: parameter.detach().abs().median().item() or ZERO
            for name, parameter in task.parameters.items()
        }
        order = draw_batches(-(-task.batches // team.processes), section.steps, seed)
        return cls(task, section, order, sizes, team)

    def share(self, step: int) -> tuple[int, float] | None:
        """Return the batch of this process in a step, and its weight in a mean over the processes;
        None where no batch is left for it.
        """
        processes = self.team.processes
        first = self.order[step] * processes
        batches = range(first, min(first + processes, self.task.batches))
        if self.team.rank >= len(batches):
            return None
        windows, batch = self.task.windows or (1,) * self.task.batches, batches[self.team.rank]
        return batch, processes * windows[batch] / sum(windows[other] for other in batches)

    def looks_from(self, store: Store) -> list[int]:
        """List the steps after which training is looked at, from the last one on whose state is in
        `store`.
        """
        section = self.section
        looks = [*range(section.check, section.steps, section.check), section.steps]
        stored = [look for look in looks if store.holds("training", [self.task.title, look])]
        return [look for look in looks if look >= max(stored, default=0)]


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
    parameters; the others return no scores.

    Raises:
        NumericalError: the loss is not finite.
        CompressorError: another process is gone, or trains something else.
    """
    schedule = Schedule.of(task, section, seed, team)
    if team.rank:
        return _follow(schedule, store.scope)
    values = {name: parameter.detach().clone() for name, parameter in task.parameters.items()}
    state = State(0, values, {name: {} for name in values}, values, (task.score(),))
    for look in progress(schedule.looks_from(store), task.title):
        if is_stale(state.scores, section.patience):
            break
        last, advance = state.step, partial(_reach, schedule, state, look, store.scope)
        state = store.recall("training", [task.title, look], advance)
        store.forget("training", [task.title, last])
    team.tell(Orders(store.scope, state.best))
    _load(task.parameters, state.best)
    return state


def is_stale(scores: Sequence[float], patience: int) -> bool:
    """Say whether `patience` looks have passed since the best one and since the rate was last
    cut.
    """
    looks, best_look = len(scores) - 1, scores.index(min(scores))
    last_rate_cut = max(find_overshoots(scores), default=0)
    return looks - max(best_look, last_rate_cut) >= patience


def find_overshoots(scores: Sequence[float]) -> list[int]:
    """List the looks that were so much worse than the best one before that training goes on from
    that one, at half the rate from then on.
    """
    best = list(accumulate(scores, min))
    return [look for look in range(1, len(scores)) if scores[look] > OVERSHOT * best[look - 1]]


def draw_batches(batches: int, steps: int, seed: int) -> list[int]:
    """Draw the batch that each step sees: all of them in one random order after the other."""
    generator = torch.Generator().manual_seed(seed)
    rounds = (
        torch.randperm(batches, generator=generator).tolist() for _ in range(-(-steps // batches))
    )
    return [index for order in rounds for index in order][:steps]


def relative_rate(step: int, section: Training) -> float:
    """Compute the learning rate of a step, counted from 0, relative to the largest: a line up, then
    half a cosine down to END.
    """
    warm = max(1, round(WARM * section.steps))
    if step < warm:
        return (step + 1) / warm
    return (
        END + (1 - END) * (1 + math.cos(math.pi * (step - warm) / max(1, section.steps - warm))) / 2
    )


def _reach(schedule: Schedule, state: State, end: int, scope: Any) -> State:
    while state.step < end:
        state = _advance(schedule, state, scope)
    return state


def _follow(schedule: Schedule, scope: Any) -> State:
    """Take the steps that the main process orders, until it tells the final parameters."""
    while True:
        orders: Orders = schedule.team.hear()
        if orders.scope != scope:
            who = f"{schedule.task.title}: process {schedule.team.rank}"
            raise CompressorError(
                f"{who} came to another model than the main one; are their files the same?"
            )
        if not orders.sizes:
            _load(schedule.task.parameters, orders.parameters)
            return State(orders.first, orders.parameters, {}, orders.parameters, ())
        _steps(
            replace(schedule, sizes=orders.sizes), orders.parameters, orders.moments, orders.first
        )


def _advance(schedule: Schedule, state: State, scope: Any) -> State:
    """Take the steps up to the next look, by all processes, and look."""
    overshoots = find_overshoots(state.scores)
    has_overshot = bool(overshoots) and overshoots[-1] == len(state.scores) - 1
    start = state.best if has_overshot else state.parameters
    sizes = {name: size / 2 ** len(overshoots) for name, size in schedule.sizes.items()}
    schedule = replace(schedule, sizes=sizes)
    schedule.team.tell(Orders(scope, start, schedule.sizes, state.moments, state.step))
    optimizer = _steps(schedule, start, state.moments, state.step)
    values = {
        name: parameter.detach().clone() for name, parameter in schedule.task.parameters.items()
    }
    score = schedule.task.score()
    best = values if score < min(state.scores) else state.best
    step = min(state.step + schedule.section.check, schedule.section.steps)
    return State(
        step,
        values,
        read_moments(optimizer, schedule.task.parameters),
        best,
        (*state.scores, score),
    )


def _steps(
    schedule: Schedule, start: Mapping[str, Tensor], moments: Mapping[str, Moments], first: int
) -> torch.optim.Optimizer:
    """Take the steps from number `first` up to the next look, by this process; the parameters are
    left there. Returns the optimizer.
    """
    task, section, team = schedule.task, schedule.section, schedule.team
    _load(task.parameters, start)
    optimizer = build_optimizer(section.optimizer, task.parameters, moments)
    with torch.enable_grad(), taking_gradients(task.parameters.values()):
        for step in range(first, min(first + section.check, section.steps)):
            for group, name in zip(optimizer.param_groups, task.parameters, strict=True):
                group["lr"] = (
                    section.learning_rate * schedule.sizes[name] * relative_rate(step, section)
                )
            share = schedule.share(step)
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


@contextmanager
def taking_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let parameters take gradients inside the `with`; afterwards they are frozen and have none."""
    learning = list(parameters)
    for parameter in learning:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(False)
            parameter.grad = None


@torch.no_grad()
def _load(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
