"""Which methods compete for which linear, their decompositions, and the modules built from them."""

from dataclasses import dataclass
from typing import Any

import torch

from compressor import linalg
from compressor.errors import ConfigError
from compressor.linears import CompressedLinear, Dense
from compressor.methods import build
from compressor.methods.base import Method
from compressor.model import LinearInfo, dense_of, linears, selects
from compressor.plan import Candidate, Curve
from compressor.recipe import Recipe
from compressor.stats import LinearStats

ALWAYS = frozenset({"gram"})  # what the reported error of every linear is measured with


@dataclass(frozen=True)
class Assignment:
    """One targeted linear, the methods that compete for it, and whether keeping it dense competes too."""

    info: LinearInfo
    methods: tuple[Method, ...]
    keep_dense: bool
    dtype: torch.dtype  # of the stored result

    @property
    def needs(self) -> frozenset[str]:
        return ALWAYS.union(*(method.needs for method in self.methods))


@dataclass(frozen=True)
class Decomposition:
    """One method's decomposition of one linear: its curve, and the state that any point of it is built from."""

    method: Method
    state: Any
    curve: Curve

    def build(self, candidate: Candidate) -> tuple[CompressedLinear, float]:
        """Module of a candidate as it will be stored, and its error in the method's metric."""
        module = self.method.compress(self.state, candidate.setting)
        return module, self.method.measure(self.state, module)


def assign(recipe: Recipe, model: torch.nn.Module) -> dict[str, Assignment]:
    """Give each targeted linear to the first entry of the recipe that selects it.

    Raises ConfigError if an entry selects nothing, or if the allocation weighs several methods in units that do not compare.
    """
    entries = [(entry, tuple(build(engine.name, engine.options) for engine in entry.candidates)) for entry in recipe.method]
    assignments = {}
    for name, info in linears(model, [entry.targets for entry, _ in entries]).items():
        entry, methods = next(pair for pair in entries if selects(pair[0].targets, info))
        dtype = info.module.weight.dtype if recipe.output.dtype == "auto" else getattr(torch, recipe.output.dtype)
        assignments[name] = Assignment(info, methods, entry.dense, dtype)
    if not assignments:
        raise ConfigError("the targets select no linear of the model; see `compressor plan MODEL`")
    for name, assignment in assignments.items():
        if len(assignment.methods) > 1 and recipe.allocation.kind != "knapsack":
            raise ConfigError(f"{name}: several candidates compete, which needs allocation.kind 'knapsack', not '{recipe.allocation.kind}'")
    return assignments


def dense_weight(assignment: Assignment) -> Dense:
    return dense_of(assignment.info, assignment.dtype)


def decompose_one(name: str, assignment: Assignment, stats: LinearStats) -> list[Decomposition]:
    """Prepare every method that competes for one linear."""
    dense, found = dense_weight(assignment), []
    for method in assignment.methods:
        state = method.prepare(name, dense, stats)
        found.append(Decomposition(method, state, method.candidates(state)))
    return found


def gram_error(assignment: Assignment, module: CompressedLinear, stats: LinearStats) -> float:
    """tr(D G Dᵀ) / tr(W G Wᵀ) of a module as it is stored: the `error` of reports, one yardstick for every method."""
    return linalg.relative_error(dense_weight(assignment).weight, module.to_dense(), linalg.Metric(stats.gram, 1 / stats.tokens))
