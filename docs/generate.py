"""Write the reference pages that the code knows: command line, recipe, presets, options, API.

As a hook of mkdocs (`hooks` in mkdocs.yml) it adds them to the site at every build, so they cannot
be stale. For other builders `python docs/generate.py FOLDER` writes the same pages as Markdown.
"""

import ast
import inspect
import io
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
API = ("compress", "evaluate", "load")
PLAIN = ("calibrate", "plan", "inspect", "verify", "export")


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the files of a mkdocs build."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def pages() -> dict[str, str]:
    """Return the text of every generated page by its path under docs/."""
    return {
        "reference/cli.md": cli_page(),
        "reference/recipe.md": recipe_page(),
        "reference/presets.md": presets_page(),
        "reference/method-options.md": methods_page(),
        "reference/python-api.md": api_page(),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
    }


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table; bars inside cells are escaped."""
    lines = [list(headings), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return (
        "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
            for line in lines
        )
        + "\n"
    )


# Command line


def cli_page() -> str:
    """Return a section for each command: what it does, its arguments and options."""
    import typer

    from compressor.cli.app import app

    program = typer.main.get_command(app)
    lines = ["# Command line", "", f"{program.help}", "", f"{program.epilog}", ""]
    commands = list(flatten(program.commands, "compressor"))
    shared = shared_options([command for _, command in commands if command.params])
    lines += ["Every command takes these options besides its own:", "", option_table(shared), ""]
    for name, command in commands:
        own = [
            option for option in command.params if option.name not in {each.name for each in shared}
        ]
        arguments = [option for option in own if not option.opts[0].startswith("-")]
        usage = " ".join(
            [
                name,
                *(option.metavar or option.name.upper() for option in arguments),
                *(["[OPTIONS]"] if len(own) > len(arguments) else []),
            ]
        )
        lines += [
            f"## {name.removeprefix('compressor ')}",
            "",
            f"{command.help}",
            "",
            f"    {usage}",
            "",
        ]
        if arguments:
            rows = [(f"`{metavar(option)}`", option.help or "") for option in arguments]
            lines += [table(("Argument", "Meaning"), rows), ""]
        if options := [option for option in own if option not in arguments]:
            lines += [option_table(options), ""]
    return "\n".join(lines)


def flatten(commands: dict[str, Any], above: str) -> Iterator[tuple[str, Any]]:
    for name, command in commands.items():
        if inner := getattr(command, "commands", None):
            yield from flatten(inner, f"{above} {name}")
        else:
            yield f"{above} {name}", command


def shared_options(commands: list[Any]) -> list[Any]:
    """Return the options that every command with options has, in the order of the first."""
    names = set.intersection(*({option.name for option in command.params} for command in commands))
    return [option for option in commands[0].params if option.name in names]


def option_table(options: Iterable[Any]) -> str:
    """Return a table of options; a column of defaults only where there are any."""
    rows = []
    for option in options:
        flag = getattr(option, "is_flag", False)
        value = "" if flag else f" {metavar(option)}"
        unset = flag or option.default in (None, [], ()) or callable(option.default)
        default = "required" if option.required else "" if unset else f"`{option.default}`"
        rows.append(("`" + ", ".join(option.opts) + value + "`", option.help or "", default))
    if any(default for _, _, default in rows):
        return table(("Option", "Meaning", "Default"), rows)
    return table(("Option", "Meaning"), (row[:2] for row in rows))


def metavar(parameter: Any) -> str:
    """Return what stands for a value; a bar would end the cell of a table."""
    return (parameter.metavar or parameter.name.upper()).replace("|", " or ")


# Recipe


def recipe_page() -> str:
    """Return a table for each section of a recipe, from the docstrings under its fields."""
    from compressor.recipe.load import schema

    data = schema()
    definitions = data["$defs"]
    lines = [
        "# Recipe",
        "",
        "A recipe is a YAML file. Sections and fields that are left out have their defaults; an",
        "unknown key is an error that names the nearest valid one. `--set a.b=value` sets any",
        "field, list items by number: `--set method.0.candidates.0.options.bits=[3]`. Strength:",
        "defaults < file or preset < `--set` < named option such as `--keep`.",
        "`compressor schema` prints the JSON Schema.",
        "",
        "## The recipe itself",
        "",
        field_table(
            {name: field for name, field in data["properties"].items() if not target(field)},
            definitions,
        ),
    ]
    seen: set[str] = set()
    for name, field in data["properties"].items():
        if target(field):
            lines += section(name, target(field), definitions, seen)
    return "\n".join(lines)


def section(path: str, name: str, definitions: dict[str, Any], seen: set[str]) -> list[str]:
    """Return the lines of a section and those below it; `path` is how its fields are set."""
    if name in seen:
        return []
    seen.add(name)
    model = definitions[name]
    lines = [
        "",
        f"## {path}",
        "",
        model.get("description", ""),
        "",
        field_table(model["properties"], definitions),
    ]
    for key, field in model["properties"].items():
        if inner := target(field):
            lines += section(f"{path}.{key}", inner, definitions, seen)
    return lines


def target(field: dict[str, Any]) -> str | None:
    """Return the section that a field holds, or a list of which it holds; None for a value."""
    for schema in (field, field.get("items", {}), *field.get("allOf", ()), *field.get("anyOf", ())):
        if "$ref" in schema:
            return schema["$ref"].rpartition("/")[2]
    return None


def field_table(properties: dict[str, Any], definitions: dict[str, Any]) -> str:
    rows = []
    for name, field in properties.items():
        inner = target(field)
        described = field.get("description") or (
            definitions[inner].get("description", "") if inner else ""
        )
        default = (
            "" if inner else f"`{shown(field['default'])}`" if "default" in field else "required"
        )
        rows.append((f"`{name}`", kind(field), default, " ".join(described.split())))
    return table(("Field", "Value", "Default", "Meaning"), rows)


def kind(field: dict[str, Any]) -> str:
    """Return the values that a field takes, in words."""
    if inner := target(field):
        return ("list of sections" if field.get("type") == "array" else "section") + f" `{inner}`"
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(kind(choice) for choice in field["anyOf"]))
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    name = field.get("type", "value")
    if name == "array":
        inner_kind = kind(field.get("items", {}))
        return "list of " + {
            "string": "strings",
            "number": "numbers",
            "integer": "integers",
            "object": "maps",
        }.get(inner_kind, inner_kind)
    if name == "object":
        return "map"
    bounds = [f"{sign} {shown(field[key])}" for key, sign in BOUNDS.items() if key in field]
    return " ".join([{"boolean": "true or false"}.get(name, name), ", ".join(bounds)]).strip()


BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def shown(value: Any) -> str:
    """Return a value as YAML writes it on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


