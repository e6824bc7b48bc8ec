"""Progress of the long stages, on stderr: a bar with rate and time left on a terminal, plain lines
elsewhere; and for whoever else watches.

A stage wraps what it iterates over: `for batch in progress(batches, "calibrate"): ...`. Stages may
nest.
"""

import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

T = TypeVar("T")
QUIET_SECONDS = 30.0  # after which a stage says how far it is, where no bar shows it


class Progress(Protocol):
    """Hand on `items`, one by one, while showing how many of `total` (by default their number) have
    been taken.
    """

    def __call__(self, items: Iterable[T], title: str, total: int | None = None) -> Iterable[T]: ...


def silent(items: Iterable[T], title: str, total: int | None = None) -> Iterable[T]:
    """Show nothing: the progress of library calls and of `--quiet`."""
    return items


Steps = Callable[[Collection[T], str], Iterable[T]]  # (items, title) of a stage → its items


def list_silently(items: Collection[T], title: str) -> Iterable[T]:
    """Hand on the items of a stage, without more."""
    return items


Clock = Callable[[], float]


@dataclass(eq=False)
class Stage:
    """A stage that has begun: how many of its items have been dealt with, and since when (seconds
    of a monotonic clock).
    """

    title: str
    total: int | None
    done: int = 0
    clock: Clock = time.monotonic
    start: float = 0.0
    expected: float | None = None  # seconds that the stage takes, about; None where not forecast
    ahead: float = 0.0  # seconds that the stages behind it take

    @property
    def seconds(self) -> float:
        return self.clock() - self.start

    @property
    def count(self) -> str:
        return f"{self.done}" if self.total is None else f"{self.done} of {self.total}"

    @property
    def rate(self) -> str:
        """Items in a second, or seconds an item takes if that is more than one."""
        if not self.done or not (seconds := self.seconds):
            return ""
        fast = self.done / seconds
        if fast >= 100:
            return f"{fast:,.0f}/s"
        return f"{fast:.3g}/s" if fast >= 1 else f"{1 / fast:.3g} s each"

    @property
    def heading(self) -> str:
        """The title, with what is left of the run where that is forecast."""
        if self.expected is None:
            return self.title
        return f"{self.title}, about {rounded(self.expected + self.ahead)} left"

    @property
    def remaining(self) -> float | None:
        """Seconds that the rest of the items takes at the rate so far; None if that is unknown."""
        if not self.done or self.total is None:
            return None
        return self.seconds / self.done * (self.total - self.done)


Event = Literal["start", "advance", "end"]
# `end` comes once for every stage, with done < total where the run was stopped
Watcher = Callable[[Event, Stage], None]


class Stages:
    """The progress that tells watchers about every stage.

    Args:
        watchers: called with every event.
        say: prints one line for people.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        watchers: Iterable[Watcher],
        say: Callable[[str], None] = lambda text: None,
        clock: Clock = time.monotonic,
    ):
        self.watchers, self.say, self.clock = tuple(watchers), say, clock
        self.open: list[Stage] = []
        self.expected: dict[str, float] = {}

    def __call__(self, items: Iterable[T], title: str, total: int | None = None) -> Iterable[T]:
        if total is None and isinstance(items, Sized):
            total = len(items)
        return self._watched(items, title, total)

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Say how long the stages of a run take, about, before the first of them."""
        self.expected = {stage.replace("_", " "): spent for stage, spent in seconds.items()}
        if self.expected:
            stages = (f"{title} {rounded(spent)}" for title, spent in self.expected.items())
            self.say(f"about {rounded(sum(self.expected.values()))}: {', '.join(stages)}")

    def _watched(self, items: Iterable[T], title: str, total: int | None) -> Iterator[T]:
        titles = list(self.expected)
        behind = titles[titles.index(title) + 1 :] if title in titles else []
        ahead = sum(self.expected[later] for later in behind)
        expected = self.expected.get(title)
        stage = Stage(title, total, 0, self.clock, self.clock(), expected, ahead)
        self.open.append(stage)
        self._tell("start", stage)
        try:
            for item in items:
                yield item
                stage.done += 1
                self._tell("advance", stage)
        finally:
            self.end(stage)

    def end(self, stage: Stage) -> None:
        """End a stage, unless it has ended: one that an error stops is ended with the run, its
        iterator some time later.
        """
        if stage in self.open:
            self.open.remove(stage)
            self._tell("end", stage)

    def _tell(self, event: Event, stage: Stage) -> None:
        for watcher in self.watchers:
            watcher(event, stage)


