"""Assign methods to linears, and group linears that have a decision in common."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compressor.errors import ConfigError
from compressor.methods import build
from compressor.methods.base import LINEAR, PAIR, Method
from compressor.methods.low_rank import residual
from compressor.models.linears import LinearInfo, linears, selects
from compressor.models.roles import GROUPS
from compressor.recipe.sections import Recipe

ALWAYS = frozenset({"gram"})  # what the reported error of every linear is measured with


@dataclass(frozen=True)
class Assignment:
    """One targeted linear, the methods that compete for it, and whether keeping it dense competes
    too.
    """

    info: LinearInfo
    methods: tuple[Method, ...]
    keep_dense: bool
    dtype: torch.dtype  # of the stored result
    shared: tuple[
        tuple[str, Method], ...
    ] = ()  # kind of group and method: those that decompose the linear with others
    residual_needs: frozenset[str] = frozenset()  # fields of the statistics for its residual

    @property
    def competing(self) -> tuple[Method, ...]:
        return self.methods + tuple(method for _, method in self.shared)

    @property
    def needs(self) -> frozenset[str]:
        return (ALWAYS | self.residual_needs).union(*(method.needs for method in self.competing))

    @property
    def parameters(self) -> int:
        """Numbers of the dense linear, bias included."""
        return self.info.out_features * self.info.in_features + (
            0 if self.info.module.bias is None else self.info.out_features
        )

    @property
    def bits(self) -> int:
        """Bits of the dense linear in the dtype of the result."""
        return self.parameters * self.dtype.itemsize * 8

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of the dense linear for one token."""
        return self.info.out_features * self.info.in_features


@dataclass(frozen=True)
class Group:
    """Linears that have a decision in common."""

    name: str
    members: tuple[str, ...]  # names, in the order of the model
    methods: tuple[Method, ...]  # that decompose all of them together
    tied: bool  # whether apart from these only equal methods and settings are allowed


def assign(recipe: Recipe, model: PreTrainedModel) -> dict[str, Assignment]:
    """Give each targeted linear to the first entry of the recipe that selects it.

    Raises ConfigError if an entry selects nothing or has no method for a linear, or if the
    allocation weighs several methods in units that do not compare.
    """
    entries = [
        (entry, [build(engine.name, engine.options) for engine in entry.candidates])
        for entry in recipe.method
    ]
    assignments = {}
    for name, info in linears(model, [entry.targets for entry, _ in entries]).items():
        entry, methods = next(pair for pair in entries if selects(pair[0].targets, info))
        weight: Tensor = info.module.weight  # type: ignore[assignment]  # of a linear or a Conv1D
        dtype = (
            weight.dtype if recipe.output.dtype == "auto" else getattr(torch, recipe.output.dtype)
        )
        alone, shared = [], []
        for engine, method in zip(entry.candidates, methods, strict=True):
            kinds = engine.share if method.unit == LINEAR else [method.unit]
            if method.unit != LINEAR and engine.share:
                raise ConfigError(
                    f"method '{method.name}' works on whole modules; take 'share' off it"
                )
            if inside := [kind for kind in kinds if info.role in GROUPS[kind]]:
                shared.append((inside[0], method))
            elif method.unit == LINEAR:
                alone.append(method)
        if not alone and not shared:
            units = ", ".join(
                f"{method.unit} ({', '.join(GROUPS[method.unit])})" for method in methods
            )
            raise ConfigError(
                f"{name}: its role is {info.role or 'unknown'}, and the methods of its entry work "
                f"on other modules: {units}; "
                "narrow the targets or add a method"
            )
        residual_needs = residual.needs(recipe.compensation)
        assignments[name] = Assignment(
            info, tuple(alone), entry.dense, dtype, tuple(shared), residual_needs
        )
    if not assignments:
        raise ConfigError("the targets select no linear of the model; see `compressor plan MODEL`")
    for name, assignment in assignments.items():
        if recipe.allocation.count == "parameters" and any(
            method.integers for method in assignment.competing
        ):
            raise ConfigError(
                f"{name}: integers are not counted as parameters; set allocation.count to bits"
            )
        if recipe.compensation.enabled and any(
            max(getattr(method, "residual", (0,))) for method in assignment.competing
        ):
            raise ConfigError(
                f"{name}: its candidates list residual ranks themselves; leave out compensation, "
                "or their option 'residual'"
            )
        if recipe.compensation.enabled and (
            paired := [method.name for kind, method in assignment.shared if kind == PAIR]
        ):
            raise ConfigError(
                f"{name}: '{paired[0]}' fits pairs of linears, which get no residuals; leave out "
                "compensation"
            )
        if len(assignment.competing) > 1 and recipe.allocation.kind != "knapsack":
            raise ConfigError(
                f"{name}: several candidates compete, which needs allocation.kind 'knapsack', not "
                f"'{recipe.allocation.kind}'"
            )
    return assignments


