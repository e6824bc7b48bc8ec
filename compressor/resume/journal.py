"""What a run keeps beside its output until it is finished, OUT.journal: run.json says which run it
is, `store` holds its pieces.

The same command goes on where it was stopped, to the same bytes. Another recipe, model, text or
version is refused with the difference named; `--restart` discards the journal. A run that ended
with a mistake in its recipe gives its pieces to whatever is run next: pieces are found by what they
depend on, so those that a corrected recipe still needs are not made again.
"""

import json
import logging
import os
import socket
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from compressor.errors import CheckpointError, ConfigError
from compressor.files import manifest
from compressor.files.documents import differences, read_json, replace_text
from compressor.files.staging import leftovers, located, recover, remove
from compressor.resume.store import VERSIONS, Store

SUFFIX, RUN, OWNER, WRITTEN = ".journal", "run.json", "owner", "written"

log = logging.getLogger(__name__)


class Journal:
    """Context manager around one run: `begin` gives its store; leaving it well removes the folder,
    leaving it badly keeps it.
    """

    def __init__(self, output: Path, restart: bool = False):
        """Raises nothing; the folder is looked at when the context is entered."""
        self.output, self.restart = located(output), restart
        self.folder = self.output.with_name(self.output.name + SUFFIX)
        self.lock = FileLock(self.folder / "lock")
        self.store: Store | None = None
        self.new = False

    def __enter__(self) -> Self:
        """Raises ConfigError if another process is at it."""
        if self.folder.exists():
            self._acquire()
            recover(self.output)
            self._tidy()
            if self.restart:
                self._remove()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.lock.is_locked:
            return
        self._tidy()
        if kind is None or (
            self.new and (self.store is None or not any(self.store.folder.glob("*")))
        ):
            self._remove()
            return
        if self.store is not None and isinstance(error, ConfigError):
            (self.folder / RUN).unlink(missing_ok=True)
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            print(
                f"stopped; the same command goes on from {self.folder.name}, `compressor clean` "
                "removes it",
                file=sys.stderr,
            )
        self.lock.release()

    @property
    def scratch(self) -> Path:
        """Folder for what a run does not hold in memory; of no use to the next one."""
        return self.folder / "scratch"

    @property
    def committed(self) -> bool:
        """Whether the output in place is what this run has written, so that only what follows is
        missing.
        """
        path = self.folder / WRITTEN
        return (
            path.exists()
            and (self.output / manifest.NAME).exists()
            and path.read_text(encoding="utf-8") == _weights(self.output)
        )

    def note(self, folder: Path) -> None:
        """Remember what the output will be, just before a finished folder takes its place."""
        replace_text(self.folder / WRITTEN, _weights(folder))

    def begin(self, run: dict[str, Any], shared: Store | None = None) -> Store:
        """The store of the run that `run` (JSON values) describes: its own, or one that it shares
        with others.

        Raises ConfigError with every difference to the run that was stopped.
        """
        if not self.lock.is_locked:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._acquire()
            self.new = True
        run = json.loads(json.dumps(VERSIONS | run))
        before = self._stopped()
        if before is None:
            (self.folder / WRITTEN).unlink(missing_ok=True)
            replace_text(self.folder / RUN, json.dumps(run, indent=2))
        elif found := differences(before, run):
            raise ConfigError(
                f"{self.folder}: was left by another run: {'; '.join(found)}; pass --restart to "
                "discard it, or choose another output"
            )
        self.store = shared or Store(self.folder / "store")
        return self.store

    def _stopped(self) -> dict[str, Any] | None:
        """The run that left this journal; None if there is none, or none that can be read."""
        path = self.folder / RUN
        try:
            return read_json(path) if path.exists() else None
        except CheckpointError as error:
            log.warning("%s; which run left it is not known, and pieces that fit are used", error)
            return None

    def _acquire(self) -> None:
        try:
            self.lock.acquire(blocking=False)
        except Timeout:
            owner = self.folder / OWNER
            who = (
                owner.read_text(encoding="utf-8") if owner.exists() else "one that has just started"
            )
            raise ConfigError(
                f"{self.output}: another process is writing it ({who}); wait for it, or choose "
                "another output"
            ) from None
        replace_text(self.folder / OWNER, f"process {os.getpid()} on {socket.gethostname()}")

    def _tidy(self) -> None:
        if self.scratch.exists():
            remove(self.scratch)

    def _remove(self) -> None:
        remove(self.folder)
        self.lock.release()


def clean(output: Path) -> list[Path]:
    """Remove the journal of an output and what killed runs left beside it; return what is gone.
    Raises ConfigError while a run is on.
    """
    output = located(output)
    before = {*leftovers(output), *output.parent.glob(f"{output.name}{SUFFIX}")}
    with Journal(output, restart=True):
        recover(output)
    return sorted(path for path in before if not path.exists())


def stopped(folder: Path) -> list[Path]:
    """Outputs in a folder whose runs have left a journal there."""
    return sorted(path.with_suffix("") for path in folder.glob(f"*{SUFFIX}"))


def _weights(folder: Path) -> str:
    """The manifest of a checkpoint, less the documents that evaluation amends."""
    files = manifest.read(folder) or {}
    return json.dumps(
        {name: entry for name, entry in files.items() if name not in manifest.DOCUMENTS},
        sort_keys=True,
    )


def cache() -> Path:
    """Where runs without an output have their journals: $XDG_CACHE_HOME/compressor, by default
    below ~/.cache.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compressor"
