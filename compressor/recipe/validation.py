"""One translator from what pydantic refuses to one line with its place, its key and a cure."""

from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError

from compressor.errors import did_you_mean
from compressor.files.yaml import Keys
from compressor.recipe.training import Section

# Reasons of pydantic that are said in other words, by their type.
_REASONS = {
    "model_type": "should be a mapping",
    "dict_type": "should be a mapping",
    "too_short": "must not be empty",
    "missing": "is missing",
}


def explain(
    error: ValidationError, root: type[Section], places: Mapping[Keys, str], document: str
) -> str:
    """Explain the first problem of a document in one line that begins with its place.

    Args:
        error: what pydantic found, unknown keys being the most telling.
        root: the model of the whole document.
        places: path of a key → where it is set; () is there.
        document: how messages call the whole, "the recipe".
    """
    problems = sorted(
        error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden"
    )
    first, more = problems[0], len(problems) - 1
    path: Keys = (*first["loc"], *_key_of(first))
    where = next(
        places[path[:depth]] for depth in range(len(path), -1, -1) if path[:depth] in places
    )
    suffix = f" (and {more} more)" if more else ""
    if first["type"] == "extra_forbidden":
        above = dotted(path[:-1]) or document
        return f"{where}: unknown key '{path[-1]}' in {above}; {_nearest_key(root, path)}{suffix}"
    text = " ".join(filter(None, (dotted(path), _reason_of(first))))
    return f"{where}: {text}{suffix}"


def _key_of(problem: Any) -> Keys:
    """Return the path below the validator's section that `refusal` names, () for other errors."""
    key = problem.get("ctx", {}).get("key") if problem["type"] == "refusal" else None
    return () if key is None else tuple(key.split("."))


def _reason_of(problem: Any) -> str:
    reason = problem["msg"].removeprefix("Value error, ")
    reason = reason.replace("Input should", "should").replace("valid tuple", "list")
    reason = _REASONS.get(problem["type"], reason)
    value, shown = problem["input"], repr(problem["input"])[:60]
    if not isinstance(value, dict | list) and shown not in reason:
        reason += f", not {shown}"
    if problem["type"] == "string_type" and isinstance(value, int | float):
        reason += "; put it in quotes"
    return reason


def dotted(path: Keys) -> str:
    """Write a path as a dotted key, list items by number."""
    return ".".join(map(str, path))


def section_at(root: type[Section], path: Keys) -> type[Section] | None:
    """Return the model at a path; None where the document holds a value, or anything goes."""
    annotation: Any = root
    for key in path:
        section = _as_section(annotation)
        if section is None:
            annotation = _item_annotation(annotation)
        elif key in section.model_fields:
            annotation = section.model_fields[str(key)].annotation
        else:
            return None
    return _as_section(annotation)


def paths(section: type[Section], above: str = "") -> Iterator[str]:
    """List every dotted key of a document, the first item standing for each list."""
    for name, field in section.model_fields.items():
        yield above + name
        inner = _as_section(field.annotation)
        item = _as_section(_item_annotation(field.annotation))
        if inner is not None:
            yield from paths(inner, f"{above}{name}.")
        elif item is not None:
            yield from paths(item, f"{above}{name}.0.")


def nearest_path(root: type[Section], key: str) -> str:
    """Return a sentence that names the dotted key nearest to one that a document lacks."""
    known = list(paths(root))
    same_leaf = [path for path in known if path.split(".")[-1] == key.split(".")[-1]]
    return (
        f"did you mean '{same_leaf[0]}'?"
        if len(same_leaf) == 1
        else did_you_mean(key, same_leaf or known)
    )


def _nearest_key(root: type[Section], path: Keys) -> str:
    section = section_at(root, path[:-1])
    known = section.model_fields if section else ()
    elsewhere = [other for other in paths(root) if other.split(".")[-1] == path[-1]]
    return f"did you mean '{elsewhere[0]}'?" if elsewhere else did_you_mean(str(path[-1]), known)


def _as_section(annotation: Any) -> type[Section] | None:
    """Return the model that an annotation allows, behind `Annotated` and `| None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_as_section, _alternatives(annotation))), None)


def _item_annotation(annotation: Any) -> Any:
    """Return the annotation of the items of a list, or of the values of a mapping; else None."""
    if get_origin(annotation) in (tuple, list):
        return get_args(annotation)[0]
    if get_origin(annotation) is dict:
        return get_args(annotation)[1]
    items = map(_item_annotation, _alternatives(annotation))
    return next((item for item in items if item is not None), None)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Annotated:
        return get_args(annotation)[:1]
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
