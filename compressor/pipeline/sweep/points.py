"""The points of a sweep, from one YAML file: each is a full recipe with a name.

    base:                          what all points have in common: a preset or file under `config`,
                                   and sections of a recipe
      config: default
      model: {name: reference}
    grid:                          every combination of these values
      config: [svd_llm, default]
      allocation.keep: [0.8, 0.6]
    zip:                           lists of one length, taken side by side, with every combination
                                   of the grid
      seed: [0, 1]
    runs:                          single points over `base`, by name
      gptq: {config: gptq_w4}

A point of grid and zip is named after its values, `svd_llm+keep=0.8+seed=0`: the last part of each
key that tells it from the others. Names hold no comma, at which lm-eval splits `--model_args`.
"""

import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.errors import ConfigError, did_you_mean
from compressor.files.yaml import Document, parse_document, read_text
from compressor.recipe.load import Entry, assemble, parse_key
from compressor.recipe.sections import Recipe

SECTIONS = ("base", "grid", "zip", "runs")
CONFIG = "config"
MOST = 10_000
LONGEST = 120  # characters of a name, which is a folder's
SAFE = re.compile(r"[\w.=+-]+")


@dataclass(frozen=True)
class Point:
    """One run of a sweep: what tells it from the others, and all of it."""

    name: str
    settings: dict[str, Any]  # dotted key → value, and `config`
    recipe: Recipe


def read_points(path: Path) -> list[Point]:
    """The points of a sweep file, in its order: grid and zip, then runs.

    Raises ConfigError, with the line, for anything unknown or not a recipe, lists of unequal
    length, no point, more than MOST, and two points of one name.
    """
    document = parse_document(read_text(path), str(path))
    found = document.value
    if not isinstance(found, dict):
        raise ConfigError(f"{path}:1: expected a mapping of {', '.join(SECTIONS)}")
    for key, section in found.items():
        where = document.places[key,]
        if key not in SECTIONS:
            raise ConfigError(
                f"{where}: unknown key '{key}' in a sweep; {did_you_mean(key, SECTIONS)}"
            )
        if not isinstance(section, dict):
            raise ConfigError(f"{where}: {key} should be a mapping")
    combined = list(_combinations(document)) if found.get("grid") or found.get("zip") else []
    points = [(name_of(settings), settings, "grid") for settings in combined]
    points += [
        (_checked(name, document), flatten(document.value["runs"][name]), "runs")
        for name in found.get("runs", {})
    ]
    if not points:
        raise ConfigError(f"{path}:1: a sweep without points; give it a grid, a zip or runs")
    _refuse_equal_names(path, [name for name, _, _ in points])
    base = flatten(found.get("base", {}))
    return [
        Point(name, settings, _recipe(document, base, settings, section, name))
        for name, settings, section in points
    ]


def _combinations(document: Document) -> Iterator[dict[str, Any]]:
    """Settings of every point of grid and zip. Counted before any is made."""
    grid, pairs = document.value.get("grid", {}), document.value.get("zip", {})
    for section, lists in (("grid", grid), ("zip", pairs)):
        for key, values in lists.items():
            if not isinstance(values, list) or not values:
                raise ConfigError(
                    f"{document.places[section, key]}: {key} should be a list of values, not empty"
                )
    lengths = {len(values) for values in pairs.values()}
    if len(lengths) > 1:
        found = " and ".join(map(str, sorted(lengths)))
        raise ConfigError(
            f"{document.places['zip',]}: lists of zip have {found} values; give them equally many"
        )
    if both := grid.keys() & pairs.keys():
        raise ConfigError(
            f"{document.places['zip', min(both)]}: {min(both)} is in the grid too; leave one out"
        )
    count = math.prod(map(len, grid.values())) * next(iter(lengths), 1)
    if count > MOST:
        raise ConfigError(
            f"{document.places['grid' if grid else 'zip',]}: {count:,} points, {MOST:,} are the "
            "most; shorten the lists"
        )
    rows = [dict(zip(pairs, row, strict=True)) for row in zip(*pairs.values(), strict=True)] or [{}]
    for values in itertools.product(*grid.values()):
        for row in rows:
            yield dict(zip(grid, values, strict=True)) | row


def name_of(settings: dict[str, Any]) -> str:
    """Name a point, as `svd_llm+keep=0.8`: the config by itself, other values behind the last part
    of their key.
    """
    tails = {key: _tail(key, settings) for key in settings if key != CONFIG}
    config = [Path(str(settings[CONFIG])).stem] if CONFIG in settings else []
    name = "+".join(config + [f"{tail}={_text(settings[key])}" for key, tail in tails.items()])
    return re.sub(r"[^\w.=+-]+", "-", name)[:LONGEST].strip("-.") or "point"


def _tail(key: str, keys: Any) -> str:
    """The shortest end of a dotted key that no other key has."""
    parts = key.split(".")
    for count in range(1, len(parts)):
        tail = ".".join(parts[-count:])
        if sum(other == tail or other.endswith(f".{tail}") for other in keys) == 1:
            return tail
    return key


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", "="))


def _checked(name: str, document: Document) -> str:
    where = document.places["runs", name]
    if not SAFE.fullmatch(name) or name.startswith(".") or len(name) > LONGEST:
        raise ConfigError(
            f"{where}: '{name}' does not name a folder; use letters, digits and . = + - _"
        )
    if not isinstance(document.value["runs"][name], dict):
        raise ConfigError(
            f"{where}: {name} should be a mapping of settings, {{}} for the base as it is"
        )
    return name


def _refuse_equal_names(path: Path, names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name.casefold() in seen:  # some file systems take them for one
            raise ConfigError(
                f"{path}: two points have the output name '{name}'; tell them apart, or name them "
                "yourself under `runs`"
            )
        seen.add(name.casefold())


def flatten(data: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists are values."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= (
            flatten(value, f"{above}{key}.")
            if isinstance(value, dict) and value
            else {f"{above}{key}": value}
        )
    return found


def _recipe(
    document: Document, base: dict[str, Any], settings: dict[str, Any], section: str, name: str
) -> Recipe:
    layers = []
    for above, layer in (
        (("base",), base),
        (("runs", name) if section == "runs" else (), settings),
    ):
        layers.append(
            [_entry(document, above, key, value) for key, value in layer.items() if key != CONFIG]
        )
    return assemble(settings.get(CONFIG, base.get(CONFIG)), layers)


def _entry(document: Document, above: tuple[str, ...], key: str, value: Any) -> Entry:
    """One setting with its place: that of the key, or of the nearest mapping above it that the file
    spells out.
    """
    tops = [above] if above else [("grid",), ("zip",)]
    parts = key.split(".")
    ways = [
        (*top, *way)
        for top in tops
        for count in range(len(parts), -1, -1)
        for way in (tuple(parts[:count]), (key,))
    ]
    where = next(
        (document.places[way] for way in ways if way in document.places and len(way) > 1), None
    )
    where = where or next(document.places[top] for top in tops if top in document.places)
    return parse_key(key, where), value, where
