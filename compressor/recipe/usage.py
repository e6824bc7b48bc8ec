"""Which settings of a recipe take effect: what is asked for on the command line and would be
ignored is refused.

A file may spell out more than a run needs (the recipe of every output does); an option or a `--set`
that changes nothing is a mistake of whoever typed it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from compressor.errors import ConfigError
from compressor.recipe.load import Entry
from compressor.recipe.sections import Recipe
from compressor.recipe.validation import dotted

# What a plan that is built as it stands has settled.
ALLOCATING = (
    *("allocation.kind", "allocation.keep", "allocation.damage", "allocation.cap"),
    *("allocation.depth_bias", "allocation.roles", "allocation.limits", "allocation.shift"),
    *("allocation.probe", "allocation.search"),
)


@dataclass(frozen=True)
class Condition:
    """Settings that take effect only under a condition."""

    keys: tuple[str, ...]
    holds: Callable[[Recipe], bool]
    cure: str


def _is_knapsack(recipe: Recipe) -> bool:
    return recipe.allocation.kind == "knapsack"


def _is_probed(recipe: Recipe) -> bool:
    return recipe.allocation.probes


def _is_estimated(recipe: Recipe) -> bool:
    return _is_probed(recipe) and recipe.allocation.damage == "fisher_probe"


CONDITIONS = (
    Condition(("repair",), lambda recipe: recipe.repair.enabled, "needs repair.enabled=true"),
    Condition(("heal",), lambda recipe: recipe.heal.enabled, "needs heal.enabled=true"),
    Condition(
        ("evaluation",), lambda recipe: recipe.evaluation.enabled, "needs evaluation.enabled=true"
    ),
    Condition(
        ("evaluation.limit",),
        lambda recipe: bool(recipe.evaluation.tasks),
        "needs evaluation.tasks",
    ),
    Condition(
        ("calibration.anchor", "calibration.anchor_damping"),
        lambda recipe: recipe.calibration.sequential or recipe.repair.enabled,
        "needs calibration.sequential=true",
    ),
    Condition(
        ("compensation.metric",),
        lambda recipe: recipe.compensation.enabled,
        "needs compensation.keep or compensation.rank",
    ),
    Condition(
        ("allocation.damage", "allocation.cap"), _is_knapsack, "needs allocation.kind=knapsack"
    ),
    Condition(
        ("allocation.probe", "allocation.depth_bias"),
        _is_probed,
        "needs allocation.kind=knapsack and allocation.damage=fisher_probe or kl_probe",
    ),
    Condition(
        ("allocation.probe.samples", "allocation.probe.span", "allocation.probe.checks"),
        _is_estimated,
        "needs allocation.damage=fisher_probe",
    ),
    Condition(
        ("allocation.roles",),
        lambda recipe: recipe.allocation.kind == "by_role",
        "needs allocation.kind=by_role",
    ),
    Condition(
        ("allocation.shift",),
        lambda recipe: recipe.allocation.kind == "d_rank",
        "needs allocation.kind=d_rank",
    ),
    Condition(("heal.rank",), lambda recipe: recipe.heal.train == "lora", "needs heal.train=lora"),
    Condition(
        ("heal.top",), lambda recipe: recipe.heal.teacher == "cached", "needs heal.teacher=cached"
    ),
    Condition(
        ("model.device",),
        lambda recipe: recipe.model.device_map is None,
        "does nothing beside model.device_map; leave one of the two out",
    ),
)


def refuse_unused(recipe: Recipe, given: Iterable[Entry], unused: dict[str, str]) -> None:
    """Raise ConfigError for a setting that takes no effect.

    Args:
        recipe: what all settings together came to.
        given: the settings of the command line. A section that these switch off (`heal.enabled`)
            may have other settings beside its switch.
        unused: key or section → why this run uses none of it.
    """
    settings = [(key, origin) for entry in given for key, origin in _keys(entry)]
    switched = {key.removesuffix(".enabled") for key, _ in settings if key.endswith(".enabled")}
    for key, origin in settings:
        for prefix, reason in unused.items():
            if _is_below(key, prefix):
                raise ConfigError(f"{origin}: {reason}; leave it out")
        for condition in CONDITIONS:
            about = next((prefix for prefix in condition.keys if _is_below(key, prefix)), None)
            if about is not None and about not in switched and not condition.holds(recipe):
                raise ConfigError(f"{origin}: {key} {condition.cure}")


def _keys(entry: Entry) -> Iterator[tuple[str, str]]:
    """List the dotted keys that a setting gives values to, with its origin."""
    path, value, origin = entry

    def walk(key: str, value: Any) -> Iterator[str]:
        if isinstance(value, dict) and value and key in Recipe.model_fields:
            for name, item in value.items():
                yield from walk(f"{key}.{name}", item)
        else:
            yield key

    yield from ((key, origin) for key in walk(dotted(path), value))


def _is_below(key: str, prefix: str) -> bool:
    return key == prefix or key.startswith(f"{prefix}.")