# Presets and methods


def presets_page() -> str:
    """Return every preset: its header, with paper and deviations, and what it sets."""
    from compressor.files.yaml import read_text
    from compressor.recipe.presets import preset_titles, presets

    files, titles = presets(), preset_titles()
    lines = [
        "# Presets",
        "",
        f"{len(files)} recipes with a name: `--config NAME`. `compressor presets NAME` prints one",
        "with all its defaults. [Choose a preset](../guides/choose-a-preset.md) helps to choose.",
        "",
        table(
            ("Preset", "In one line"),
            ((f"[`{name}`](#{name})", title) for name, title in titles.items()),
        ),
    ]
    for name, path in files.items():
        header, body = split_header(read_text(path))
        lines += ["", f"## {name}", "", *header, "", "```yaml", body, "```"]
    return "\n".join(lines) + "\n"


def split_header(text: str) -> tuple[list[str], str]:
    """Return the comment at the head of a preset as Markdown, and the YAML below it."""
    lines = text.splitlines()
    count = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    comments = [line.removeprefix("#").removeprefix(" ") for line in lines[:count]]
    header = [f"**{comments[0]}**", ""]
    for line in comments[1:]:
        if line.startswith("Deviations"):
            header += ["", line.replace("Deviations", "Deviations from the paper", 1), ""]
        elif not line.startswith(("- ", "  ")) and header[-1].startswith(("- ", "  ")):
            header += ["", line]
        else:
            header.append(line)
    return header, "\n".join(lines[count:]).strip()


SHARED_OPTIONS = {  # meanings of options whose values speak for themselves in the source
    "metric": "what counts as an error of the weight",
    "solver": "how the problem is solved",
    "score": "which units leave first",
    "storage": "form in which factors are stored",
    "pattern": "where kept entries may lie",
    "refit": "how the linear that reads removed channels makes up for them",
    "start": "first dictionary",
    "rounds": "alternations, at most",
    "iterations": "steps, at most",
    "refine_rate": "learning rate of the refinement",
}


