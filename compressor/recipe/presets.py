"""Folders of data that travel with the package: `configs`, `calibration`, `reference`."""

from pathlib import Path


def resource_folder(name: str) -> Path:
    """Return a bundled folder. An installed package holds all of them; in a source tree some stand beside the package."""
    package = Path(__file__).parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name
