"""Small documents: JSON and text, read with errors that name the place and written whole."""

import json
import os
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compressor.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError with file and position if it is cut short, or with
    a key given twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        if len(counts) != len(pairs):
            raise CheckpointError(
                f"{path}: given twice: {some(key for key in counts if counts[key] > 1)}; keep one"
            )
        return dict(pairs)

    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path}:{error.lineno}:{error.colno}: {error.msg}; the file is damaged or cut short"
        ) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path}: byte {error.start} is not UTF-8; the file is damaged"
        ) from None
    except RecursionError:
        raise CheckpointError(f"{path}: nested too deeply to be a model's file") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn a failure of the operating system (disk full, file too large, no permission) into a
    CheckpointError that names the file.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: could not be written ({error.strerror or error}); nothing was replaced"
        ) from error


def replace_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new content. Raises CheckpointError
    for links and special files.
    """
    replace_texts({path: text})


def replace_texts(documents: dict[Path, str]) -> None:
    """Write text files of one folder; none is replaced before all are on disk, so that a full disk
    leaves those that belong together.
    """
    parts = {
        path: path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}") for path in documents
    }
    try:
        for path, part in parts.items():
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise CheckpointError(f"{path}: is not a regular file")
            with naming(path):
                part.write_text(documents[path], encoding="utf-8")
                flush(part)
        for path, part in parts.items():
            with naming(path):
                os.replace(part, path)
                flush(path.parent)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def differences(stored: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Every part in which two JSON values differ, with both: `recipe.seed is 1 there and 0
    here`.
    """
    before, now = dict(_flatten(stored)), dict(_flatten(expected))
    return [
        f"{key} is {before.get(key, 'absent')} there and {now.get(key, 'absent')} here"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, "absent") != now.get(key, "absent")
    ]


def _flatten(data: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dictionaries and lists, with dotted keys."""
    if not isinstance(data, (dict, list)):
        yield prefix, data
        return
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))


def some(names: Iterable[str]) -> str:
    """List up to SHOWN names, and count the rest."""
    names = sorted(names)
    return ", ".join(names[:SHOWN]) + (
        f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    )


SHOWN = 10  # names listed in one message
