"""Finished pieces of work in a folder, found again by what they depend on: a run that was stopped
does nothing twice.

A piece is one file: its value (see `codec`) as safetensors, and a sha256 behind it. It appears
complete or not at all; one that is damaged is made again, with a warning. Names are digests of
everything that the value depends on, so no piece is ever taken for another: several runs may work
in one folder, also at the same time.
"""

import hashlib
import json
import logging
import os
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar, final

import torch
from filelock import FileLock
from safetensors.torch import load, save

from compressor import __version__
from compressor.files.documents import naming
from compressor.resume.codec import decode, encode

T = TypeVar("T")
DIGEST_BYTES = 32
VERSIONS = {"compressor": __version__, "torch": torch.__version__}

log = logging.getLogger(__name__)


def digest(data: Any) -> str:
    """sha256 of JSON data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


class Store(ABC):
    """Pieces of work that were finished before. `scope`: what all pieces made through this object
    depend on, JSON.
    """

    def __init__(self, scope: Any = VERSIONS):
        self.scope = scope

    @abstractmethod
    def within(self, *scope: Any) -> Self:
        """Narrow the store to the pieces that depend on `scope` too."""

    @abstractmethod
    def recall(self, kind: str, key: Any, make: Callable[[], T], known: Any = None) -> T:
        """Return the value of a piece: read if it is there, else made, and kept where this store
        keeps anything.

        Args:
            kind: a word for file names.
            key: what tells the piece apart within the scope, JSON.
            make: makes the value.
            known: a value whose tensors are at hand whenever this piece is asked for, and need not
                be stored with it.
        """

    @abstractmethod
    def holds(self, kind: str, key: Any) -> bool:
        """Whether there is such a piece, damaged or not."""

    @abstractmethod
    def forget(self, kind: str, key: Any) -> None:
        """Remove a piece that a later one stands in for, if it is there."""


@final
class NoStore(Store):
    """Keeps nothing."""

    def within(self, *scope: Any) -> Self:
        return self

    def recall(self, kind: str, key: Any, make: Callable[[], T], known: Any = None) -> T:
        return make()

    def holds(self, kind: str, key: Any) -> bool:
        return False

    def forget(self, kind: str, key: Any) -> None:
        """Nothing is kept."""


class _Folder(Store):
    """Pieces in a folder."""

    def __init__(self, folder: Path, scope: Any = VERSIONS):
        super().__init__(scope)
        self.folder = folder

    def within(self, *scope: Any) -> Self:
        return type(self)(self.folder, digest([self.scope, *scope]))

    def holds(self, kind: str, key: Any) -> bool:
        return self.path(kind, key).exists()

    def path(self, kind: str, key: Any) -> Path:
        """Return the file of a piece."""
        return self.folder / f"{kind}-{digest([self.scope, kind, key])[:40]}"


@final
class FolderStore(_Folder):
    """Pieces in a folder that no other process needs at the same time."""

    def recall(self, kind: str, key: Any, make: Callable[[], T], known: Any = None) -> T:
        return _read_or_make(self.path(kind, key), make, known)

    def forget(self, kind: str, key: Any) -> None:
        self.path(kind, key).unlink(missing_ok=True)


@final
class SharedStore(_Folder):
    """Pieces in a folder where other processes work now: the first to need a piece makes it, and
    the others wait.
    """

    def recall(self, kind: str, key: Any, make: Callable[[], T], known: Any = None) -> T:
        path = self.path(kind, key)
        with FileLock(path.with_suffix(".lock")):
            return _read_or_make(path, make, known)

    def forget(self, kind: str, key: Any) -> None:
        self.path(kind, key).unlink(missing_ok=True)


@final
class ReadOnlyStore(_Folder):
    """Pieces in the folder of another process, which is never changed: a missing piece is made and
    not kept; one that is read is put on this process's devices.
    """

    def recall(self, kind: str, key: Any, make: Callable[[], T], known: Any = None) -> T:
        if piece := _read(self.path(kind, key)):
            return decode(*piece, known, foreign=True)
        return decode(*encode(make(), known), known)

    def forget(self, kind: str, key: Any) -> None:
        """The folder belongs to another process."""


def _read_or_make(path: Path, make: Callable[[], T], known: Any) -> T:
    piece = _read(path)
    if piece is None:
        piece = encode(make(), known)
        _write(path, *piece)
    # not what was made: the next run must see the same layout in memory
    return decode(*piece, known)


def _read(path: Path) -> tuple[Any, dict[str, torch.Tensor]] | None:
    """Read JSON and tensors of a piece; None if it is missing, or damaged."""
    if not path.exists():
        return None
    content = path.read_bytes()
    content, end = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != end:
        log.warning("%s is damaged; what it held is made again", path)
        return None
    size = int.from_bytes(content[:8], "little")
    data = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["value"])
    return data, load(content)


def _write(path: Path, data: Any, tensors: dict[str, torch.Tensor]) -> None:
    part = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            content = save(tensors, {"value": json.dumps(data)})
            with part.open("wb") as stream:
                stream.write(content)
                stream.write(hashlib.sha256(content).digest())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


NOWHERE = NoStore()