def groups(recipe: Recipe, assignments: dict[str, Assignment]) -> dict[str, Group]:
    """Group targets that share a decomposition or are tied, by name.

    Raises ConfigError for linears that cannot share: other inputs, another entry of the recipe, a
    method that knows one linear only.
    """
    if recipe.allocation.kind != "knapsack" and (recipe.allocation.tie or recipe.allocation.limits):
        raise ConfigError(
            "allocation.tie and allocation.limits need allocation.kind 'knapsack', not "
            f"'{recipe.allocation.kind}'"
        )
    wanted: set[str] = {
        kind for entry in recipe.method for engine in entry.candidates for kind in engine.share
    }
    wanted |= {
        *recipe.allocation.tie,
        *(kind for assignment in assignments.values() for kind, _ in assignment.shared),
    }
    found: dict[str, Group] = {}
    for kind in sorted(wanted):
        for name, members in sites(kind, assignments).items():
            offered = (
                tuple(method for each, method in assignments[member].shared if each == kind)
                for member in members
            )
            methods = next(filter(None, offered), ())
            group = Group(name, tuple(members), methods, kind in recipe.allocation.tie)
            if methods or group.tied:
                check_group(group, kind, [assignments[member] for member in members])
                found[name] = group
    taken: dict[str, str] = {}
    for group in found.values():
        for member in group.members:
            if taken.setdefault(member, group.name) != group.name:
                raise ConfigError(
                    f"{member}: belongs to {taken[member]} and {group.name}; use one of these "
                    "methods, ties or shares"
                )
    return found


def sites(kind: str, assignments: dict[str, Assignment]) -> dict[str, list[str]]:
    """Find targets with the roles of a kind of group in one module, by the name of their group.
    Raises ConfigError if there are none.
    """
    if kind == PAIR:
        return pairs(assignments)
    found: dict[str, list[str]] = {}
    for name, assignment in assignments.items():
        if assignment.info.role in GROUPS[kind]:
            found.setdefault(name.rpartition(".")[0], []).append(name)
    if not found:
        raise ConfigError(
            f"no targets of this model have the roles {', '.join(GROUPS[kind])}; take '{kind}' "
            "out of share and tie"
        )
    return {
        f"{parent}.{{{','.join(member.rpartition('.')[2] for member in members)}}}": members
        for parent, members in found.items()
    }


def pairs(assignments: dict[str, Assignment]) -> dict[str, list[str]]:
    """Pair targets of the same path in their blocks, two blocks at a time, by name of the group.

    A last one that is left over is a group of its own.
    """
    lines: dict[tuple[str, str], list[str]] = {}
    for name, assignment in assignments.items():
        if any(kind == PAIR for kind, _ in assignment.shared):
            head, _, path = name.partition(f".{assignment.info.block}.")
            lines.setdefault((head, path), []).append(name)
    found = {}
    for (head, path), names in lines.items():
        for start in range(0, len(names), 2):
            blocks = ",".join(
                str(assignments[name].info.block) for name in names[start : start + 2]
            )
            found[f"{head}.{{{blocks}}}.{path}"] = names[start : start + 2]
    return found


def check_group(group: Group, kind: str, members: Sequence[Assignment]) -> None:
    """Raise ConfigError unless the members of a group have the same methods and, where these stack
    them, read the same inputs.
    """

    def terms(member: Assignment) -> tuple:
        return [each for each in member.shared if each[0] == kind], member.dtype, member.keep_dense

    if any(terms(member) != terms(members[0]) for member in members):
        raise ConfigError(
            f"{group.name}: linears that share or are tied must belong to one entry of the "
            "recipe; give them one target"
        )
    if all(method.unit != LINEAR for method in group.methods) and not group.tied:
        return
    if len({member.info.feeds for member in members}) > 1:
        raise ConfigError(
            f"{group.name}: these linears do not read the same inputs, so they cannot share; "
            "leave them out of share and tie"
        )
    if single := [
        method.name for method in group.methods if method.unit == LINEAR and not method.shares
    ]:
        raise ConfigError(
            f"{group.name}: method '{single[0]}' decomposes single linears; take 'share' off it"
        )
    if len({member.info.module.bias is None for member in members}) > 1 and group.methods:
        raise ConfigError(
            f"{group.name}: some of these linears have a bias and some have none, so they cannot "
            "share; take 'share' off"
        )
