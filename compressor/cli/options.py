"""Options that several verbs of the command line share, and the fields of the recipe that they
set.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

if TYPE_CHECKING:
    from compressor.recipe.sections import Recipe

RECIPE, DANGER, OUTPUT, LIMITS = "Recipe", "Dangerous", "Output", "Limits"

MAX_HELP = (
    "Largest score (perplexity, kl, bytes, task.metric), or multiple of the baseline's; repeatable."
)
MIN_HELP = "Smallest score, or multiple of the baseline's; repeatable."
TOLERANCE_HELP = "Change allowed up or down, so that improvements are named too; repeatable."

MODEL = Annotated[
    str,
    Argument(
        metavar="MODEL",
        help="Model folder, hub identifier, or 'reference' for the bundled model.",
        show_default=False,
    ),
]
CHECKPOINT = Annotated[
    str, Argument(metavar="CHECKPOINT", help="Folder of a model.", show_default=False)
]
DEVICE = Annotated[str | None, Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:1, …")]
OVERWRITE = Annotated[
    bool, Option("--overwrite", help="Replace the output if it exists.", rich_help_panel=DANGER)
]
RESTART = Annotated[
    bool,
    Option(
        "--restart", help="Discard what a stopped run left, and start anew.", rich_help_panel=DANGER
    ),
]

PUSH_TO = Annotated[
    str | None,
    Option(
        metavar="REPOSITORY",
        help="Upload the finished checkpoint to the hub, privately.",
        rich_help_panel=OUTPUT,
    ),
]
PUBLIC = Annotated[
    bool, Option("--public", help="With --push-to: for everybody to see.", rich_help_panel=DANGER)
]

# Option → dotted field of the recipe (None: handled by `read_recipe` itself) and its declaration.
RECIPE_OPTIONS: dict[str, tuple[str | None, Any]] = {
    "model": ("model.name", MODEL),
    "config": (
        None,
        Annotated[
            str | None,
            Option(
                "--config",
                "-c",
                metavar="NAME|FILE",
                help="Preset or YAML file; 'default' if left out.",
                rich_help_panel=RECIPE,
            ),
        ],
    ),
    "method": (
        "method",
        Annotated[
            str | None,
            Option(
                metavar="NAME",
                help="One engine for every target, see `compressor methods`.",
                rich_help_panel=RECIPE,
            ),
        ],
    ),
    "keep": (
        "allocation.keep",
        Annotated[
            float | None,
            Option(
                metavar="FRACTION",
                help="Fraction kept of the size of the targets.",
                rich_help_panel=RECIPE,
            ),
        ],
    ),
    "target_size": (
        "allocation.target_size",
        Annotated[
            str | None,
            Option(
                metavar="SIZE",
                help="Size of the whole checkpoint, e.g. 3.2GiB.",
                rich_help_panel=RECIPE,
            ),
        ],
    ),
    "calibration": (
        "calibration.source",
        Annotated[
            str | None,
            Option(
                metavar="SOURCE",
                help="Text to calibrate on: file, folder, org/name:config:split[:column], "
                "file.safetensors:key, or 'self'.",
                rich_help_panel=RECIPE,
            ),
        ],
    ),
    "text": (
        "evaluation.source",
        Annotated[
            str | None,
            Option(
                metavar="SOURCE",
                help="Text to evaluate on, as for calibration.",
                rich_help_panel=RECIPE,
            ),
        ],
    ),
    "window": (
        "evaluation.window",
        Annotated[
            int | None,
            Option(
                metavar="N",
                help="Tokens in an evaluation window; windows do not overlap.",
                rich_help_panel=RECIPE,
            ),
        ],
    ),
    "overrides": (
        None,
        Annotated[
            list[str] | None,
            Option(
                "--set",
                metavar="A.B=VALUE",
                help="Any field of the recipe; repeatable.",
                rich_help_panel=RECIPE,
            ),
        ],
    ),
    "seed": (
        "seed",
        Annotated[
            int | None,
            Option(metavar="N", help="Seed of everything random.", rich_help_panel=RECIPE),
        ],
    ),
    "dtype": (
        "output.dtype",
        Annotated[
            str | None,
            Option(
                metavar="TYPE",
                help="Stored numbers: auto, float32, bfloat16, float16.",
                rich_help_panel=RECIPE,
            ),
        ],
    ),
    "budget": (
        "budget",
        Annotated[
            str | None,
            Option(
                metavar="TIME",
                help="Time for a run that searches or trains, e.g. 10m.",
                rich_help_panel=RECIPE,
            ),
        ],
    ),
    "device": ("model.device", DEVICE),
    "overwrite": ("output.overwrite", OVERWRITE),
}

# Flag of every verb → its default and its declaration.
FLAGS: dict[str, tuple[Any, Any]] = {
    "as_json": (
        False,
        Annotated[
            bool,
            Option(
                "--json", help="Print one JSON object instead of tables.", rich_help_panel=OUTPUT
            ),
        ],
    ),
    "verbose": (
        False,
        Annotated[
            bool,
            Option(
                "--verbose", "-v", help="Tell more, and show tracebacks.", rich_help_panel=OUTPUT
            ),
        ],
    ),
    "quiet": (
        False,
        Annotated[
            bool,
            Option("--quiet", "-q", help="No progress and no warnings.", rich_help_panel=OUTPUT),
        ],
    ),
    "log_file": (
        None,
        Annotated[
            Path | None,
            Option(
                metavar="FILE",
                help="Append stages, warnings and errors to a text file.",
                rich_help_panel=OUTPUT,
            ),
        ],
    ),
    "events": (
        None,
        Annotated[
            Path | None,
            Option(
                metavar="FILE",
                help="Append progress, warnings and the result as lines of JSON.",
                rich_help_panel=OUTPUT,
            ),
        ],
    ),
}


# Verb → options of a recipe that it does not use, and so does not have.
LEFT_OUT = {"calibrate": ("keep", "target_size", "text", "window", "dtype", "budget")}


def recipe_options(name: str) -> dict[str, tuple[str | None, Any]]:
    """Return the options that make up the recipe of a verb."""
    left_out = LEFT_OUT.get(name, ())
    return {option: entry for option, entry in RECIPE_OPTIONS.items() if option not in left_out}


def read_recipe(verb: str, arguments: dict[str, Any]) -> "Recipe":
    """Resolve the recipe that the options of a verb describe, taking them out of `arguments`. A
    flag left out says nothing.

    Raises:
        ConfigError: also for an option or a `--set` that this run would ignore.
    """
    from compressor.recipe.load import list_options, load_recipe, parse_override
    from compressor.recipe.usage import refuse_unused

    declared = recipe_options(verb)
    given = {name: arguments.pop(name) for name in declared}
    keys = {name: key for name, (key, _) in declared.items() if key}
    named = {key: given[name] for name, key in keys.items() if given[name] is not False}
    origins = {
        key: "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
        for name, key in keys.items()
    }
    overrides = given["overrides"] or ()
    recipe = load_recipe(given["config"], overrides, named, origins)
    settings = [*map(parse_override, overrides), *list_options(named, origins)]
    refuse_unused(recipe, settings, unused_settings(verb, recipe, arguments))
    return recipe


def unused_settings(verb: str, recipe: "Recipe", arguments: Mapping[str, Any]) -> dict[str, str]:
    """Return the keys of a recipe that a verb does not use, given its other arguments, and why."""
    from compressor.recipe.usage import ALLOCATING

    if verb == "calibrate":
        sections = ("repair", "heal", "evaluation", "budget", "output.dtype", "output.shard_size")
        sizes = ("allocation.keep", "allocation.target_size")
        return dict.fromkeys((*sections, *sizes), "statistics do not depend on it")
    if arguments.get("plan"):
        keys = (*ALLOCATING, *(() if recipe.trains else ("budget",)))
        return dict.fromkeys(keys, "--plan is built as it stands, nothing is allocated")
    return {}
