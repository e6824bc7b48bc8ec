"""Finished pieces of work in a folder, each found again by what it depends on: a run that was
stopped does nothing twice.

A piece is one file: its value (see `codec`) as safetensors, and a sha256 behind it. It appears
whole or not at all; one that is damaged is made again, with a warning. Names are digests of
everything that the value depends on, so no piece is ever taken for another: several runs may work
in one folder, also at the same time.
"""

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

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


class Store:
    """Pieces in `folder`; without one nothing is kept. `scope`: what all pieces made through this
    object depend on, JSON.
    """

    def __init__(
        self,
        folder: Path | None = None,
        scope: Any = VERSIONS,
        shared: bool = False,
        frozen: bool = False,
    ):
        """shared: whether other processes may work in the folder now; then the first to need a
        piece makes it and the others wait. frozen: nothing in the folder, which belongs to another
        process, is changed; a piece that is missing is made and not kept, and one that is read is
        on this process's devices."""
        self.folder, self.scope, self.shared, self.frozen = folder, scope, shared, frozen

    def within(self, *scope: Any) -> Self:
        """The same pieces, narrowed to what depends on `scope` too."""
        return type(self)(self.folder, digest([self.scope, *scope]), self.shared, self.frozen)

    def recall(self, kind: str, key: Any, make: Callable[[], T], known: Any = None) -> T:
        """The value of a piece: read if it is there, else made and kept.

        kind: a word for file names; key: what tells the piece apart within the scope, JSON; known:
        a value whose tensors are at hand whenever this piece is asked for, and need not be stored
        with it.
        """
        if self.folder is None:
            return make()
        path = self._path(kind, key)
        if self.frozen or not self.shared:
            return _recall(path, make, known, keep=not self.frozen)
        with FileLock(path.with_suffix(".lock")):
            return _recall(path, make, known)

    def holds(self, kind: str, key: Any) -> bool:
        """Whether there is such a piece, damaged or not."""
        return self.folder is not None and self._path(kind, key).exists()

    def forget(self, kind: str, key: Any) -> None:
        """Remove a piece that a later one stands in for, if it is there."""
        if self.folder is not None and not self.frozen:
            self._path(kind, key).unlink(missing_ok=True)

    def _path(self, kind: str, key: Any) -> Path:
        return self.folder / f"{kind}-{digest([self.scope, kind, key])[:40]}"


def _recall(path: Path, make: Callable[[], T], known: Any, keep: bool = True) -> T:
    if path.exists() and (found := _read(path)) is not None:
        return decode(*found, known, foreign=not keep)
    data, tensors = encode(make(), known)
    if keep:
        _write(path, data, tensors)
    return decode(
        data, tensors, known
    )  # not what was made: the next run must see the same layout in memory


def _read(path: Path) -> tuple[Any, dict[str, torch.Tensor]] | None:
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


NOWHERE = Store()
