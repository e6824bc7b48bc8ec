"""From YAML to a `Recipe`: defaults < file or preset < `--set a.b=value` < named options; every
message says where.

A size given in a stronger layer takes the place of a size of the other kind (`keep`,
`target_size`) in a weaker one. `--method` stands for the method of the file, so `--set` acts on the
options of that method. A `--set` that a named option would discard is an error.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compressor.errors import ConfigError, did_you_mean
from compressor.files.yaml import Keys, dump, parse_document, parse_yaml, read_text
from compressor.recipe.presets import presets
from compressor.recipe.quantities import size_in_bytes
from compressor.recipe.sections import Recipe
from compressor.recipe.validation import dotted, explain, nearest_path, section_at

__all__ = [
    "Recipe",
    "dump_yaml",
    "find_recipe",
    "load_recipe",
    "parse_size",
    "parse_yaml",
    "schema",
]

_RIVALS: dict[Keys, Keys] = {
    ("allocation", "keep"): ("allocation", "target_size"),
    ("allocation", "target_size"): ("allocation", "keep"),
}
METHOD: Keys = ("method",)
ENGINE: Keys = (*METHOD, 0, "candidates", 0, "name")  # what `--method` sets
Entry = tuple[Keys, Any, str]  # path, value, origin


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe."""
    return Recipe.model_json_schema()


def parse_size(size: str | int) -> int:
    """Turn `3.2GiB`, `4GB` or a number of bytes into bytes. Raises ConfigError."""
    try:
        return size_in_bytes(size)
    except ValueError as error:
        raise ConfigError(f"a size {error}") from None


def dump_yaml(recipe: Recipe) -> str:
    """Write a recipe with every default spelled out, so that it means the same to later
    versions.
    """
    return dump(recipe.model_dump(mode="json"))


def find_recipe(config: str | Path | None) -> Path:
    """Return the file of a preset name (None for `default`) or of a path. Raises ConfigError naming
    the nearest preset.
    """
    name = "default" if config is None else str(config)
    known = presets()
    path = known.get(name, Path(name))
    if not path.exists():
        raise ConfigError(
            f"'{name}' is neither a recipe file nor a preset; {did_you_mean(name, known)}"
        )
    return path


def load_recipe(
    config: str | Path | None = None,
    overrides: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
    origins: Mapping[str, str] | None = None,
) -> Recipe:
    """Read and check a recipe.

    Args:
        config: preset name, file, or None for the preset `default`.
        overrides: `a.b=value` with the value in YAML, list items by number.
        options: dotted key → value, None meaning not given; `method` names one engine for every
            target, and `overrides` act on its options.
        origins: dotted key → how messages name the option that sets it.

    Raises:
        ConfigError: one line with the place, the key, and what would be right; also for an override
            that a stronger setting would discard.
    """
    given = [parse_override(text) for text in overrides]
    named = list(list_options(options or {}, origins or {}))
    _refuse_discarded(given, named)
    engine = [entry for entry in named if entry[0] == METHOD]
    return assemble(config, [engine, given, [entry for entry in named if entry[0] != METHOD]])


def assemble(config: str | Path | None, layers: Iterable[list[Entry]]) -> Recipe:
    """Lay settings over a preset or file, stronger layers last, and check the whole.

    Raises:
        ConfigError: names the place of the setting that is wrong.
    """
    path = find_recipe(config)
    document = parse_document(read_text(path), str(path))
    if not isinstance(document.value, dict):
        raise ConfigError(
            f"{path}:1: expected a mapping of recipe sections: {', '.join(Recipe.model_fields)}"
        )
    return _check_layers(document.value, dict(document.places), layers)


def replace_settings(recipe: Recipe, settings: Mapping[str, Any], where: str) -> Recipe:
    """Copy a recipe with other settings, by dotted key. where: what messages name.

    Raises:
        ConfigError: as `assemble`.
    """
    layer = [(parse_key(key, where), value, where) for key, value in settings.items()]
    return _check_layers(recipe.model_dump(mode="json"), {(): where}, [layer])


def _check_layers(
    data: dict[str, Any], origins: dict[Keys, str], layers: Iterable[list[Entry]]
) -> Recipe:
    for layer in layers:
        _apply_layer(data, origins, layer)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise ConfigError(explain(error, Recipe, origins, "the recipe")) from None


