"""What all verbs of the command line share: stdout kept for the result, errors in one line, exit
codes, records of the run.
"""

import inspect
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import typer

from compressor.cli.options import FLAGS, read_recipe, recipe_options
from compressor.errors import CompressorError, ConfigError
from compressor.runtime.launched import process_rank, world_size
from compressor.runtime.logs import recorded
from compressor.runtime.progress import shown

BROKEN = 3  # exit code of a quality gate that did not hold
SHARED = (
    "compress",
)  # verbs in which processes that were launched together take part; others are the main one's alone
PIPE_WIDTH = 140  # columns of a table that is not printed on a terminal


@dataclass(frozen=True)
class Outcome:
    """The result of a verb: for programs, for people, and why the verb failed all the same."""

    data: Mapping[str, Any]  # printed by --json
    shown: Any = None  # text, or anything that rich prints; None for tables of the data
    failure: str | None = None
    broken: Sequence[str] = ()  # limits that do not hold, a line each; the exit code is BROKEN
    record: type | None = None  # of `reporting.records`: units of the data


def verb(function: Callable[..., Outcome]) -> Callable[..., None]:
    """Turn a function into a verb: add the flags that all verbs have, print its outcome, map errors
    to exit codes.

    A parameter `recipe` stands for all options that make up a recipe, in that place; `progress` is
    handed over, not an option.
    """
    parameters = inspect.signature(function).parameters

    @wraps(function)
    def run(
        as_json: bool,
        verbose: bool,
        quiet: bool,
        log_file: Path | None,
        events: Path | None,
        **arguments: Any,
    ) -> None:
        results = sys.stdout
        if helps := process_rank() > 0:
            quiet, log_file, events = (
                True,
                None,
                None,
            )  # the main process shows and notes what happens
            if function.__name__ not in SHARED:
                print(
                    f"process {process_rank()} of {world_size()} ends: "
                    f"`{function.__name__}` is done by the main process",
                    file=sys.stderr,
                )
                return
        with (
            errors_in_one_line(verbose),
            recorded(function.__name__, verbose, quiet, log_file, events) as record,
        ):
            if verbose and quiet and not helps:
                raise ConfigError("--verbose and --quiet contradict each other; leave one out")
            if "recipe" in parameters:
                arguments["recipe"] = read_recipe(function.__name__, arguments)
            ended = (
                nullcontext() if helps else _terminable()
            )  # a process that waits for another hears no signal that Python handles
            with (
                ended,
                redirect_stdout(sys.stderr),
                _compiled_code_on_stderr(),
                shown(quiet, record.watchers) as progress,
            ):
                outcome = function(
                    **arguments, **({"progress": progress} if "progress" in parameters else {})
                )
            if helps:
                return
            _print(outcome, as_json, results)
            record.result(outcome.data)
            for line in outcome.broken:
                print(line, file=sys.stderr if as_json else results)
            if outcome.failure:
                raise CompressorError(outcome.failure)
            if outcome.broken:
                record.error("; ".join(outcome.broken), BROKEN)
        if outcome.broken:
            raise typer.Exit(BROKEN)

    options = [
        *_options(function.__name__, parameters),
        *(_option(name, hint, default) for name, (default, hint) in FLAGS.items()),
    ]
    run.__dict__["__signature__"] = inspect.Signature(options)  # both are what typer reads
    run.__annotations__ = {option.name: option.annotation for option in options}
    return run


@contextmanager
def _compiled_code_on_stderr() -> Iterator[None]:
    """Send what compiled libraries print (HiGHS does, whatever its settings) to stderr: they know
    file descriptor 1, not sys.stdout.
    """
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _options(verb: str, parameters: Mapping[str, inspect.Parameter]) -> Iterator[inspect.Parameter]:
    for name, parameter in parameters.items():
        if name == "recipe":
            for option, (_, hint) in recipe_options(verb).items():
                default = {"model": inspect.Parameter.empty, "overwrite": False}.get(option)
                yield _option(option, hint, default)
        elif name != "progress":
            yield parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)


def _option(name: str, hint: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _print(outcome: Outcome, as_json: bool, file: Any) -> None:
    if as_json:
        print(json.dumps(outcome.data, allow_nan=False), file=file)
        return
    from rich.console import Console

    from compressor.reporting.tables import render_result

    shown = outcome.shown
    if shown is None:
        shown = render_result(outcome.data, outcome.record)
    if isinstance(shown, str):
        print(shown.rstrip("\n"), file=file)
    else:
        Console(file=file, width=None if file.isatty() else PIPE_WIDTH).print(shown)


@contextmanager
def errors_in_one_line(verbose: bool) -> Iterator[None]:
    """Print an error meant for users without its traceback and end with its exit code; a full disk
    or memory is such an error too.
    """
    try:
        yield
    except Exception as error:
        if _out_of_memory(error):
            first = " ".join(str(error).splitlines()[:1])
            said = (
                f"out of memory: {first}; lower batch_size in the sections of the recipe, or "
                "calibration.memory"
            )
        elif isinstance(error, (CompressorError, OSError)):
            said = " ".join(str(error).split())
        else:
            raise
        if verbose:
            traceback.print_exc()
        print(f"error: {said}", file=sys.stderr)
        raise typer.Exit(error.exit_code if isinstance(error, CompressorError) else 1) from None


def _out_of_memory(error: Exception) -> bool:
    """Of a processor, which torch has no class for, or of an accelerator; torch is not imported for
    this.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(error, RuntimeError):
        return isinstance(error, MemoryError)
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into an ordinary way out, so that unfinished output is cleaned up; exit code
    143.
    """

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
