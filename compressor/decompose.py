"""Which methods compete for which linear or group of linears, their decompositions, and the modules built from them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from compressor import compensate, linalg
from compressor.errors import ConfigError
from compressor.linears import CompressedLinear, Dense
from compressor.methods import build
from compressor.methods.base import Method
from compressor.model import LinearInfo, dense_of, linears, selects
from compressor.plan import Candidate, Curve
from compressor.recipe import Recipe
from compressor.roles import GROUPS
from compressor.stats import LinearStats

ALWAYS = frozenset({"gram"})  # what the reported error of every linear is measured with


@dataclass(frozen=True)
class Assignment:
    """One targeted linear, the methods that compete for it, and whether keeping it dense competes too."""

    info: LinearInfo
    methods: tuple[Method, ...]
    keep_dense: bool
    dtype: torch.dtype  # of the stored result
    shared: tuple[Method, ...] = ()  # those that decompose the linear together with the others of its group
    residual_needs: frozenset[str] = frozenset()  # fields of the statistics for its residual

    @property
    def needs(self) -> frozenset[str]:
        return (ALWAYS | self.residual_needs).union(*(method.needs for method in self.methods + self.shared))

    @property
    def parameters(self) -> int:
        """Numbers of the dense linear, bias included."""
        return self.info.out_features * self.info.in_features + (0 if self.info.module.bias is None else self.info.out_features)

    @property
    def bits(self) -> int:
        """Bits of the dense linear in the dtype of the result."""
        return self.parameters * self.dtype.itemsize * 8


@dataclass(frozen=True)
class Group:
    """Linears of one block that read the same inputs and have a decision in common."""

    name: str
    members: tuple[str, ...]  # names, in the order of the model
    methods: tuple[Method, ...]  # that decompose all of them together
    tied: bool  # whether apart from these only equal methods and settings are allowed


@dataclass(frozen=True)
class Decomposition:
    """One method's decomposition of one linear, or of several stacked: its curve, and the state that any point of it is built from."""

    method: Method
    state: Any
    curve: Curve
    members: dict[str, int]  # linear → its number of outputs, in the order they are stacked

    def build(self, candidate: Candidate) -> tuple[dict[str, CompressedLinear], float]:
        """Module of every linear for a candidate, as it will be stored, and the error of all in the method's metric."""
        return built(self.method, self.state, candidate.setting, self.members)


def built(method: Method, state: Any, setting: dict[str, Any], members: dict[str, int]) -> tuple[dict[str, CompressedLinear], float]:
    """Module of every linear for a setting, as it will be stored, and the error of all in the method's metric."""
    module = method.compress(state, setting)
    error = method.measure(state, module)
    if len(members) == 1:
        return dict.fromkeys(members, module), error
    return module.split(members), error


def assign(recipe: Recipe, model: torch.nn.Module) -> dict[str, Assignment]:
    """Give each targeted linear to the first entry of the recipe that selects it.

    Raises ConfigError if an entry selects nothing, or if the allocation weighs several methods in units that do not compare.
    """
    entries = [(entry, [build(engine.name, engine.options) for engine in entry.candidates]) for entry in recipe.method]
    assignments = {}
    for name, info in linears(model, [entry.targets for entry, _ in entries]).items():
        entry, methods = next(pair for pair in entries if selects(pair[0].targets, info))
        dtype = info.module.weight.dtype if recipe.output.dtype == "auto" else getattr(torch, recipe.output.dtype)
        together = {index: kind for index, engine in enumerate(entry.candidates) for kind in engine.share if info.role in GROUPS[kind]}
        alone = tuple(method for index, method in enumerate(methods) if index not in together)
        assignments[name] = Assignment(
            info, alone, entry.dense, dtype, tuple(methods[index] for index in together), compensate.needs(recipe.compensation)
        )
    if not assignments:
        raise ConfigError("the targets select no linear of the model; see `compressor plan MODEL`")
    for name, assignment in assignments.items():
        if recipe.allocation.count == "parameters" and any(method.integers for method in assignment.methods):
            raise ConfigError(f"{name}: integers are not counted as parameters; set allocation.count to bits")
        if recipe.compensation.enabled and any(max(getattr(method, "residual", (0,))) for method in assignment.methods):
            raise ConfigError(
                f"{name}: its candidates list residual ranks of their own; leave out compensation, or their option 'residual'"
            )
        if len(assignment.methods + assignment.shared) > 1 and recipe.allocation.kind != "knapsack":
            raise ConfigError(f"{name}: several candidates compete, which needs allocation.kind 'knapsack', not '{recipe.allocation.kind}'")
    return assignments


