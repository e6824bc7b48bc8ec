import json
import logging
import os
import signal
import subprocess
import sys

import pytest
import torch
import typer
from rich.table import Table
from typer.testing import CliRunner

from compressor.cli.command import Outcome, verb
from compressor.errors import BudgetError, CompressorError, ConfigError, DataError


def run(function, *arguments: str):
    """Run one function as the only verb of a command line."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(verb(function))
    return CliRunner().invoke(app, list(arguments))


def chatty() -> Outcome:
    print("chatter of a library")
    sys.stderr.write("a warning\n")
    return Outcome({"size": 1.5, "names": ["a", "b"]})


def test_json_is_one_object_and_alone_on_stdout():
    result = run(chatty, "--json")
    assert json.loads(result.stdout) == {"size": 1.5, "names": ["a", "b"]}
    assert result.stdout.count("\n") == 1
    assert "chatter of a library" in result.stderr
    assert result.exit_code == 0


def test_chatter_stays_off_stdout_without_json_too():
    result = run(chatty)
    assert "chatter" not in result.stdout
    assert "size" in result.stdout
    assert "1.5" in result.stdout


def test_text_and_tables_are_shown_as_they_are():
    assert run(lambda: Outcome({}, "[bold]50 %[/bold]\n")).stdout == "[bold]50 %[/bold]\n"
    table = Table()
    table.add_column("wide")
    table.add_row("x" * 120)
    assert "x" * 120 in run(lambda: Outcome({}, table)).stdout


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CompressorError("what,\n where"), 1),
        (DataError("x"), 1),
        (ConfigError("x"), 2),
        (BudgetError("x"), 2),
        (OSError(28, "No space left on device", "shard"), 1),
    ],
)
def test_errors_for_users_are_one_line_on_stderr_with_their_exit_code(error, code):
    def fail() -> Outcome:
        raise error

    result = run(fail)
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr == f"error: {' '.join(str(error).split())}\n"


def test_verbose_shows_the_traceback():
    def fail() -> Outcome:
        raise CompressorError("what")

    result = run(fail, "-v")
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("error: what\n")


@pytest.mark.parametrize("name", ["host", "processor", "accelerator"])
def test_memory_that_runs_out_is_one_line_with_a_cure(name):
    def fill() -> Outcome:
        match name:
            case "host":
                raise MemoryError("cannot allocate")
            case "processor":
                torch.empty(2**60)
            case "accelerator":
                raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    result = run(fill)
    assert (
        result.exit_code == 1
        and "batch_size" in result.stderr
        and result.stderr.startswith("error: out of memory: ")
    )
    assert result.stderr.count("\n") == 1


def test_a_bug_is_not_dressed_up():
    def fail() -> Outcome:
        raise ZeroDivisionError

    assert isinstance(run(fail).exception, ZeroDivisionError)


def test_failure_is_reported_after_the_result():
    result = run(lambda: Outcome({"kept": 0.5}, failure="the evaluation failed"), "--json")
    assert json.loads(result.stdout) == {"kept": 0.5}
    assert result.stderr == "error: the evaluation failed\n"
    assert result.exit_code == 1


def test_numbers_that_json_does_not_know_are_a_bug():
    assert isinstance(
        run(lambda: Outcome({"perplexity": float("nan")}), "--json").exception, ValueError
    )


def test_interrupt_ends_with_130():
    def stop() -> Outcome:
        raise KeyboardInterrupt

    assert run(stop).exit_code == 130


def test_termination_leaves_the_ordinary_way_and_ends_with_143():
    cleaned = []

    def stop() -> Outcome:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            cleaned.append(True)

    before = signal.getsignal(signal.SIGTERM)
    assert run(stop).exit_code == 143
    assert cleaned == [True]
    assert signal.getsignal(signal.SIGTERM) is before


def test_progress_is_handed_over_and_quiet_silences_it():
    def work(*, progress) -> Outcome:
        return Outcome({"sum": sum(progress([1, 2], "adding"))})

    loud, quiet = run(work, "--json"), run(work, "--json", "--quiet")
    assert json.loads(loud.stdout) == json.loads(quiet.stdout) == {"sum": 3}
    assert "adding (2)" in loud.stderr
    assert quiet.stderr == ""


def test_verbose_and_quiet_together_are_refused():
    result = run(chatty, "--verbose", "--quiet")
    assert result.exit_code == 2
    assert result.stderr.endswith(
        "error: --verbose and --quiet contradict each other; leave one out\n"
    )


@pytest.mark.parametrize(
    ("flags", "seen"), [((), ["warned"]), (("-v",), ["told", "warned"]), (("-q",), [])]
)
def test_verbosity_selects_what_the_package_logs(flags, seen):
    def work() -> Outcome:
        logging.getLogger("compressor.test").info("told")
        logging.getLogger("compressor.test").warning("warned")
        return Outcome({}, "done")

    stderr = run(work, *flags).stderr
    assert [word for word in ("told", "warned") if word in stderr] == seen


def test_what_compiled_code_prints_goes_to_stderr():
    """HiGHS writes to file descriptor 1 behind Python's back."""
    script = (
        "import os\nfrom compressor.cli.app import app\nfrom compressor.pipeline import run\n"
        "run.verify = lambda checkpoint, progress: os.write(1, b'chatter\\n') and "
        "[]\napp(['verify', 'x', '--json'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "chatter" in done.stderr and "chatter" not in done.stdout
    json.loads(done.stdout)