def expect(progress: Progress, estimate: Callable[[], Mapping[str, float]]) -> None:
    """Say how long a run takes, about, where anybody is shown its progress.

    Args:
        progress: as a verb is given it.
        estimate: stage → seconds, in order; called only if it is shown.
    """
    if isinstance(progress, Stages):
        progress.expect(estimate())


def rounded(seconds: float) -> str:
    """Write a duration in the unit that suits it.

    >>> rounded(85.6), rounded(230), rounded(9000)
    ('86 s', '4 min', '2.5 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def counted(progress: Progress, total: int, title: str) -> Iterator[Callable[[int], None]]:
    """A stage that is told how many more items have been dealt with, for loops of other packages;
    done when the block is left.
    """
    items = iter(progress(range(total), title))
    next(items, None)

    def advance(count: int) -> None:
        for _ in range(count):
            next(items, None)

    yield advance
    for _ in items:  # those that were left out
        pass


@contextmanager
def shown(
    quiet: bool = False, watchers: Iterable[Watcher] = (), clock: Clock = time.monotonic
) -> Iterator[Progress]:
    """Provide the progress display that suits stderr, for these watchers too; it ends cleanly when
    the block is left, by an error too.
    """
    if quiet and not watchers:
        yield silent
        return
    with _display(quiet, clock) as (display, say):
        stages = Stages((*display, *watchers), say, clock)
        try:
            yield stages
        finally:
            for stage in reversed(stages.open.copy()):
                stages.end(stage)


@contextmanager
def _display(
    quiet: bool, clock: Clock
) -> Iterator[tuple[tuple[Watcher, ...], Callable[[str], None]]]:
    """Provide who shows stages to people, and a function that prints them a line."""
    if quiet:
        yield (), lambda text: None
    elif sys.stderr.isatty():
        with _bars() as bars:
            yield (_Bars(bars),), partial(bars.console.print, highlight=False)
    else:
        lines = _Lines(clock)
        yield (lines,), lines.say


class _Lines:
    """One line when a stage begins (seconds since the start, title, number of items), and one now
    and then if it takes long.
    """

    def __init__(self, clock: Clock = time.monotonic):
        self.clock = clock
        self.start = self.last = clock()

    def __call__(self, event: Event, stage: Stage) -> None:
        if event == "start":
            count = "" if stage.total is None else f" ({stage.total})"
            self.say(f"{stage.title}{count}{stage.heading.removeprefix(stage.title)}")
        elif event == "advance" and self.clock() - self.last >= QUIET_SECONDS:
            left = ""
            if stage.remaining is not None:
                left = f", {stage.remaining:.0f} s left"
                if stage.expected is not None:
                    left += f" and about {rounded(stage.remaining + stage.ahead)} of the run"
            self.say(f"{stage.title}: {stage.count}, {stage.rate}{left}")

    def say(self, text: str) -> None:
        """Print a line behind the seconds since the start."""
        self.last = self.clock()
        print(f"{self.last - self.start:8.1f} s  {text}", file=sys.stderr, flush=True)


class _Bars:
    """One bar for each stage; the next one of the same title takes its place, so that long runs do
    not fill the screen.
    """

    def __init__(self, bars: Any):
        self.bars = bars
        self.tasks: dict[Stage, Any] = {}
        self.ended: dict[str, Any] = {}

    def __call__(self, event: Event, stage: Stage) -> None:
        if event == "start":
            if stage.title in self.ended:
                self.bars.remove_task(self.ended.pop(stage.title))
            self.tasks[stage] = self.bars.add_task(stage.heading, total=stage.total, rate="")
        elif event == "advance":
            self.bars.update(self.tasks[stage], completed=stage.done, rate=stage.rate)
        else:
            self.ended[stage.title] = self.tasks.pop(stage)
            self.bars.stop_task(self.ended[stage.title])


def _bars() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    figures = (
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    return Progress(
        TextColumn("{task.description}"), BarColumn(), *figures, console=Console(file=sys.stderr)
    )
