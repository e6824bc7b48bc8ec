"""What an allocation chooses among: options of single linears, and bundles of them where linears
share or are tied.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from compressor.allocation.assign import Assignment, Group
from compressor.allocation.decompose import Decomposition
from compressor.errors import ConfigError
from compressor.plan import DENSE, Candidate


@dataclass(frozen=True)
class Option:
    """One way to store one linear, or the linears that one decomposition covers."""

    unit: str  # name of the linear or of the group
    cost: int
    damage: float
    candidate: Candidate
    decomposition: Decomposition | None  # None: dense

    @property
    def scheme(self) -> tuple[str, str]:
        """What tied linears must agree in."""
        return self.candidate.method, json.dumps(self.candidate.setting, sort_keys=True)


Bundle = tuple[Option, ...]  # one entry of a row: an option for every linear that the row decides


def linear_options(
    name: str,
    assignment: Assignment,
    decompositions: Sequence[Decomposition],
    damages: Sequence[Sequence[float]],
    count: str,
) -> list[Option]:
    """List all options of one linear in order of growing cost, `count` being its unit.

    Dense is among them if it may be kept, or if nothing is smaller.
    """
    options = decomposed_options(name, decompositions, damages, count)
    if assignment.keep_dense or not options:
        dense = dense_candidate(assignment)
        options.append(Option(name, getattr(dense, count), 0.0, dense, None))
    return sorted(options, key=lambda option: (option.cost, option.damage))


def dense_candidate(assignment: Assignment) -> Candidate:
    """Return the candidate that leaves a linear as it is."""
    sizes = assignment.bits, assignment.parameters
    return Candidate(DENSE, {}, *sizes, error=0.0, multiply_adds=assignment.multiply_adds)


def decomposed_options(
    unit: str,
    decompositions: Sequence[Decomposition],
    damages: Sequence[Sequence[float]],
    count: str,
) -> list[Option]:
    """List the options of all candidates of some decompositions."""
    return [
        Option(unit, getattr(candidate, count), damage, candidate, decomposition)
        for decomposition, own in zip(decompositions, damages, strict=True)
        for candidate, damage in zip(decomposition.curve.candidates, own, strict=True)
    ]


def cost_of(bundle: Bundle) -> int:
    return sum(option.cost for option in bundle)


def damage_of(bundle: Bundle) -> float:
    return sum(option.damage for option in bundle)


def hull(options: Sequence[Option]) -> list[Option]:
    """Return the lower convex hull of options over cost, each the best at some price."""
    points: list[Option] = []
    for option in sorted(options, key=lambda option: (option.cost, option.damage)):
        if points and option.damage >= points[-1].damage:
            continue
        while len(points) > 1 and slope(points[-2], points[-1]) >= slope(points[-1], option):
            points.pop()
        points.append(option)
    return points


def slope(cheap: Option, dear: Option) -> float:
    """Return the change of damage for a unit of cost, negative."""
    return (dear.damage - cheap.damage) / max(dear.cost - cheap.cost, 1)


def combine(members: Sequence[Sequence[Option]]) -> list[Bundle]:
    """Bundle the independent choices of several linears that some price makes the best.

    They are in order of growing cost.

    Along falling prices one linear after the other moves up its hull, steepest step first: the hull
    of the sum is the merged hulls.
    """
    hulls = [hull(options) for options in members]
    steps = sorted(
        (slope(*pair), index, place)
        for index, points in enumerate(hulls)
        for place, pair in enumerate(pairwise(points), 1)
    )
    at = [0] * len(hulls)
    bundles = [tuple(points[0] for points in hulls)]
    for _, index, place in steps:
        at[index] = place
        bundles.append(tuple(points[position] for points, position in zip(hulls, at, strict=True)))
    return bundles


def tie(group: Group, members: Sequence[Sequence[Option]]) -> list[Bundle]:
    """Bundle options of equal method and setting. Raises ConfigError if there are none."""
    tables = [{option.scheme: option for option in options} for options in members]
    bundles = [
        tuple(table[scheme] for table in tables)
        for scheme in tables[0]
        if all(scheme in table for table in tables)
    ]
    if not bundles:
        raise ConfigError(
            f"{group.name}: tied linears offer no equal settings; take them out of allocation.tie"
        )
    return bundles


def leave_out(options: dict[str, list[Option]], methods: set[str]) -> dict[str, list[Option]]:
    """Leave out the options of some methods, dense ones excepted."""
    return {
        unit: [option for option in own if option.candidate.method not in methods]
        for unit, own in options.items()
    }
