"""The loop that repair and healing share: AdamW from look to look at the held-out windows, the best state kept.

The learning rate of a tensor is relative to the median of its absolute values, since factors, scales and norms differ by orders
of magnitude; some atoms and factors have a few entries a thousand times the others, which inputs hardly reach and a mean would follow.

References: settings after AA-SVD's block refinement (arXiv 2604.02119; low-rank card 2.17): AdamW, warm-up of a tenth, cosine to a tenth,
clipping at 1. Differs: no weight decay; relative learning rates; early stop; after a look that shows no progress, on from the best state at
half the rate, since one rate does not suit a model that has lost half of everything and one that has lost a percent.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import NumericalError
from compressor.optimizers import Moments, moments_of, optimizer_of
from compressor.progress import Progress, silent
from compressor.sections import Training
from compressor.store import NOWHERE, Store

ZERO = 1e-2  # what the learning rate of a tensor is relative to whose median is zero, such as a bias
WARM, END = 0.1, 0.1  # the learning rate rises in this fraction of the steps, and falls to this fraction


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
    """What is trained on what. batches: how many there are; loss(index): of one, with autograd; score(): on the held-out windows."""

    title: str
    parameters: dict[str, nn.Parameter]
    batches: int
    loss: Callable[[int], Tensor]
    score: Callable[[], float]


def fit(task: Task, section: Training, seed: int, store: Store = NOWHERE, progress: Progress = silent) -> State:
    """Train, and leave the parameters at the best held-out score that was seen, which may be the first.

    The state at the last look is kept in `store`: 8 bytes for each number that learns, and its moments. Raises NumericalError where the
    loss is not finite.
    """
    sizes = {name: parameter.detach().abs().median().item() or ZERO for name, parameter in task.parameters.items()}
    order = drawn(task.batches, section.steps, seed)
    values = {name: parameter.detach().clone() for name, parameter in task.parameters.items()}
    state = State(0, values, {name: {} for name in values}, values, (task.score(),))
    ends = [*range(section.check, section.steps, section.check), section.steps]
    newest = max((end for end in ends if store.holds("training", [task.title, end])), default=0)
    for end in progress([end for end in ends if end >= newest], task.title):
        if len(state.scores) - 1 - state.scores.index(min(state.scores)) >= section.patience:
            break
        former, state = state, store.recall("training", [task.title, end], partial(_reach, task, section, state, order, sizes, end))
        store.forget("training", [task.title, former.step])
    _load(task.parameters, state.best)
    return state


def drawn(batches: int, steps: int, seed: int) -> list[int]:
    """Which batch each step sees: all of them in one random order after the other."""
    generator = torch.Generator().manual_seed(seed)
    rounds = (torch.randperm(batches, generator=generator).tolist() for _ in range(-(-steps // batches)))
    return [index for each in rounds for index in each][:steps]


def rate(step: int, section: Training) -> float:
    """Learning rate of a step, from 0, relative to the largest: a line up, then half a cosine down to END."""
    warm = max(1, round(WARM * section.steps))
    if step < warm:
        return (step + 1) / warm
    return END + (1 - END) * (1 + math.cos(math.pi * (step - warm) / max(1, section.steps - warm))) / 2


def _reach(task: Task, section: Training, state: State, order: list[int], sizes: dict[str, float], end: int) -> State:
    while state.step < end:
        state = _advance(task, section, state, order, sizes)
    return state


def _advance(task: Task, section: Training, state: State, order: list[int], sizes: dict[str, float]) -> State:
    """The steps up to the next look, and the look. After one that showed no progress, from the best state, at half the rate."""
    failed = sum(score >= min(state.scores[:look]) for look, score in enumerate(state.scores) if look)
    _load(task.parameters, state.parameters if state.scores[-1] == min(state.scores) else state.best)
    optimizer = optimizer_of(section.optimizer, task.parameters, state.moments)
    last = min(state.step + section.check, section.steps)
    with torch.enable_grad(), attached(task.parameters.values()):
        for step in range(state.step, last):
            for group, name in zip(optimizer.param_groups, task.parameters, strict=True):
                group["lr"] = section.learning_rate * sizes[name] * rate(step, section) / 2**failed
            loss = task.loss(order[step])
            if not math.isfinite(loss.item()):
                raise NumericalError(f"{task.title}: the loss is {loss.item()} at step {step + 1}; lower the learning_rate of that section")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(task.parameters.values(), section.clip)
            optimizer.step()
            optimizer.zero_grad()
    values = {name: parameter.detach().clone() for name, parameter in task.parameters.items()}
    score = task.score()
    best = values if score < min(state.scores) else state.best
    return State(last, values, moments_of(optimizer, task.parameters), best, (*state.scores, score))


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
