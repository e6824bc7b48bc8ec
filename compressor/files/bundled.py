"""Folders of data that travel with the package: `configs`, `calibration`, `reference`."""

from pathlib import Path


def bundled_folder(name: str) -> Path:
    """Return a bundled folder: inside the installed package, or at the top of the source tree."""
    package = Path(__file__).parents[1]
    inside = package / "_bundled" / name
    return inside if inside.is_dir() else package.parent / name
