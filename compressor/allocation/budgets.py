"""Budgets of a recipe in stored bits or parameters."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compressor.allocation.assign import Assignment
from compressor.errors import ConfigError
from compressor.models.linears import selects
from compressor.recipe.quantities import size_in_bytes
from compressor.recipe.sections import Recipe

ROUNDING = 1e-6  # keeps a product that is a whole number from falling just below it


@dataclass(frozen=True)
class Budget:
    """What some linears may take together, as a fraction of their dense size."""

    count: str  # "bits", "parameters" or "multiply_adds": attributes of whatever has a size
    keep: float

    def size(self, sized: Any) -> int:
        """Return the size of an assignment, a dense linear or a candidate."""
        return getattr(sized, self.count)

    def share(self, whole: int) -> int:
        """Return the fraction of a size, in whole units."""
        return int(self.keep * whole + ROUNDING)

    def of(self, linears: Iterable[Any]) -> int:
        """Return what linears may take together."""
        return self.share(sum(map(self.size, linears)))


Shares = Sequence[tuple[list[str], Budget]]  # names of linears, and what they may take together


def divide(recipe: Recipe, assignments: Mapping[str, Assignment], other_bytes: int) -> Shares:
    """Return which linears share a budget, and how large it is, residuals included.

    Args:
        recipe: its allocation says what is kept.
        assignments: all targets.
        other_bytes: what the checkpoint holds besides the targets, for `target_size`.

    Raises:
        ConfigError: for linears without a fraction, or a target size that cannot be.
    """
    section, names = recipe.allocation, list(assignments)
    if section.target_size is not None:
        left = 8 * (size_in_bytes(section.target_size) - other_bytes)
        if section.count != "bits":
            raise ConfigError(
                "allocation.target_size counts bytes; set allocation.count to bits, or give keep"
            )
        if left <= 0:
            raise ConfigError(
                f"allocation.target_size {section.target_size} is less than what is not "
                f"targeted ({other_bytes:,} bytes); "
                "raise it or target more linears"
            )
        whole = sum(assignment.bits for assignment in assignments.values())
        return [(names, Budget("bits", min(1.0, left / whole)))]
    keep = section.keep
    if not isinstance(keep, dict):
        return [(names, Budget(section.count, 1.0 if keep is None else keep))]
    selected: dict[str, list[str]] = {pattern: [] for pattern in keep}
    for name in names:
        info = assignments[name].info
        pattern = next((pattern for pattern in keep if selects(pattern, info)), None)
        if pattern is None:
            raise ConfigError(f"allocation.keep has no entry for {name}; add a last entry '*'")
        selected[pattern].append(name)
    if empty := [pattern for pattern, members in selected.items() if not members]:
        raise ConfigError(
            f"allocation.keep: '{empty[0]}' selects no target that an earlier entry has not taken"
        )
    return [
        (members, Budget(section.count, keep[pattern])) for pattern, members in selected.items()
    ]


def reserve_residuals(
    recipe: Recipe, assignments: Mapping[str, Assignment], shares: Shares
) -> Shares:
    """Return budgets less what residuals take of them. Raises ConfigError if nothing is left."""
    section, left = recipe.compensation, []
    for names, budget in shares:
        taken = section.keep or 0.0
        if section.rank is not None:
            linears = [assignments[name] for name in names]
            rank_one = sum(
                (8 * linear.dtype.itemsize if budget.count == "bits" else 1)
                * (linear.info.out_features + linear.info.in_features)
                for linear in linears
            )
            taken = section.rank * rank_one / sum(map(budget.size, linears))
        if taken >= budget.keep:
            raise ConfigError(
                f"compensation takes {taken:.3g} of the size and leaves nothing of the "
                f"{budget.keep:.3g} that is kept; lower it"
            )
        left.append((names, replace(budget, keep=budget.keep - taken)))
    return left
