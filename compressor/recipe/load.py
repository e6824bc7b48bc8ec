"""From YAML to a `Recipe`: defaults < file or preset < `--set a.b=value` < named options; every
message says where.

A size given in a stronger layer takes the place of a size of the other kind (`keep`, `target_size`)
in a weaker one.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from compressor.errors import ConfigError, did_you_mean
from compressor.files.yaml import Keys, dump, parse_document, parse_yaml, read_text
from compressor.recipe.presets import presets
from compressor.recipe.quantities import size_in_bytes
from compressor.recipe.sections import Recipe
from compressor.recipe.training import Section

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
    options: dict[str, Any] | None = None,
) -> Recipe:
    """Read and check a recipe.

    config: preset name, file, or None for the preset `default`; overrides: `a.b=value` with the
    value in YAML, list items by number; options: dotted key to value, None meaning not given,
    `method` meaning one engine for everything. Raises ConfigError: one line with the place, the
    key, and what would be right.
    """
    return assemble(config, [list(map(_override, overrides)), list(_named(options or {}))])


def assemble(config: str | Path | None, layers: Iterable[list[Entry]]) -> Recipe:
    """A preset or file with layers of settings over it, stronger ones last. Raises ConfigError that
    names the place of the setting.
    """
    path = find_recipe(config)
    document = parse_document(read_text(path), str(path))
    if not isinstance(document.value, dict):
        raise ConfigError(
            f"{path}:1: expected a mapping of recipe sections: {', '.join(Recipe.model_fields)}"
        )
    data, origins = document.value, dict(document.places)
    return _laid_over(data, origins, layers)


def changed(recipe: Recipe, settings: dict[str, Any], where: str) -> Recipe:
    """A recipe with other settings, by dotted key. where: what messages name. Raises ConfigError as
    `assemble`.
    """
    layer = [(keys_of(key, where), value, where) for key, value in settings.items()]
    return _laid_over(recipe.model_dump(mode="json"), {(): where}, [layer])


def _laid_over(
    data: dict[str, Any], origins: dict[Keys, str], layers: Iterable[list[Entry]]
) -> Recipe:
    for layer in layers:
        _overlay(data, origins, layer)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, origins)) from None


def _override(text: str) -> Entry:
    """Split `a.b=value`. Raises ConfigError naming the nearest path when a.b does not exist."""
    origin = f"--set {text}"
    dotted, equals, value = text.partition("=")
    if not equals or not value.strip():
        raise ConfigError(f"{origin}: expected path=value, with null for no value")
    return keys_of(dotted.strip(), origin), parse_yaml(value, origin), origin


def keys_of(dotted: str, origin: str) -> Keys:
    """The path that a dotted key means. Raises ConfigError naming the nearest one if a recipe has
    no such path.
    """
    path = tuple(int(key) if key.isdecimal() else key for key in dotted.split("."))
    for depth, key in enumerate(path):
        section = _section(path[:depth])
        if section and isinstance(key, str) and key not in section.model_fields:
            raise ConfigError(
                f"{origin}: there is no '{dotted}' in a recipe; {_nearest_path(dotted)}"
            )
    return path


def _named(options: dict[str, Any]) -> Iterator[Entry]:
    for dotted, value in options.items():
        if value is not None:
            value = [{"candidates": [{"name": value}]}] if dotted == "method" else value
            yield tuple(dotted.split(".")), value, "command line"


def _overlay(data: dict[str, Any], origins: dict[Keys, str], layer: list[Entry]) -> None:
    for path, value, _ in layer:
        if path in _RIVALS and value is not None:
            section, rival = _RIVALS[path]
            if isinstance(data.get(section), dict):
                data[section].pop(rival, None)
    for path, value, origin in layer:
        _put(data, path, value, origin)
        for replaced in [known for known in origins if known[: len(path)] == path]:
            del origins[replaced]
        origins[path] = origin


def _put(data: Any, path: Keys, value: Any, origin: str) -> None:
    """Set one value in place, filling in the default of whatever list or section leads to it."""
    default: Any = Recipe().model_dump(mode="json")
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


def _explain(error: ValidationError, origins: dict[Keys, str]) -> str:
    problems = sorted(
        error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden"
    )
    first, more = problems[0], len(problems) - 1
    path, reason = tuple(first["loc"]), first["msg"].removeprefix("Value error, ")
    named = path or tuple(
        reason.partition(" ")[0].split(".")
    )  # what is wrong between sections begins with the key to change
    where = next(
        origins[named[:depth]] for depth in range(len(named), -1, -1) if named[:depth] in origins
    )
    suffix = f" (and {more} more)" if more else ""
    if first["type"] == "extra_forbidden":
        above = ".".join(map(str, path[:-1])) or "the recipe"
        return f"{where}: unknown key '{path[-1]}' in {above}; {_nearest_key(path)}{suffix}"
    reason = reason.replace("Input should", "should").replace("valid tuple", "list")
    reason = {"model_type": "should be a mapping", "too_short": "must not be empty"}.get(
        first["type"], reason
    )
    shown = repr(first["input"])[:60]
    given = "" if isinstance(first["input"], dict | list) or shown in reason else f", not {shown}"
    quote = (
        "; put it in quotes"
        if first["type"] == "string_type" and isinstance(first["input"], int | float)
        else ""
    )
    what = " ".join(filter(None, (".".join(map(str, path)), reason)))
    return f"{where}: {what}{given}{quote}{suffix}"


def _section(path: Keys) -> type[Section] | None:
    """Return the model of the section at a path, or None where the recipe holds a value or anything
    goes.
    """
    section: type[Section] | None = Recipe
    for key in path:
        if isinstance(key, str):
            section = (
                _model_in(section.model_fields[key].annotation)
                if section and key in section.model_fields
                else None
            )
    return section


def _model_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def _paths(section: type[Section], above: str = "") -> Iterator[str]:
    """Every dotted path of a recipe, the first item standing for each list."""
    for name, field in section.model_fields.items():
        yield above + name
        if inner := _model_in(field.annotation):
            yield from _paths(
                inner, f"{above}{name}." + ("" if field.annotation is inner else "0.")
            )


def _nearest_path(dotted: str) -> str:
    paths = list(_paths(Recipe))
    same_leaf = [path for path in paths if path.split(".")[-1] == dotted.split(".")[-1]]
    return (
        f"did you mean '{same_leaf[0]}'?"
        if len(same_leaf) == 1
        else did_you_mean(dotted, same_leaf or paths)
    )


def _nearest_key(path: Keys) -> str:
    section = _section(path[:-1])
    known = section.model_fields if section else ()
    elsewhere = [other for other in _paths(Recipe) if other.split(".")[-1] == path[-1]]
    return f"did you mean '{elsewhere[0]}'?" if elsewhere else did_you_mean(str(path[-1]), known)
