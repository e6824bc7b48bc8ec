"""Progress of the long stages, on stderr: a bar with rate and time left on a terminal, plain lines
elsewhere; and for whoever else watches.

A stage wraps what it iterates over: `for batch in progress(batches, "calibrate"): ...`. Stages may
nest.
"""

import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

T = TypeVar("T")
QUIET_SECONDS = (
    30.0  # a stage that takes longer says how far it is, where there is no bar to show it
)


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


@dataclass(eq=False)
class Stage:
    """A stage that has begun: how many of its items have been dealt with, and since when (seconds
    of a monotonic clock).
    """

    title: str
    total: int | None
    done: int = 0
    start: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    @property
    def count(self) -> str:
        return f"{self.done}" if self.total is None else f"{self.done} of {self.total}"

    @property
    def rate(self) -> str:
        """Items in a second, or seconds an item takes if that is more than one."""
        if not self.done or not (seconds := self.seconds):
            return ""
        fast = self.done / seconds
        return (
            f"{fast:,.0f}/s"
            if fast >= 100
            else f"{fast:.3g}/s"
            if fast >= 1
            else f"{1 / fast:.3g} s each"
        )


Event = Literal["start", "advance", "end"]
Watcher = Callable[
    [Event, Stage], None
]  # `end` comes once for every stage, with done < total where the run was stopped


class Stages:
    """The progress that tells watchers about every stage."""

    def __init__(self, watchers: Iterable[Watcher]):
        self.watchers = tuple(watchers)
        self.open: list[Stage] = []

    def __call__(self, items: Iterable[T], title: str, total: int | None = None) -> Iterable[T]:
        if total is None and isinstance(items, Sized):
            total = len(items)
        return self._watched(items, title, total)

    def _watched(self, items: Iterable[T], title: str, total: int | None) -> Iterator[T]:
        stage = Stage(title, total)
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
def shown(quiet: bool = False, watchers: Iterable[Watcher] = ()) -> Iterator[Progress]:
    """Provide the progress display that suits stderr, for these watchers too; it ends cleanly when
    the block is left, by an error too.
    """
    if quiet and not watchers:
        yield silent
        return
    with _display(quiet) as display:
        stages = Stages((*display, *watchers))
        try:
            yield stages
        finally:
            for stage in reversed(stages.open.copy()):
                stages.end(stage)


@contextmanager
def _display(quiet: bool) -> Iterator[tuple[Watcher, ...]]:
    if quiet:
        yield ()
    elif sys.stderr.isatty():
        with _bars() as bars:
            yield (_Bars(bars),)
    else:
        yield (_Lines(),)


class _Lines:
    """One line when a stage begins (seconds since the start, title, number of items), and one now
    and then if it takes long.
    """

    def __init__(self):
        self.start = self.last = time.monotonic()

    def __call__(self, event: Event, stage: Stage) -> None:
        if event == "start":
            self._print(stage.title if stage.total is None else f"{stage.title} ({stage.total})")
        elif event == "advance" and time.monotonic() - self.last >= QUIET_SECONDS:
            left = (
                ""
                if stage.total is None
                else f", {stage.seconds / stage.done * (stage.total - stage.done):.0f} s left"
            )
            self._print(f"{stage.title}: {stage.count}, {stage.rate}{left}")

    def _print(self, text: str) -> None:
        self.last = time.monotonic()
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
            self.tasks[stage] = self.bars.add_task(stage.title, total=stage.total, rate="")
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
