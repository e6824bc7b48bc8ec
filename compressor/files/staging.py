"""An output folder that appears whole or not at all.

Everything is written to OUT.partial-<host>-<pid>-<random> beside the output. `commit` adds the
manifest, flushes to disk and renames: an old folder aside, the new one in, the old one away.
Whatever stops the run earlier leaves the output as it was. After a kill the partial folder stays
until `recover`; only if the kill falls between the two renames is the old folder left aside as
OUT.old-….
"""

import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout

from compressor.errors import CheckpointError, ConfigError
from compressor.files import manifest
from compressor.files.documents import flush, naming, replace_texts

OURS = (
    "config.json",
    "statistics.json",
    "adapter_config.json",
)  # a model, statistics or an adapter: may be overwritten

log = logging.getLogger(__name__)


def preflight(output: Path, source: Path | None, overwrite: bool, needed_bytes: int) -> None:
    """Refuse an output that could not be written at the end, before any work is done. Leaves
    nothing behind.

    Raises ConfigError if the output exists (without `overwrite`, or is no model folder), is a file,
    link or device, overlaps the source folder or lies in a place that is not writable;
    CheckpointError if fewer than `needed_bytes` are free there.
    """
    output = located(output)
    check_place(output, overwrite)
    if source is not None:
        inner, outer = output.resolve(), source.resolve()
        if inner.is_relative_to(outer) or outer.is_relative_to(inner):
            raise ConfigError(
                f"{output}: the output and the model folder {source} overlap; choose a folder "
                "apart from it"
            )
    parent = next(folder for folder in output.parents if folder.exists())
    try:
        os.rmdir(
            tempfile.mkdtemp(prefix=f"{output.name}.check-", dir=parent)
        )  # os.access says nothing useful for root
    except OSError as error:
        raise ConfigError(
            f"{output}: cannot write in {parent} ({error.strerror}); choose another place"
        ) from None
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise CheckpointError(
            f"{output}: needs about {needed_bytes:,} bytes, {free:,} are free in {parent}; make "
            "room or write elsewhere"
        )
    for leftover in leftovers(output):
        log.warning(
            "%s is left from a run that was stopped; remove it when no other run is writing it",
            leftover,
        )


def located(output: Path) -> Path:
    """Absolute path of an output, `.` and `..` resolved; a link at its very end is kept, to be
    refused.
    """
    return output.resolve() if output.name in ("", "..") else output.parent.resolve() / output.name


def check_place(output: Path, overwrite: bool) -> None:
    """Raise ConfigError unless `output` is a new name, or with `overwrite` the folder of a
    model.
    """
    if output.is_symlink():
        raise ConfigError(f"{output}: is a symbolic link; give the folder itself")
    if not output.exists():
        return
    if not output.is_dir():
        raise ConfigError(f"{output}: exists and is not a folder")
    if not overwrite:
        raise ConfigError(
            f"{output}: exists already; pass --overwrite to replace it, or choose another name"
        )
    if any(output.iterdir()) and not any((output / name).is_file() for name in OURS):
        raise ConfigError(
            f"{output}: holds neither a model nor statistics nor an adapter, so --overwrite does "
            "not remove it; choose another name"
        )


def leftovers(output: Path) -> list[Path]:
    """Partial and set-aside folders of runs that were killed while writing this output (or, partial
    ones, of one still running).
    """
    return sorted(
        path
        for kind in ("partial", "old")
        for path in output.parent.glob(f"{output.name}.{kind}-*")
    )


def recover(output: Path) -> None:
    """Clear away what a killed run left of writing this output; a folder set aside comes back where
    nothing has taken its place.
    """
    lock = lock_of(output)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return  # somebody is writing now
    try:
        for path in leftovers(output):
            if path.name.startswith(f"{output.name}.old-") and not output.exists():
                os.rename(path, output)
            else:
                remove(path)
        for path in output.glob("*.partial-????????"):  # of `replace_texts`
            path.unlink()
    finally:
        _unlock(lock)


def lock_of(output: Path) -> FileLock:
    """What the process that writes this output holds."""
    return FileLock(output.with_name(f".{output.name}.lock"))


def _unlock(lock: FileLock) -> None:
    Path(lock.lock_file).unlink(
        missing_ok=True
    )  # while still held: whoever comes next makes a new one
    lock.release()


def amend(folder: Path, documents: dict[str, str]) -> None:
    """Replace documents (name → text) of a committed folder and their manifest entries; weights and
    the rest are not read again.

    Raises CheckpointError if a name is not one of the documents, which are the files the model does
    not depend on.
    """
    entries = manifest.read(folder) or {}
    for name, text in documents.items():
        if name not in manifest.DOCUMENTS:
            raise CheckpointError(
                f"{folder / name}: only {', '.join(sorted(manifest.DOCUMENTS))} may change in a "
                "finished folder"
            )
        entries[name] = manifest.digest_of(text.encode())
    replace_texts(
        {
            folder / name: text
            for name, text in (documents | {manifest.NAME: manifest.render(entries)}).items()
        }
    )


class Staging:
    """Context manager: `folder` is where to write; `commit()` makes it the output; leaving without
    commit removes it.
    """

    def __init__(self, output: Path, overwrite: bool = False):
        self.output, self.overwrite = located(output), overwrite
        self.run = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.folder = self.output.with_name(f"{self.output.name}.partial-{self.run}")
        self.lock = lock_of(self.output)

    def __enter__(self) -> Self:
        check_place(self.output, self.overwrite)
        with naming(self.folder):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.lock.acquire(blocking=False)
            except Timeout:
                others = ", ".join(path.name for path in leftovers(self.output))
                raise ConfigError(
                    f"{self.output}: another process is writing it ({others}, named after host "
                    "and process)"
                ) from None
            try:
                self.folder.mkdir()
            except BaseException:
                _unlock(self.lock)
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self.folder.exists():
                remove(self.folder)
        finally:
            _unlock(self.lock)

    def commit(self, ready: Callable[[Path], None] | None = None) -> Path:
        """Write the manifest, flush everything and put the folder in place. Returns the output
        path.

        ready: called with the finished folder just before it is renamed.
        """
        with naming(self.folder):
            (self.folder / manifest.NAME).write_text(manifest.build(self.folder), encoding="utf-8")
            for path in sorted(self.folder.rglob("*")):
                flush(path)
            flush(self.folder)
        if ready is not None:
            ready(self.folder)
        check_place(self.output, self.overwrite)
        old = self.output.with_name(f"{self.output.name}.old-{self.run}")
        with naming(self.output):
            try:
                if self.output.exists():
                    os.rename(self.output, old)
                os.rename(self.folder, self.output)
            except BaseException:
                if old.exists() and not self.output.exists():
                    os.rename(old, self.output)
                raise
            flush(self.output.parent)
        if old.exists():
            remove(old)
        return self.output


def remove(folder: Path) -> None:
    """Delete a folder; what the system refuses to delete is reported and left, since the run's
    outcome does not depend on it.
    """
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("%s could not be removed (%s); remove it by hand", folder, error)