def methods_page() -> str:
    """Return a table of options for each method."""
    from compressor.methods import METHODS

    lines = [
        "# Method options",
        "",
        "What `name` and `options` of a candidate may be; `compressor methods` prints the same.",
        "The pages under [Methods](../methods/index.md) have the equations.",
    ]
    for name, method in sorted(METHODS.items()):
        notes = comments_on_fields(method)
        rows = [
            (
                f"`{field.name}`",
                annotation(field.type),
                f"`{shown(field.default)}`",
                notes.get(field.name) or SHARED_OPTIONS[field.name],
            )
            for field in fields(method)
        ]
        about = inspect.cleandoc(method.__doc__ or "").partition("\n")[0]
        lines += ["", f"## {name}", "", about, "", f"Source: {method.paper}.", ""]
        lines.append(
            table(("Option", "Value", "Default", "Meaning"), rows)
            if rows
            else "It has no options.\n"
        )
    return "\n".join(lines)


def comments_on_fields(method: type) -> dict[str, str]:
    """Return what the source says of each field: comments above or behind it, or a docstring."""
    notes: dict[str, str] = {}
    for owner in reversed(method.__mro__):
        if not owner.__module__.startswith("compressor."):
            continue
        source = textwrap.dedent(inspect.getsource(owner))
        comments = comments_by_line(source)
        body = ast.parse(source).body[0].body
        for node, below in zip(body, [*body[1:], None], strict=True):
            if not isinstance(node, ast.AnnAssign):
                continue
            first = node.lineno
            while first - 1 in comments and source.splitlines()[first - 2].lstrip().startswith("#"):
                first -= 1
            lines = range(first, node.end_lineno + 1)
            note = " ".join(comments[line] for line in lines if line in comments)
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                note = " ".join(str(below.value.value).split())
            if note:
                notes[node.target.id] = note
    return notes


def comments_by_line(source: str) -> dict[int, str]:
    """Return line number → comment on that line."""
    return {
        token.start[0]: token.string.removeprefix("#").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }


def annotation(hint: Any) -> str:
    """Return a type annotation in words, with the bounds that pydantic checks."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        bounds = [
            text
            for extra in hint.__metadata__
            for item in getattr(extra, "metadata", ())
            if (text := bound(item))
        ]
        return " ".join([annotation(inner[0]), ", ".join(bounds)]).strip()
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(annotation(choice) for choice in inner))
    if origin is tuple:
        return f"list of {annotation(inner[0])}"
    if hint is type(None):
        return "null"
    return {bool: "true or false", int: "integer", float: "number", str: "string"}.get(
        hint, str(hint)
    )


def bound(item: Any) -> str:
    """Return one constraint of annotated_types as a sign and a number; empty for others."""
    for key, sign in {
        "ge": "≥",
        "gt": ">",
        "le": "≤",
        "lt": "<",
        "multiple_of": "multiple of",
    }.items():
        if getattr(item, key, None) is not None:
            return f"{sign} {shown(getattr(item, key))}"
    return ""


# Python API


def api_page() -> str:
    """Return directives of mkdocstrings for the public names, wherever they are defined."""
    import compressor
    from compressor.pipeline import run

    lines = [
        "# Python API",
        "",
        "`import compressor` imports nothing heavy; torch comes with the first use of a name.",
        "The names of the first section are the stable ones. `import compressor.hf` registers the",
        "checkpoint format with transformers.",
        "",
        "```python",
        "from compressor import compress, evaluate, load",
        "from compressor.config import load_recipe",
        "```",
        "",
        "## Stable names",
        "",
        *(directive(getattr(compressor, name)) for name in API),
        "::: compressor.recipe.load.load_recipe",
        "",
        "## Other steps",
        "",
        "The same functions that the commands of these names call, from `compressor.pipeline.run`.",
        "",
        *(directive(getattr(run, name)) for name in PLAIN),
        "## Errors",
        "",
        "::: compressor.errors",
        "    options: {show_root_heading: false, members: false}",
        "",
    ]
    return "\n".join(lines)


def directive(function: Any) -> str:
    return f"::: {function.__module__}.{function.__qualname__}\n"


def main(folder: Path) -> None:
    for path, text in pages().items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
