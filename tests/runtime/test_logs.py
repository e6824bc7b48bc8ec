"""What --log-file and --events write down, and that nothing else of the process is changed by
them.
"""

import json
import logging
import os
import re
import stat
import warnings
from datetime import datetime
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from compressor.cli.command import Outcome, verb
from compressor.errors import CheckpointError, ConfigError
from compressor.runtime import logs
from compressor.runtime.progress import Progress


def run(function, *arguments: object):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(verb(function))
    return CliRunner().invoke(app, list(map(str, arguments)))


def events(path: Path) -> list[dict]:
    """Lines of strict JSON, without their times, which must be times."""

    def refuse(token):
        raise ValueError(token)

    found = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    for event in found:
        assert datetime.fromisoformat(event.pop("time")).utcoffset().total_seconds() == 0
    return found


def work(*, progress: Progress) -> Outcome:
    for _ in progress([1, 2], "calibrate"):
        pass
    logging.getLogger("compressor.calibrate.windows").warning("short\n text")
    logging.getLogger("compressor.calibrate.windows").info("a detail")
    warnings.warn("from a library", stacklevel=1)
    logging.getLogger("transformers").warning("kept apart")
    return Outcome({"size": 1.5})


def fail(*, progress: Progress) -> Outcome:
    for _ in progress([1, 2], "calibrate"):
        raise CheckpointError("what,\n where")


@pytest.fixture
def apart(monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", False)


def test_events_tell_a_run_from_start_to_result(tmp_path, apart):
    path = tmp_path / "events.jsonl"
    result = run(work, "--events", path, "--json")
    assert json.loads(result.stdout) == {"size": 1.5}
    first, *middle, last = events(path)
    assert first == {"verb": "work", "event": "start", "stage": "calibrate", "done": 0, "total": 2}
    assert {"verb": "work", "event": "end", "stage": "calibrate", "done": 2, "total": 2} in middle
    said = [event["message"] for event in middle if event["event"] == "warning"]
    assert (
        said[0] == "short text"
        and "UserWarning: from a library" in said[1]
        and said[2:] == ["kept apart"]
    )
    assert last == {"verb": "work", "event": "result", "result": {"size": 1.5}}


def test_events_are_appended_and_tell_of_failures(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"time": "2026-01-01T00:00:00Z", "event": "result"}\n')
    assert run(fail, "--events", path, "--quiet").exit_code == 1
    *_, end, error = events(path)
    assert end == {"verb": "fail", "event": "end", "stage": "calibrate", "done": 0, "total": 2}
    assert error == {"verb": "fail", "event": "error", "message": "what, where", "exit_code": 1}
    assert len(events(path)) == 4


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (KeyboardInterrupt(), "interrupted", 130),
        (SystemExit(143), "terminated", 143),
        (ZeroDivisionError("no"), "ZeroDivisionError: no", 1),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device", 1),
        (ConfigError("x"), "x", 2),
    ],
)
def test_whatever_ends_a_run_is_written_down(error, message, code, tmp_path):
    def stop() -> Outcome:
        raise error

    result = run(stop, "--events", tmp_path / "events", "--log-file", tmp_path / "log")
    assert events(tmp_path / "events")[-1] == {
        "verb": "stop",
        "event": "error",
        "message": message,
        "exit_code": code,
    }
    text = (tmp_path / "log").read_text()
    assert f"ERROR compressor.runtime.logs: {message} (exit code {code})" in text
    assert ("Traceback" in text) == isinstance(error, ZeroDivisionError)
    assert "compressor.runtime.logs" not in result.stderr


def test_broken_limits_are_a_result_and_an_error(tmp_path):
    result = run(lambda: Outcome({"a": 1}, broken=["kl is 2"]), "--events", tmp_path / "events")
    assert result.exit_code == 3
    assert [event["event"] for event in events(tmp_path / "events")] == ["result", "error"]
    assert events(tmp_path / "events")[1]["exit_code"] == 3


def test_advances_are_rationed(tmp_path, monkeypatch):
    def busy(*, progress: Progress) -> Outcome:
        list(progress(range(1000), "probe"))
        return Outcome({})

    run(busy, "--events", tmp_path / "few", "-q")
    assert len(events(tmp_path / "few")) <= 20  # on a busy machine; 3 elsewhere
    monkeypatch.setattr(logs, "EVERY", 0.0)
    run(busy, "--events", tmp_path / "all", "-q")
    assert len(events(tmp_path / "all")) == 1000 + 3


def test_log_file_holds_stages_messages_and_details(tmp_path, apart):
    path = tmp_path / "run.log"
    path.write_text("before\n")
    result = run(work, "--log-file", path, "--quiet")
    assert result.stderr == ""
    lines = path.read_text().splitlines()
    assert lines[0] == "before"
    for text in (
        r"INFO compressor.runtime.logs: stage calibrate begins \(2\)",
        r"INFO compressor.runtime.logs: stage calibrate ends: 2 of 2 in \d+.\d s",
        "WARNING compressor.calibrate.windows: short",
        "INFO compressor.calibrate.windows: a detail",
        "WARNING transformers: kept apart",
    ):
        assert any(re.search(f" {text}$", line) for line in lines), text


def test_messages_on_stderr_follow_the_flags():
    assert "WARNING: short text\n" in run(work).stderr
    assert "a detail" not in run(work).stderr
    assert "INFO: a detail\n" in run(work, "-v").stderr
    assert run(work, "-q").stderr == ""


def test_loggers_and_warnings_are_as_before(tmp_path):
    def state():
        loggers = [logging.getLogger(name) for name in (None, "compressor", "transformers")]
        return [(list(logger.handlers), logger.level) for logger in loggers], warnings.showwarning

    before = state()
    run(work, "--events", tmp_path / "events", "--log-file", tmp_path / "log", "-v")
    run(fail, "--events", tmp_path / "events", "--log-file", tmp_path / "log")
    assert state() == before


def test_files_that_cannot_be_written_are_refused_in_one_line_before_any_work(tmp_path):
    def never() -> Outcome:
        raise AssertionError

    for flag in ("--events", "--log-file"):
        for path in (tmp_path, tmp_path / "none" / "file"):
            result = run(never, flag, path)
            assert result.exit_code == 2
            assert result.stderr.startswith(f"error: {path}: ") and result.stderr.count("\n") == 1
    result = run(never, "--events", tmp_path / "a", "--log-file", tmp_path / "x" / ".." / "a")
    assert result.exit_code == 2 and "two files" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--events", "--log-file"])
def test_a_disk_that_fills_up_ends_the_run_naming_the_file(flag, tmp_path, monkeypatch):
    def full(descriptor, data, write=os.write):
        if b"calibrate" in data:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    result = run(work, flag, tmp_path / "file")
    assert result.exit_code == 1
    assert (
        result.stderr.splitlines()[-1]
        == f"error: {tmp_path / 'file'}: could not be written (No space left on device)"
    )


def test_new_files_have_ordinary_permissions(tmp_path):
    before = os.umask(0o022)
    try:
        run(work, "--events", tmp_path / "events")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "events").stat().st_mode) == 0o644
