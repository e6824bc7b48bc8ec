"""The verbs that list what there is: engines, recipes, the fields of a recipe."""

from typing import Annotated

from typer import Argument

from compressor.cli.command import Outcome


def methods() -> Outcome:
    """List the decompositions, with their papers and options."""
    from dataclasses import fields

    from compressor.methods import METHODS

    records = [
        {
            "name": name,
            "about": (method.__doc__ or "").partition("\n")[0],
            "paper": method.paper,
            "options": {field.name: field.default for field in fields(method)},
        }
        for name, method in sorted(METHODS.items())
    ]
    return Outcome({"methods": records})


def presets(
    name: Annotated[
        str | None,
        Argument(
            metavar="NAME", help="Print this recipe with all its defaults.", show_default=False
        ),
    ] = None,
) -> Outcome:
    """List the published recipes that `--config` knows by name."""
    from compressor.recipe.load import dump_yaml, load_recipe
    from compressor.recipe.presets import preset_titles

    if name is None:
        return Outcome(
            {"presets": [{"name": name, "title": title} for name, title in preset_titles().items()]}
        )
    recipe = load_recipe(name)
    return Outcome(recipe.model_dump(mode="json"), dump_yaml(recipe))


def schema() -> Outcome:
    """Print the JSON Schema of a recipe."""
    import json

    from compressor.recipe.load import schema as recipe_schema

    found = recipe_schema()
    return Outcome(found, json.dumps(found, indent=2))
