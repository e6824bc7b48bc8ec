"""Runs that are stopped: with SIGKILL, where no handler and no `finally` runs, and with Ctrl-C."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest


def forked(function: Callable[[], object]) -> int:
    """Start a function in a process of its own; its number. Status 0 when it is done, 1 for an
    error.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    return child


def wait(child: int) -> int:
    """Exit status of a process; minus the number of the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dying(function: Callable, at: int, when: str) -> Callable:
    """The function, whose process is killed `before` or `after` call number `at`, from 1."""
    calls = []

    def run(*args, **kwargs):
        calls.append(None)
        if when == "before" and len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if when == "after" and len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return run


def killed_after(function: Callable[[], object], seconds: float) -> bool:
    """Start a function and kill its process after a time; whether it was still at work."""
    child = forked(function)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            assert os.waitstatus_to_exitcode(status) == 0
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    status = wait(child)
    assert status in (-signal.SIGKILL, 0)  # it may have ended in the last moment
    return status != 0


@contextmanager
def interrupted(owner: Any, name: str, at: int) -> Iterator[None]:
    """Ctrl-C in place of call number `at`, from 1, of a function of `owner`; what is inside the
    `with` must come to it, and ends there.
    """
    calls, function = count(1), getattr(owner, name)

    def run(*args, **kwargs):
        if next(calls) == at:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, run)
        yield


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file but the one that differs from run to run."""
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name != "timings.json"
    }
