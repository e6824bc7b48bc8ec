"""Budgets of a recipe in stored bits or parameters."""

from compressor.allocation.assign import Assignment
from compressor.errors import ConfigError
from compressor.models.linears import selects
from compressor.recipe.quantities import size_in_bytes
from compressor.recipe.sections import Recipe


def budgets(
    recipe: Recipe, assignments: dict[str, Assignment], whole: dict[str, int], other_bytes: int
) -> list[tuple[list[str], float]]:
    """Linears that share a budget, and the fraction of their dense cost it is. `whole`: dense cost
    of each linear.

    other_bytes: what the checkpoint holds besides the targets, for `target_size`. Raises
    ConfigError for linears without a fraction.
    """
    names, keep = list(assignments), recipe.allocation.keep
    if recipe.allocation.target_size is not None:
        left = 8 * (size_in_bytes(recipe.allocation.target_size) - other_bytes)
        if recipe.allocation.count != "bits":
            raise ConfigError(
                "allocation.target_size counts bytes; set allocation.count to bits, or give keep"
            )
        if left <= 0:
            raise ConfigError(
                f"allocation.target_size {recipe.allocation.target_size} is less than what is not "
                f"targeted ({other_bytes:,} bytes); "
                "raise it or target more linears"
            )
        return [(names, min(1.0, left / sum(whole.values())))]
    if recipe.allocation.kind == "fixed":
        return [(names, 1.0)]
    if not isinstance(keep, dict):
        return [(names, keep)]
    groups: dict[str, list[str]] = {pattern: [] for pattern in keep}
    for name in names:
        pattern = next(
            (pattern for pattern in keep if selects(pattern, assignments[name].info)), None
        )
        if pattern is None:
            raise ConfigError(f"allocation.keep has no entry for {name}; add a last entry '*'")
        groups[pattern].append(name)
    if empty := [pattern for pattern, members in groups.items() if not members]:
        raise ConfigError(
            f"allocation.keep: '{empty[0]}' selects no target that an earlier entry has not taken"
        )
    return [(members, keep[pattern]) for pattern, members in groups.items()]


def reserved(
    recipe: Recipe,
    assignments: dict[str, Assignment],
    whole: dict[str, int],
    shares: list[tuple[list[str], float]],
) -> list[tuple[list[str], float]]:
    """Budgets less what residuals take of them. Raises ConfigError where nothing is left."""
    section, left = recipe.compensation, []
    for names, keep in shares:
        taken = section.keep or 0.0
        if section.rank is not None:
            unit = {
                name: 8 * assignments[name].dtype.itemsize
                if recipe.allocation.count == "bits"
                else 1
                for name in names
            }
            sides = {
                name: assignments[name].info.out_features + assignments[name].info.in_features
                for name in names
            }
            taken = (
                section.rank
                * sum(unit[name] * sides[name] for name in names)
                / sum(whole[name] for name in names)
            )
        if taken >= keep:
            raise ConfigError(
                f"compensation takes {taken:.3g} of the size and leaves nothing of the {keep:.3g} "
                "that is kept; lower it"
            )
        left.append((names, keep - taken))
    return left
