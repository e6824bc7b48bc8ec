"""The time by which work has to end, and work that is dropped where it would take longer."""

import time
from collections.abc import Callable

EIGHTH = 8  # of its items, after which a stage shows how long it will take


class OutOfTime(Exception):
    """Work was dropped because it would have taken longer than it may.

    Whoever gave it that time goes on without.
    """


class Deadline:
    """The moment by which work has to end; without seconds it never comes."""

    def __init__(self, seconds: float | None = None, now: Callable[[], float] = time.monotonic):
        """Let time run from construction on, as `now` tells it in seconds."""
        self.now = now
        self.end = float("inf") if seconds is None else now() + seconds

    def hold(self, seconds: float) -> None:
        """Keep time back for what is sure to come last."""
        self.end -= seconds

    @property
    def is_limited(self) -> bool:
        return self.end < float("inf")

    @property
    def left(self) -> float:
        """Seconds until the deadline, 0 behind it."""
        return max(0.0, self.end - self.now())

    def check(self, projected_end: float) -> None:
        """Raise OutOfTime if work that ends at that moment ends too late."""
        if projected_end > self.end:
            raise OutOfTime

    def within(self, seconds: float | None) -> "Deadline":
        """Return a deadline of its own for work that may take so long, on the same clock."""
        return Deadline(seconds, self.now)

    def project(self, total: int) -> "Projection":
        """Begin a stage of `total` items, which is checked between two of them."""
        return Projection(self, total)


class Projection:
    """When a stage will end at the pace of the items that it has behind it."""

    def __init__(self, deadline: Deadline, total: int):
        self.deadline, self.total, self.done = deadline, total, 0
        self.start = deadline.now()

    def check(self) -> None:
        """Begin the next item. Raises OutOfTime if the stage would end behind the deadline."""
        projected_end = now = self.deadline.now()
        if self.done and self.done * EIGHTH >= self.total:
            projected_end = self.start + (now - self.start) * self.total / self.done
        self.deadline.check(projected_end)
        self.done += 1


NO_DEADLINE = Deadline()
