"""The time that a run may take, and work that is dropped where it would take more."""

import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from compressor.runtime.progress import Progress

T = TypeVar("T")
EIGHTH = 8  # of its items, after which a stage shows how long it will take


class OutOfTime(Exception):
    """Work was dropped because it would have taken longer than it may; whoever gave it that time
    goes on without.
    """


class Clock:
    """Seconds that are left of a budget, from construction on, less what is kept back; without a
    budget they never end.
    """

    def __init__(self, seconds: float | None = None):
        self._end = float("inf") if seconds is None else time.monotonic() + seconds

    def hold(self, seconds: float) -> None:
        """Keep time back for what is sure to come last."""
        self._end -= seconds

    @property
    def limited(self) -> bool:
        return self._end < float("inf")

    @property
    def left(self) -> float:
        return max(0.0, self._end - time.monotonic())


NO_LIMIT = Clock()


def paced(progress: Progress, seconds: float) -> Progress:
    """The same progress, whose stages raise OutOfTime between two items once it shows that they
    would end later than in `seconds`.
    """
    end = time.monotonic() + seconds

    def limited(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
        start, total = time.monotonic(), total or (len(items) if isinstance(items, Sized) else None)
        for done, item in enumerate(progress(items, title, total)):
            now = time.monotonic()
            known = total is not None and done * EIGHTH >= total
            if (start + (now - start) * total / done if known and done else now) > end:
                raise OutOfTime(title)
            yield item

    return limited