def groups(recipe: Recipe, assignments: dict[str, Assignment]) -> dict[str, Group]:
    """Groups of targets that share a decomposition or are tied, by name.

    Raises ConfigError for linears that cannot share: other inputs, another entry of the recipe, a method that knows one linear only.
    """
    if recipe.allocation.kind != "knapsack" and (recipe.allocation.tie or recipe.allocation.limits):
        raise ConfigError(f"allocation.tie and allocation.limits needs allocation.kind 'knapsack', not '{recipe.allocation.kind}'")
    kinds = {*recipe.allocation.tie, *(kind for entry in recipe.method for engine in entry.candidates for kind in engine.share)}
    found: dict[str, Group] = {}
    for kind in sorted(kinds):
        sites: dict[tuple[int, str], list[str]] = {}
        for name, assignment in assignments.items():
            if assignment.info.role in GROUPS[kind]:
                sites.setdefault((assignment.info.block, name.rpartition(".")[0]), []).append(name)
        if not sites:
            raise ConfigError(f"no targets of this model have the roles {', '.join(GROUPS[kind])}; take '{kind}' out of share and tie")
        for (_, parent), members in sites.items():
            name = f"{parent}.{{{','.join(member.rpartition('.')[2] for member in members)}}}"
            check_group(name, [assignments[member] for member in members])
            found[name] = Group(name, tuple(members), assignments[members[0]].shared, kind in recipe.allocation.tie)
    return found


def check_group(name: str, members: Sequence[Assignment]) -> None:
    """Raise ConfigError unless the members of a group read the same inputs and have the same methods."""
    first = members[0]
    if len({member.info.feeds for member in members}) > 1:
        raise ConfigError(f"{name}: these linears do not read the same inputs, so they cannot share; leave them out of share and tie")
    if any((m.methods, m.shared, m.dtype, m.keep_dense) != (first.methods, first.shared, first.dtype, first.keep_dense) for m in members):
        raise ConfigError(f"{name}: linears that share or are tied must belong to one entry of the recipe; give them the same targets")
    if single := [method.name for method in first.shared if not method.shares]:
        raise ConfigError(f"{name}: method '{single[0]}' decomposes single linears; take 'share' off it")
    if len({member.info.module.bias is None for member in members}) > 1:
        raise ConfigError(f"{name}: some of these linears have a bias and some have none, so they cannot share; take 'share' off")


def dense_weight(assignment: Assignment) -> Dense:
    return dense_of(assignment.info, assignment.dtype)


def stacked(denses: Sequence[Dense]) -> Dense:
    """Linears with the same inputs as one, outputs below each other."""
    bias = None if denses[0].bias is None else torch.cat([dense.bias for dense in denses])
    heights = tuple(len(dense.weight) for dense in denses)
    return Dense(torch.cat([dense.weight for dense in denses]), bias, denses[0].dtype, heights)


def stacked_stats(stats: Sequence[LinearStats]) -> LinearStats:
    """Statistics of stacked linears: their common inputs, and the gradients of each; products across linears are unknown and count as 0."""
    joined = {}
    if stats[0].grad_gram is not None:
        joined["grad_gram"] = torch.block_diag(*(one.grad_gram for one in stats))
    if stats[0].fisher is not None:
        joined["fisher"] = torch.cat([one.fisher for one in stats])
    return replace(stats[0], **joined)


def decompose_one(name: str, assignment: Assignment, stats: LinearStats) -> list[Decomposition]:
    """Prepare every method that competes for one linear alone."""
    return decompose(name, assignment.methods, dense_weight(assignment), stats, {name: assignment.info.out_features})


def decompose_group(group: Group, assignments: dict[str, Assignment], stats: dict[str, LinearStats]) -> list[Decomposition]:
    """Prepare every method that decomposes the linears of a group together."""
    if not group.methods:
        return []
    dense = stacked([dense_weight(assignments[name]) for name in group.members])
    members = {name: assignments[name].info.out_features for name in group.members}
    return decompose(group.name, group.methods, dense, stacked_stats([stats[name] for name in group.members]), members)


def decompose(name: str, methods: Sequence[Method], dense: Dense, stats: LinearStats, members: dict[str, int]) -> list[Decomposition]:
    found = []
    for method in methods:
        state = method.prepare(name, dense, stats)
        found.append(Decomposition(method, state, method.candidates(state), members))
    return found


def gram_error(assignment: Assignment, module: CompressedLinear, stats: LinearStats) -> float:
    """tr(D G Dᵀ) / tr(W G Wᵀ) of a module as it is stored: the `error` of reports, one yardstick for every method."""
    return linalg.relative_error(dense_weight(assignment).weight, module.to_dense(), linalg.Metric(stats.gram, 1 / stats.tokens))
