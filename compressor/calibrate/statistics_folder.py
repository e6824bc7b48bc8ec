"""Statistics on disk: a folder that later runs reuse, with the fingerprint of what the statistics
were collected on.

statistics.safetensors holds every tensor once, however many linears share it; statistics.json says
which linear has which tensors and what the fingerprint is; manifest.json has their checksums. The
folder appears whole or not at all.
"""

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.errors import DataError
from compressor.files import manifest
from compressor.files.documents import differences, naming, read_json
from compressor.files.staging import Staging
from compressor.statistics import LinearStats

TENSORS, DESCRIPTION = "statistics.safetensors", "statistics.json"
FORMAT, VERSION = "compressor statistics", 1
COUNTS = ("tokens", "grad_tokens")


def save_statistics(
    folder: Path,
    stats: dict[str, LinearStats],
    fingerprint: dict[str, Any],
    overwrite: bool = False,
) -> None:
    """Write statistics as a new folder. fingerprint: JSON values, compared one by one when the
    statistics are loaded.

    Raises ConfigError if the folder exists (with `overwrite`, if it holds neither statistics nor a
    model), CheckpointError or DataError if it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    keys: dict[int, str] = {}  # id of a tensor → the name it is stored under
    linears = {}
    for name, one in stats.items():
        linears[name] = {count: getattr(one, count) for count in COUNTS}
        for field, value in _tensors(one).items():
            key = keys.setdefault(id(value), f"{name}.{field}")
            tensors.setdefault(key, value.contiguous())
            linears[name][field] = key
    description = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint,
        "linears": linears,
    }
    with Staging(folder, overwrite) as staging:
        with naming(staging.folder / DESCRIPTION):
            text = json.dumps(description, indent=2, allow_nan=False)
            (staging.folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
            _write(tensors, staging.folder / TENSORS)
            shutil.copymode(
                staging.folder / DESCRIPTION, staging.folder / TENSORS
            )  # safetensors lets only the owner read
        staging.commit()


def load_statistics(
    folder: Path, fingerprint: dict[str, Any] | None = None
) -> dict[str, LinearStats]:
    """Read statistics that must have this fingerprint (None: any). Linears that shared a tensor
    share it again.

    Raises DataError naming what is damaged, or every part of the fingerprint that differs with both
    values.
    """
    description = _describe(folder)
    found = (
        []
        if fingerprint is None
        else differences(description["fingerprint"], json.loads(json.dumps(fingerprint)))
    )
    if found:
        raise DataError(
            f"{folder}: the statistics belong to another run: {'; '.join(found)}; collect them "
            "again"
        )
    if problems := manifest.problems(folder, manifest.read(folder) or {}):
        raise DataError(f"{problems[0]}; collect the statistics again")
    tensors = load_file(folder / TENSORS)
    stats = {}
    for name, entry in description["linears"].items():
        values: dict[str, Any] = {
            key: value if key in COUNTS else tensors[value] for key, value in entry.items()
        }
        stats[name] = LinearStats(**values)
    return stats


def read_fingerprint(folder: Path) -> dict[str, Any]:
    """What the statistics of a folder were collected on. Raises DataError as `load_statistics`
    does.
    """
    return _describe(folder)["fingerprint"]


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise DataError(f"{path}: could not be written: {error}") from None


def _tensors(stats: LinearStats) -> dict[str, Tensor]:
    """Fields of the statistics that hold a tensor."""
    values = {field.name: getattr(stats, field.name) for field in fields(stats)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _describe(folder: Path) -> dict[str, Any]:
    """Read statistics.json. Raises DataError if the folder holds no statistics, or those of a newer
    version.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise DataError(
            f"{folder}: no statistics ({DESCRIPTION} is missing); collect them with `compressor "
            f"calibrate MODEL {folder}`"
        )
    description = read_json(path)
    if description.get("format") != FORMAT or description.get("version") != VERSION:
        found = f"'{description.get('format')}' version {description.get('version')}"
        raise DataError(
            f"{path}: holds {found}, this version reads '{FORMAT}' version {VERSION}; collect the "
            "statistics again"
        )
    return description
