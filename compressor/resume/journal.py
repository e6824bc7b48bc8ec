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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

from filelock import FileLock, Timeout

from compressor.errors import CheckpointError, ConfigError
from compressor.files import manifest
from compressor.files.documents import differences, read_json, replace_text
from compressor.files.staging import leftovers, located, recover, remove
from compressor.resume.store import VERSIONS, FolderStore, Store

SUFFIX, RUN, OWNER, WRITTEN = ".journal", "run.json", "owner", "written"

log = logging.getLogger(__name__)


class Journal:
    """Pieces and description of one run, beside its output, held by one process at a time.

    Inside the `with` the process holds the journal, if there is one; `begin` makes one where there
    is none. `discard` when the run is finished; else `keep`, which leaving without a word does too.
    """

    def __init__(self, output: Path):
        self.output = located(output)
        self.folder = self.output.with_name(self.output.name + SUFFIX)
        self.lock = FileLock(self.folder / "lock")
        self.is_new = False  # whether this process has made the folder
        self.is_begun = False  # whether the run of this process may work with the pieces

    def __enter__(self) -> Self:
        """Hold the journal that a stopped run has left. Raises ConfigError if another process is at
        it.
        """
        if self.folder.exists():
            self._acquire()
            recover(self.output)
            self._remove_scratch()
        return self

    def __exit__(self, *error: object) -> None:
        self.keep()

    def keep(self, run: bool = True) -> None:
        """Leave the journal to the next command, unless this process has made it and nothing is in
        it.

        run: whether only the same run may go on from it; else its pieces, if this run has begun,
        serve whatever run needs them.
        """
        if not self.lock.is_locked:
            return
        if self.is_new and not any(self.store_folder.glob("*")):
            self.discard()
            return
        self._remove_scratch()
        if self.is_begun and not run:
            (self.folder / RUN).unlink(missing_ok=True)
        self.lock.release()

    def discard(self) -> None:
        """Remove the journal, if there is one."""
        if self.lock.is_locked:
            remove(self.folder)
            self.lock.release()

    @property
    def store_folder(self) -> Path:
        """Folder of the pieces."""
        return self.folder / "store"

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
        """Return the store of the run that `run` (JSON values) describes: its own, or one that it
        shares with others.

        Raises ConfigError with every difference to the run that was stopped.
        """
        if not self.lock.is_locked:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._acquire()
            self.is_new = True
        run = json.loads(json.dumps(VERSIONS | run))
        before = self._stopped()
        if before is None:
            (self.folder / WRITTEN).unlink(missing_ok=True)
            replace_text(self.folder / RUN, json.dumps(run, indent=2))
        elif changes := differences(before, run):
            raise ConfigError(
                f"{self.folder}: was left by another run: {'; '.join(changes)}; pass --restart to "
                "discard it, or choose another output"
            )
        self.is_begun = True
        return shared or FolderStore(self.store_folder)

    def _stopped(self) -> dict[str, Any] | None:
        """Read which run left this journal; None if none did, or none that can be read."""
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

    def _remove_scratch(self) -> None:
        if self.scratch.exists():
            remove(self.scratch)


@contextmanager
def journaled(output: Path, restart: bool = False) -> Iterator[Journal]:
    """Hold the journal of a run inside the `with`: discard it when the run is finished, and keep it
    when it is stopped; after a mistake in its recipe only the pieces.

    restart: whether to discard what a stopped run has left. Raises ConfigError if another process
    is at it.
    """
    if restart:
        discard_journal(output)
    with Journal(output) as journal:
        try:
            yield journal
        except ConfigError:
            journal.keep(run=False)
            raise
        except (KeyboardInterrupt, SystemExit):
            journal.keep()
            if journal.folder.exists():
                print(
                    f"stopped; the same command goes on from {journal.folder.name}, `compressor "
                    "clean` removes it",
                    file=sys.stderr,
                )
            raise
        journal.discard()


def discard_journal(output: Path) -> None:
    """Remove what a stopped run has left. Raises ConfigError while a run is on."""
    with Journal(output) as journal:
        journal.discard()


def clean(output: Path) -> list[Path]:
    """Remove the journal of an output and what killed runs left beside it; return what is gone.
    Raises ConfigError while a run is on.
    """
    output = located(output)
    before = {*leftovers(output), *output.parent.glob(f"{output.name}{SUFFIX}")}
    discard_journal(output)
    recover(output)
    return sorted(path for path in before if not path.exists())


def stopped_outputs(folder: Path) -> list[Path]:
    """List the outputs in a folder whose runs have left a journal there."""
    return sorted(path.with_suffix("") for path in folder.glob(f"*{SUFFIX}"))


def _weights(folder: Path) -> str:
    """The manifest of a checkpoint, less the documents that evaluation amends."""
    files = manifest.read(folder) or {}
    return json.dumps(
        {name: entry for name, entry in files.items() if name not in manifest.DOCUMENTS},
        sort_keys=True,
    )


def user_cache() -> Path:
    """Return where runs without an output have their journals: $XDG_CACHE_HOME/compressor, by
    default below ~/.cache.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compressor"


@contextmanager
def writable_cache() -> Iterator[Path]:
    """Provide `user_cache`, or a temporary folder, aloud, where that cannot be written."""
    folder = user_cache()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        writable = False
    if writable:
        yield folder
        return
    log.warning(
        "%s cannot be written, so an evaluation that is stopped starts anew; set XDG_CACHE_HOME to "
        "a folder that can be",
        folder,
    )
    with TemporaryDirectory(prefix="compressor-") as temporary:
        yield Path(temporary)
