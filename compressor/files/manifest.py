"""manifest.json of a finished model folder: sha256 and size of every file, so that a changed byte
is noticed.

The manifest leaves out itself and timings.json, which differs from run to run.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from compressor.errors import CheckpointError
from compressor.files.documents import read_json
from compressor.files.safetensors import inside
from compressor.runtime.progress import Progress, silent

NAME = "manifest.json"
FORMAT = "compressor manifest"
OUTSIDE = frozenset({NAME, "timings.json"})
# For people; the model does not depend on them.
DOCUMENTS = frozenset({"README.md", "recipe.yaml", "plan.json", "curves.json", "report.json"})


def digest(path: Path) -> dict[str, Any]:
    """Return {sha256, bytes} of a file."""
    with path.open("rb") as stream:
        return {
            "sha256": hashlib.file_digest(stream, "sha256").hexdigest(),
            "bytes": path.stat().st_size,
        }


def digest_of(data: bytes) -> dict[str, Any]:
    """Return {sha256, bytes} of what is to be a file."""
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def listed(folder: Path) -> list[str]:
    """Names of the files a manifest of this folder covers, relative, with forward slashes."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in names if name not in OUTSIDE)


def render(files: dict[str, dict[str, Any]]) -> str:
    """Text of the manifest for files given as name → {sha256, bytes}."""
    return (
        json.dumps({"format": FORMAT, "version": 1, "files": files}, indent=2, sort_keys=True)
        + "\n"
    )


def build(folder: Path) -> str:
    """Text of the manifest of everything in the folder."""
    return render({name: digest(folder / name) for name in listed(folder)})


def read(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Return name → {sha256, bytes}, or None if the folder has no manifest of ours. Raises
    CheckpointError if it is damaged.
    """
    if not (folder / NAME).exists():
        return None
    data = read_json(inside(folder, NAME))
    if data.get("format") != FORMAT:
        return None
    files = data.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and entry.keys() == {"sha256", "bytes"} for entry in files.values()
    ):
        raise CheckpointError(
            f"{folder / NAME}: expected 'files' with sha256 and bytes of each file; the manifest "
            "is damaged"
        )
    return files


def problems(
    folder: Path, files: dict[str, dict[str, Any]], progress: Progress = silent
) -> list[str]:
    """Compare files with their entries, and name each that is missing, leads out of the folder or
    has changed.
    """
    found = []
    for name, entry in progress(sorted(files.items()), "compare with manifest.json"):
        try:
            path = inside(folder, name)
        except CheckpointError as error:
            found.append(str(error))
            continue
        size = path.stat().st_size
        if size != entry["bytes"]:
            found.append(f"{path}: {size} bytes, {NAME} says {entry['bytes']}")
        elif digest(path) != entry:
            found.append(f"{path}: its bytes differ from the sha256 in {NAME}")
    return found
