"""Lists of what blocks return, batch by batch, within a stated memory: what does not fit lies in
files until it is asked for.

A value comes back bit for bit, in the same layout in memory and on the same device, wherever it has
been: products of matrices depend on the layout in their last bits.

Memory: the budget, for all lists of a cache together, and a copy of one value while it is written
or read.
"""

import json
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from compressor.files.documents import naming
from compressor.resume.codec import decode, encode, tensors_in


class Cache:
    """What several lists of batches share: a budget in bytes, and a folder for what exceeds it."""

    def __init__(self, budget: float = float("inf"), folder: Path | None = None):
        """budget: bytes of tensors held in memory; folder: where a folder for files is made once
        there is one, None: with temporary files.

        The files of a list go with it, the folder with the cache, and at the latest with the
        process.
        """
        self.budget, self.parent = budget, folder
        self.held = self.written = 0  # bytes in memory now; files so far
        self._folder: Path | None = None

    def batches(self, count: int) -> "Batches":
        """A new list of so many values, all None."""
        return Batches(self, count)

    def path(self) -> Path:
        """A new file. Raises CheckpointError if its folder cannot be made."""
        if self._folder is None:
            parent = self.parent or Path(tempfile.gettempdir())
            with naming(parent):
                parent.mkdir(parents=True, exist_ok=True)
                self._folder = Path(tempfile.mkdtemp(prefix="blocks-", dir=parent))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self.written += 1
        return self._folder / f"{self.written}.safetensors"


@dataclass(frozen=True)
class OnDisk:
    """A value in a file."""

    path: Path

    def read(self) -> Any:
        with safe_open(self.path, "pt") as file:
            data = json.loads(file.metadata()["value"])
            return decode(data, {name: file.get_tensor(name) for name in file.keys()})


class Batches:
    """A list of fixed length; values are tensors, or tuples of tensors and None."""

    def __init__(self, cache: Cache, count: int):
        self.cache = cache
        self.slots: list[Any] = [None] * count
        weakref.finalize(self, _empty, cache, self.slots)

    def __len__(self) -> int:
        return len(self.slots)

    def __getitem__(self, index: int) -> Any:
        slot = self.slots[index]
        return slot.read() if isinstance(slot, OnDisk) else slot

    def __setitem__(self, index: int, value: Any) -> None:
        """Put a value in the place of the former one. Raises CheckpointError if it does not fit in
        memory and cannot be written.
        """
        _let_go(self.cache, self.slots, index)
        value = _laid_out(value)
        size = _bytes(value)
        if self.cache.held + size <= self.cache.budget:
            self.cache.held += size
            self.slots[index] = value
        else:
            self.slots[index] = _write(self.cache.path(), value)


def _laid_out(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_laid_out(item) for item in value)
    return value.detach().contiguous() if isinstance(value, Tensor) else value


def _bytes(value: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors_in(value))


def _write(path: Path, value: Any) -> OnDisk:
    data, tensors = encode(value)
    with naming(path):
        try:
            path.write_bytes(save(tensors, {"value": json.dumps(data)}))
        except OSError:
            path.unlink(missing_ok=True)
            raise
    return OnDisk(path)


def _let_go(cache: Cache, slots: list[Any], index: int) -> None:
    slot, slots[index] = slots[index], None
    if isinstance(slot, OnDisk):
        slot.path.unlink(missing_ok=True)
    else:
        cache.held -= _bytes(slot)


def _empty(cache: Cache, slots: list[Any]) -> None:
    for index in range(len(slots)):
        _let_go(cache, slots, index)
