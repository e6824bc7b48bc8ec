"""Published allocation rules as recipes name them: what each looks at, handed to its plain-number
form in `allocate`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from compressor.allocation import published
from compressor.allocation.assign import Assignment
from compressor.allocation.decompose import Decomposition
from compressor.allocation.knapsack import Row, check_budget
from compressor.allocation.options import Option
from compressor.errors import ConfigError
from compressor.recipe.sections import Recipe


@dataclass(frozen=True)
class Rule:
    """What a published rule looks at."""

    recipe: Recipe
    names: list[str]
    assignments: dict[str, Assignment]
    found: dict[str, list[Decomposition]]
    options: dict[str, list[Option]]
    rows: list[Row]
    keep: float
    budget: int
    tokens: int

    def role(self, name: str) -> str:
        role = (
            self.assignments[name].info.role if name in self.assignments else name
        )  # groups have no role, and weight 1
        if role is None:
            raise ConfigError(
                f"{name}: its role is unknown, and allocation '{self.recipe.allocation.kind}' "
                "goes by roles; use 'knapsack'"
            )
        return role

    def spectrum(self, name: str) -> tuple[float, ...]:
        spectrum = self.found[name][0].curve.spectrum
        if not spectrum:
            raise ConfigError(
                f"{name}: method '{self.found[name][0].method.name}' has no spectrum for "
                "allocation 'd_rank'; use 'low_rank'"
            )
        return spectrum

    def fixed(self) -> list[int]:
        """The one setting on offer; dense where that would not be smaller."""
        for method, curve in (
            (part.method, part.curve) for name in self.names for part in self.found[name]
        ):
            if len(curve.candidates) > 1:
                raise ConfigError(
                    f"{curve.linear}: '{method.name}' offers several sizes, allocation 'fixed' "
                    "takes one; list one in its options"
                )
        return [0] * len(self.rows)

    def uniform(self) -> list[int]:
        check_budget(self.rows, self.budget)
        return published.uniform(self.rows, [self.keep] * len(self.rows))

    def threshold(self) -> list[int]:
        thresholds = []
        for name, row in zip(self.names, self.rows, strict=True):
            own = self.found[name][0].curve.thresholds
            if not own:
                raise ConfigError(
                    f"{name}: method '{self.found[name][0].method.name}' has no threshold; use "
                    "allocation 'knapsack'"
                )
            thresholds.append(own[: len(row.costs)])
        return published.threshold(self.rows, thresholds, self.budget)

    def by_role(self) -> list[int]:
        """LoRAP: linears of the weighted roles share what all of them keep, the others keep that
        fraction each.
        """
        roles, picks = self.recipe.allocation.roles, [0] * len(self.rows)
        parts: tuple[list[int], list[int]] = ([], [])
        for index, name in enumerate(self.names):
            parts[self.role(name) in roles].append(index)
        for weighted, part in enumerate(parts):
            rows = [self.rows[index] for index in part]
            if rows:
                weights = [
                    roles[self.role(self.names[index])] if weighted else 1.0 for index in part
                ]
                budget = int(self.keep * sum(row.whole for row in rows) + 1e-6)
                for index, pick in zip(part, published.by_role(rows, weights, budget), strict=True):
                    picks[index] = pick
        return picks

    def svd_llm_v2(self) -> list[int]:
        picks = self.uniform()
        losses = [
            math.sqrt(
                self.options[name][pick].candidate.error
                * self.found[name][0].curve.energy
                * self.tokens
            )
            for name, pick in zip(self.names, picks, strict=True)
        ]
        return published.svd_llm_v2(
            self.rows, losses, [self.role(name) for name in self.names], self.budget
        )

    def d_rank(self) -> list[int]:
        values = {
            self.assignments[n].info.block: i
            for i, n in enumerate(self.names)
            if self.role(n) == "v"
        }
        donors = [
            values.get(self.assignments[n].info.block) if self.role(n) in ("q", "k") else None
            for n in self.names
        ]
        ranks = [published.effective_rank(self.spectrum(name)) for name in self.names]
        costs = [
            info.in_features + info.out_features
            for info in (self.assignments[n].info for n in self.names)
        ]
        return published.d_rank(
            self.rows, ranks, costs, donors, self.recipe.allocation.shift, self.budget
        )


RULES: dict[str, Callable[[Rule], list[int]]] = {
    "fixed": Rule.fixed,
    "uniform": Rule.uniform,
    "threshold": Rule.threshold,
    "by_role": Rule.by_role,
    "svd_llm_v2": Rule.svd_llm_v2,
    "d_rank": Rule.d_rank,
}