def parse_override(text: str) -> Entry:
    """Split `a.b=value`. Raises ConfigError naming the nearest path when a.b does not exist."""
    origin = f"--set {text}"
    key, equals, value = text.partition("=")
    if not equals or not value.strip():
        raise ConfigError(f"{origin}: expected path=value, with null for no value")
    return parse_key(key.strip(), origin), parse_yaml(value, origin), origin


def parse_key(key: str, origin: str) -> Keys:
    """Split a dotted key into its path. Raises ConfigError naming the nearest one if a recipe has
    no such path.
    """
    path = tuple(int(name) if name.isdecimal() else name for name in key.split("."))
    for depth, name in enumerate(path):
        section = section_at(Recipe, path[:depth])
        if section and isinstance(name, str) and name not in section.model_fields:
            raise ConfigError(
                f"{origin}: there is no '{key}' in a recipe; {nearest_path(Recipe, key)}"
            )
    return path


def list_options(options: Mapping[str, Any], origins: Mapping[str, str]) -> Iterator[Entry]:
    for key, value in options.items():
        if value is not None:
            path = tuple(key.split("."))
            value = [{"candidates": [{"name": value}]}] if path == METHOD else value
            yield path, value, origins.get(key, f"option {key}")


def _refuse_discarded(given: list[Entry], named: list[Entry]) -> None:
    """Raise ConfigError for a `--set` that another one behind it, or a named option, contradicts.

    Setting the same key again is no such case: the last one counts, as on every command line.
    """
    for number, entry in enumerate(given):
        path, _, origin = entry
        for other, _, behind in given[number + 1 :]:
            if len(other) < len(path) and path[: len(other)] == other:
                raise ConfigError(f"{behind}: discards {origin}; give it before, or leave one out")
        for option, _, name in named:
            if option == METHOD:
                contradicted = ENGINE[: len(path)] == path
            else:
                rivals = filter(None, (option, _RIVALS.get(option)))
                contradicted = any(_sets(entry, rival) for rival in rivals)
            if contradicted:
                raise ConfigError(
                    f"{origin}: {name} sets {dotted(option)} too; leave one of the two out"
                )


def _sets(entry: Entry, key: Keys) -> bool:
    """Whether a setting gives a value to a key: by its path, or inside its value."""
    path, value, _ = entry
    if path[: len(key)] == key:
        return True
    if key[: len(path)] != path:
        return False
    for name in key[len(path) :]:
        value = _item(value, name)
    return value is not None


def _apply_layer(data: dict[str, Any], origins: dict[Keys, str], layer: list[Entry]) -> None:
    for path, value, _ in layer:
        if path in _RIVALS and value is not None:
            section, rival = _RIVALS[path]
            if isinstance(data.get(str(section)), dict):
                data[str(section)].pop(rival, None)
    for path, value, origin in layer:
        _set_value(data, path, value, origin)
        for replaced in [known for known in origins if known[: len(path)] == path]:
            del origins[replaced]
        origins[path] = origin


def _set_value(data: Any, path: Keys, value: Any, origin: str) -> None:
    """Set one value in place, filling in the default of whatever list or section leads to it."""
    default: Any = Recipe().model_dump(mode="json")
    key: Any  # of a mapping, or the number of an item
    for depth, key in enumerate(path):
        above = ".".join(map(str, path[:depth])) or "the recipe"
        if isinstance(data, list) and not (isinstance(key, int) and key < len(data)):
            raise ConfigError(
                f"{origin}: {above} is a list; name one of its items by a number from 0 to "
                f"{len(data) - 1}"
            )
        if not isinstance(data, dict | list) or (isinstance(data, dict) and isinstance(key, int)):
            raise ConfigError(f"{origin}: {above} holds no '{key}'")
        default = _item(default, key)
        if depth == len(path) - 1:
            data[key] = value
            return
        if _item(data, key) is None:
            data[key] = {} if default is None or isinstance(default, dict) else default
        data = data[key]


def _item(node: Any, key: str | int) -> Any:
    if isinstance(node, list):
        return node[key] if isinstance(key, int) and key < len(node) else None
    return node.get(key) if isinstance(node, dict) else None
