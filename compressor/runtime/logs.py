"""What is written down about a run beside its results: messages on stderr, `--log-file` for people,
`--events` for machines.

An events file holds one JSON object for each line; docs/reference/events.md lists the keys. Both
files are appended to, a line at a time, so that whoever follows them is up to date and a run that
is killed has lost nothing.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compressor.errors import CheckpointError, CompressorError, ConfigError
from compressor.runtime.progress import Event, Stage, Watcher

EVERY = 0.2  # seconds between two `advance` events of one stage, at least
STOPPED = {KeyboardInterrupt: ("interrupted", 130), SystemExit: ("terminated", 143)}
APART = "transformers"  # a library whose messages do not reach the root logger
log = logging.getLogger(__name__)


class Appended:
    """A file that whole lines are appended to. Raises ConfigError at once if that is impossible,
    CheckpointError when it becomes so.
    """

    def __init__(self, path: Path):
        self.path = path
        if path.is_dir():
            raise ConfigError(f"{path}: is a folder; give a file to append to")
        try:
            self.descriptor: int | None = os.open(
                path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666
            )
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be written ({error.strerror}); choose another file"
            ) from None

    def write(self, line: str) -> None:
        """Append a line. After the first failure, which ends the run, nothing more is written."""
        left = f"{line}\n".encode(errors="backslashreplace")
        while left and self.descriptor is not None:
            try:
                left = left[os.write(self.descriptor, left) :]
            except OSError as error:
                self.close()
                raise CheckpointError(
                    f"{self.path}: could not be written ({error.strerror})"
                ) from None

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
        self.descriptor = None


class Events:
    """Writes what happens as JSON objects, `advance` of a stage not more often than every EVERY
    seconds.
    """

    def __init__(self, file: Appended, verb: str):
        self.file, self.verb = file, verb
        self.last: dict[Stage, float] = {}

    def write(self, event: str, **entries: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self.file.write(
            json.dumps({"time": now, "verb": self.verb, "event": event, **entries}, allow_nan=False)
        )

    def watch(self, event: Event, stage: Stage) -> None:
        now = time.monotonic()
        if event == "advance" and now - self.last[stage] < EVERY:
            return
        self.last[stage] = now
        if event == "end":
            del self.last[stage]
        self.write(event, stage=stage.title, done=stage.done, total=stage.total)


class Record:
    """The files that one run of a verb is written down in, if any, and who watches its stages for
    them.
    """

    def __init__(self, events: Events | None, watchers: Sequence[Watcher]):
        self.events, self.watchers = events, watchers

    def result(self, data: Mapping[str, Any]) -> None:
        if self.events:
            self.events.write("result", result=data)

    def error(self, message: str, exit_code: int) -> None:
        log.error("%s (exit code %d)", message, exit_code)
        if self.events:
            self.events.write("error", message=message, exit_code=exit_code)


class _Messages(logging.Handler):
    """Hands log records to a function. What that raises ends the run, unlike with the handlers of
    the standard library.
    """

    def __init__(self, level: int, write: Callable[[logging.LogRecord], None]):
        super().__init__(level)
        self.write = write

    def emit(self, record: logging.LogRecord) -> None:
        self.write(record)


@contextmanager
def recorded(
    verb: str, verbose: bool, quiet: bool, log_file: Path | None, events: Path | None
) -> Iterator[Record]:
    """Send messages where the flags of a verb say, and note how the block is left. Raises
    ConfigError for files that cannot be written.
    """
    if log_file and events and log_file.resolve() == events.resolve():
        raise ConfigError(f"{events}: cannot hold both the log and the events; give two files")
    with ExitStack() as stack:
        _listen(
            stack,
            _on_stderr(logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING),
        )
        written, watchers = None, []
        if log_file:
            _listen(stack, _in_file(_opened(stack, log_file)), APART)
            watchers.append(_note)
        if events:
            written = Events(_opened(stack, events), verb)
            _listen(stack, _in_events(written), APART)
            watchers.append(written.watch)
        ours, level = logging.getLogger("compressor"), logging.getLogger("compressor").level
        stack.callback(ours.setLevel, level)
        ours.setLevel(logging.INFO if verbose or log_file else logging.WARNING)
        stack.callback(logging.captureWarnings, False)
        logging.captureWarnings(True)
        record = Record(written, watchers)
        log.info("%s begins", verb)
        with _noting_errors(record):
            yield record
        log.info("%s is done", verb)


@contextmanager
def _noting_errors(record: Record) -> Iterator[None]:
    """Write down what the block is left by, bugs with their traceback."""
    try:
        yield
    except (CompressorError, OSError) as error:
        record.error(_one_line(str(error)), getattr(error, "exit_code", 1))
        raise
    except (KeyboardInterrupt, SystemExit) as stop:
        record.error(*STOPPED[type(stop)])
        raise
    except Exception as error:
        log.exception("a bug in this package")
        record.error(f"{type(error).__name__}: {_one_line(str(error))}", 1)
        raise


def _note(event: Event, stage: Stage) -> None:
    if event == "start":
        log.info(
            "stage %s begins%s", stage.title, "" if stage.total is None else f" ({stage.total})"
        )
    elif event == "end":
        log.info("stage %s ends: %s in %.1f s", stage.title, stage.count, stage.seconds)


def _opened(stack: ExitStack, path: Path) -> Appended:
    file = Appended(path)
    stack.callback(file.close)
    return file


def _listen(stack: ExitStack, handler: logging.Handler, *apart: str) -> None:
    """Hear the root logger, and those that keep to themselves, until the stack is left."""
    for logger in map(logging.getLogger, (None, *apart)):
        logger.addHandler(handler)
        stack.callback(logger.removeHandler, handler)


def _on_stderr(level: int) -> logging.Handler:
    """Messages on whatever stderr is at the time; what is written down about stages and the run
    itself is on the screen already.
    """
    handler = _Messages(
        level,
        lambda record: print(
            f"{record.levelname}: {_one_line(record.getMessage())}", file=sys.stderr
        ),
    )
    handler.addFilter(_not_ours)
    return handler


def _in_events(events: Events) -> logging.Handler:
    handler = _Messages(
        logging.WARNING,
        lambda record: events.write("warning", message=_one_line(record.getMessage())),
    )
    handler.addFilter(_not_ours)  # which are events of their own
    return handler


def _in_file(file: Appended) -> logging.Handler:
    handler = _Messages(logging.NOTSET, lambda record: file.write(handler.format(record)))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return handler


def _not_ours(record: logging.LogRecord) -> bool:
    return record.name != __name__


def _one_line(text: str) -> str:
    return " ".join(text.split())
