"""Progress of the long stages, on stderr: a bar with the time left on a terminal, one plain line per stage elsewhere.

A stage wraps what it iterates over: `for batch in progress(batches, "calibrate"): ...`. Stages may nest.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Hand on `items`, one by one, while showing how many of `total` (by default their number) have been taken."""

    def __call__(self, items: Iterable[T], title: str, total: int | None = None) -> Iterable[T]: ...


def silent(items: Iterable[T], title: str, total: int | None = None) -> Iterable[T]:
    """Show nothing: the progress of library calls and of `--quiet`."""
    return items


@contextmanager
def shown(quiet: bool = False) -> Iterator[Progress]:
    """Provide the progress display that suits stderr and end it cleanly when the block is left, by an error too."""
    if quiet:
        yield silent
    elif sys.stderr.isatty():
        with _bars() as bars:
            yield lambda items, title, total=None: bars.track(items, total=total, description=title)
    else:
        yield _Lines()


class _Lines:
    """One line when a stage begins: seconds since the start, title, number of steps."""

    def __init__(self):
        self.start = time.monotonic()

    def __call__(self, items: Iterable[T], title: str, total: int | None = None) -> Iterable[T]:
        if total is None and isinstance(items, Sized):
            total = len(items)
        count = "" if total is None else f" ({total})"
        print(f"{time.monotonic() - self.start:8.1f} s  {title}{count}", file=sys.stderr, flush=True)
        return items


def _bars():
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left")
    return Progress(*columns, console=Console(file=sys.stderr))
