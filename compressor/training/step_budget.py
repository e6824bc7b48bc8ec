"""How many steps of training the rest of a budget has room for, from one step and one look that are
timed on the spot.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.recipe.training import Training

MARGIN = 1.25  # of a step, for the optimizer and for what is done once in a stage


@dataclass(frozen=True)
class Pace:
    """Seconds of a step (all blocks, one batch, forward and backward), and of a look."""

    step: float
    look: float

    def steps(self, section: Training, seconds: float, windows: int) -> int:
        """Steps that fit, at most those of the section; 0 if there is no time for a look. windows:
        of the batch that was timed.
        """
        each = MARGIN * self.step * section.batch_size / windows + self.look / section.check
        fitting = min(section.steps, int(seconds / each))
        return fitting if fitting >= min(section.check, section.steps) else 0


def timed(loss: Callable[[int], Tensor], look: Callable[[], float]) -> Pace:
    """Take two steps, whose gradients the caller discards, and a look; the second step counts."""
    for _ in range(2):
        start = _now()
        with torch.enable_grad():
            loss(0).backward()
        step = _now() - start
    start = _now()
    look()
    return Pace(step, _now() - start)


def _now() -> float:
    """Seconds, once an accelerator has done what it was told, which the processor does not wait
    for.
    """
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.monotonic()
