"""How the tests of faults run the command line, kill it, and look at what it said and left."""

import hashlib
import importlib
import signal
from pathlib import Path

from click.testing import Result
from typer.testing import CliRunner

from compressor.cli.app import app
from support.processes import dying, forked, wait

SMALL = {
    "calibration.windows": 12,
    "calibration.length": 32,
    "calibration.heldout": 4,
    "calibration.batch_size": 4,
    "evaluation.windows": 4,
    "evaluation.window": 32,
    "model.device": "cpu",
}


def run(*arguments: object) -> Result:
    """One command in this process. Anything but an exit code that escapes is a failed test."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.stderr
    return result


def refused(result: Result, code: int, *words: object) -> str:
    """The line that a failed command ends with, which holds these words; nothing is on stdout."""
    assert result.exit_code == code, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ") and result.stdout == ""
    for word in words:
        assert str(word) in last, last
    return last


def compress(
    model: object, output: Path, text: Path | str, *more: object, **settings: object
) -> list[object]:
    """Arguments that compress a tiny model with a recipe that needs one forward pass; settings:
    dots written as __.
    """
    changed = SMALL | {key.replace("__", "."): value for key, value in settings.items()}
    flags = [part for key, value in changed.items() for part in ("--set", f"{key}={value}")]
    return [
        "compress",
        model,
        output,
        "-c",
        "svd_llm",
        "--calibration",
        text,
        "--text",
        text,
        *flags,
        *more,
    ]


def calibrate(model: object, output: Path, text: Path | str, *more: object) -> list[object]:
    """Arguments that collect statistics of a tiny model for `compress` with the same recipe."""
    settings = {key: value for key, value in SMALL.items() if not key.startswith("evaluation.")}
    flags = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return ["calibrate", model, output, "-c", "svd_llm", "--calibration", text, *flags, *more]


def killed(arguments: list[object], where: str, call: int = 1) -> None:
    """Run a command in a process that is killed right before the n-th call of the function with
    this dotted name.
    """

    def action() -> None:
        owner, _, name = where.rpartition(".")
        module = importlib.import_module(owner)
        setattr(module, name, dying(getattr(module, name), call, "before"))
        run(*arguments)

    assert wait(forked(action)) == -signal.SIGKILL, f"{where} was not called {call} times"


def bytes_of(folder: Path, but: tuple[str, ...] = ("timings.json",)) -> dict[str, str]:
    """sha256 of every file below a folder, by name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in but)
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
