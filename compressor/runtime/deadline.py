"""The time that a run may take, and work that is dropped where it would take more."""

import re
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Annotated, TypeVar

from pydantic import BeforeValidator

from compressor.runtime.progress import Progress

T = TypeVar("T")
_UNITS = {"s": 1, "m": 60, "h": 3600}
EIGHTH = 8  # of its items, after which a stage shows how long it will take


def seconds_of(duration: str) -> float:
    """Turn `90s`, `10m` or `1.5h` into seconds. Raises ValueError."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([smh])", str(duration).strip())
    if match is None or not (seconds := float(match[1]) * _UNITS[match[2]]):
        raise ValueError(f"must be a time with its unit (s, m, h) such as 10m, not {duration!r}")
    return seconds


def _duration(value: str) -> str:
    seconds_of(value)
    return value


Duration = Annotated[str, BeforeValidator(_duration)]


class OutOfTime(Exception):
    """Work was dropped because it would have taken longer than it may; whoever gave it that time goes on without."""


class Clock:
    """Seconds that are left of a budget, from construction on, less what is kept back; without a budget they never end."""

    def __init__(self, budget: str | None = None):
        self._end = float("inf") if budget is None else time.monotonic() + seconds_of(budget)

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
    """The same progress, whose stages raise OutOfTime between two items once it shows that they would end later than in `seconds`."""
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
