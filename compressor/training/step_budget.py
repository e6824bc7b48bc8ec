"""Number of training steps that the rest of a time budget has room for, from one step and one look
that are timed on the spot.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.recipe.training import Training

MARGIN = 1.25  # of a step, for the optimizer and for what is done once in a stage


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step (all blocks, one batch, forward and backward), and of a look."""

    step: float
    look: float

    def affordable_steps(self, section: Training, seconds: float, windows: int) -> int:
        """Count the steps that fit, at most those of the section; 0 if there is no time for a look.

        Args:
            windows: of the batch that was timed.
        """
        step = MARGIN * self.step * section.batch_size / windows + self.look / section.check
        fitting = min(section.steps, int(seconds / step))
        return fitting if fitting >= min(section.check, section.steps) else 0


def time_step(loss: Callable[[int], Tensor], look: Callable[[], float]) -> StepTimes:
    """Take two steps, whose gradients the caller discards, and a look; the second step counts."""
    for _ in range(2):
        start = _synchronised_time()
        with torch.enable_grad():
            loss(0).backward()
        step = _synchronised_time() - start
    start = _synchronised_time()
    look()
    return StepTimes(step, _synchronised_time() - start)


def _synchronised_time() -> float:
    """Read the monotonic time after device synchronisation (s)."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.monotonic()
