import doctest
import io
import re
import sys

import pytest

from compressor.runtime import progress as module
from compressor.runtime.progress import counted, shown, silent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def stderr(monkeypatch):
    """Put another stderr in place and return it."""

    def use(stream):
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return use


def test_silent_hands_on_the_very_items():
    items = [1, 2]
    assert silent(items, "stage") is items


def test_quiet_writes_nothing(stderr):
    stream = stderr(io.StringIO())
    with shown(quiet=True) as progress:
        assert list(progress([1, 2], "stage")) == [1, 2]
    assert stream.getvalue() == ""


def test_elsewhere_one_plain_line_for_each_stage(stderr):
    stream = stderr(io.StringIO())
    with shown() as progress:
        assert list(progress([1, 2, 3], "calibrate")) == [1, 2, 3]
        assert list(progress(iter([4]), "probe", total=1)) == [4]
        assert list(progress(iter([5]), "read")) == [5]
    first, second, third = stream.getvalue().splitlines()
    assert first.endswith(" s  calibrate (3)")
    assert second.endswith(" s  probe (1)")
    assert third.endswith(" s  read")


def test_terminal_shows_nested_stages_and_the_time_left(stderr):
    stream = stderr(Terminal())
    with shown() as progress:
        for _ in progress([1, 2], "outer"):
            assert list(progress([1, 2, 3], "inner")) == [1, 2, 3]
    text = stream.getvalue()
    assert "outer" in text
    assert "inner" in text
    assert "2/2" in text
    assert "left" in text


def test_a_stage_takes_the_bar_of_the_one_before_with_its_title():
    class Bars:
        def __init__(self):
            self.shown = {}

        def add_task(self, title, **_):
            self.shown[len(self.shown)] = title
            return len(self.shown) - 1

        def remove_task(self, task):
            self.shown[task] = None

        def update(self, *_, **__):
            pass

        stop_task = update

    bars = Bars()
    stages = module.Stages([module._Bars(bars)])
    for _ in stages("ab", "build"):
        for _ in stages("c", "evaluate"):
            pass
    list(stages("d", "build"))
    assert [title for title in bars.shown.values() if title] == ["evaluate", "build"]


def test_error_inside_a_stage_ends_the_display(stderr):
    stream = stderr(Terminal())

    def stop():
        with shown() as progress:
            for _ in progress([1, 2], "stage"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert stream.getvalue().rstrip().endswith("\x1b[?25h")  # the cursor is shown again


def test_stdout_is_left_alone(stderr, capsys):
    stderr(Terminal())
    with shown() as progress:
        list(progress([1], "stage"))
    assert capsys.readouterr().out == ""


def watched(items, title, total=None, stop_after=None):
    """What a watcher is told about one stage: (event, done, total)."""
    told = []
    with shown(
        quiet=True, watchers=[lambda event, stage: told.append((event, stage.done, stage.total))]
    ) as progress:
        for number, _ in enumerate(progress(items, title, total)):
            if number == stop_after:
                break
    return told


def test_watchers_hear_start_every_item_and_end_in_quiet_too(stderr):
    stream = stderr(io.StringIO())
    assert watched("ab", "stage") == [
        ("start", 0, 2),
        ("advance", 1, 2),
        ("advance", 2, 2),
        ("end", 2, 2),
    ]
    assert watched(iter("a"), "stage") == [
        ("start", 0, None),
        ("advance", 1, None),
        ("end", 1, None),
    ]
    assert watched("abc", "stage", stop_after=1) == [
        ("start", 0, 3),
        ("advance", 1, 3),
        ("end", 1, 3),
    ]
    assert stream.getvalue() == ""


def test_stages_that_an_error_stops_end_once_innermost_first():
    told = []

    def stop():
        with shown(
            quiet=True,
            watchers=[lambda event, stage: told.append((event, stage.title, stage.done))],
        ) as progress:
            for _ in progress("ab", "outer"):
                for _ in progress("cd", "inner"):
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert told == [
        ("start", "outer", 0),
        ("start", "inner", 0),
        ("end", "inner", 0),
        ("end", "outer", 0),
    ]


def test_a_long_stage_says_now_and_then_how_far_it_is(stderr, monkeypatch):
    monkeypatch.setattr(module, "QUIET_SECONDS", 0.0)
    stream = stderr(io.StringIO())
    with shown() as progress:
        list(progress([1, 2], "calibrate"))
    assert re.search(r" s  calibrate: 1 of 2, [0-9.,]+/s, 0 s left\n", stream.getvalue())


def test_terminal_shows_the_rate(stderr):
    stream = stderr(Terminal())
    with shown() as progress:
        list(progress([1, 2], "stage"))
    assert re.search(r"[0-9]/s", stream.getvalue())


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_rates_are_items_in_a_second_or_seconds_an_item():
    clock = Clock()
    stage = module.Stage("stage", 8, done=4, clock=clock)
    clock.now = 2.0
    assert stage.rate == "2/s"
    clock.now = 12.0
    assert stage.rate == "3 s each"
    stage.done = 123_456
    assert stage.rate == "10,288/s"
    stage.done = 0
    assert stage.rate == ""


def test_durations_are_told_in_the_unit_that_suits_them():
    assert doctest.testmod(module) == (0, 1)


FORECAST = {"calibrate": 60.0, "solve_in_order": 100.0, "evaluate": 80.0}


def test_the_first_line_says_how_long_a_run_takes_and_stages_what_is_left(stderr):
    stream, clock = stderr(io.StringIO()), Clock()
    with shown(clock=clock) as progress:
        clock.now = 1.0
        module.expect(progress, lambda: FORECAST)
        for _ in progress([1, 2], "calibrate"):
            clock.now += 40.0
        list(progress([1], "build"))
        list(progress([1], "evaluate"))
    assert stream.getvalue().splitlines() == [
        "     1.0 s  about 4 min: calibrate 60 s, solve in order 100 s, evaluate 80 s",
        "     1.0 s  calibrate (2), about 4 min left",
        "    41.0 s  calibrate: 1 of 2, 40 s each, 40 s left and about 4 min of the run",
        "    81.0 s  calibrate: 2 of 2, 40 s each, 0 s left and about 3 min of the run",
        "    81.0 s  build (1)",
        "    81.0 s  evaluate (1), about 80 s left",
    ]


def test_a_terminal_shows_the_forecast_above_the_bars(stderr):
    stream = stderr(Terminal())
    with shown() as progress:
        module.expect(progress, lambda: FORECAST)
        list(progress([1, 2], "calibrate"))
    text = stream.getvalue()
    assert "about 4 min: calibrate 60 s" in text
    assert "calibrate, about 4 min left" in text


def test_nothing_is_estimated_where_nobody_is_shown_it():
    module.expect(silent, lambda: pytest.fail("estimated"))


def test_counted_stages_are_told_and_finish_with_the_block():
    told = []
    with (
        shown(
            quiet=True, watchers=[lambda event, stage: told.append((event, stage.done))]
        ) as progress,
        counted(progress, 3, "lm-eval") as advance,
    ):
        assert told == [("start", 0)]
        advance(2)
        assert told[-1] == ("advance", 2)
    assert told[-2:] == [("advance", 3), ("end", 3)]
    with counted(silent, 3, "lm-eval") as advance:
        advance(5)
