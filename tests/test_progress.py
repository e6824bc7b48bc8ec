import io
import sys

import pytest

from compressor.progress import shown, silent


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
