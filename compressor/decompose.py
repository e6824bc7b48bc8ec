"""Decompositions of linears and groups of linears, and the modules built from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from compressor import linalg
from compressor.assignments import Assignment, Group, keys_of
from compressor.linears import CompressedLinear, Dense
from compressor.methods.base import Engine, Method, ModuleMethod, Part
from compressor.model import dense_of
from compressor.plan import Candidate, Curve
from compressor.stats import LinearStats


@dataclass(frozen=True)
class Decomposition:
    """One method's decomposition of one linear or of a group: its curve, and the state that any point of it is built from."""

    method: Engine
    state: Any
    curve: Curve
    members: dict[str, Any]  # linear → what tells it apart: its number of outputs among stacked ones, its key in a module

    def build(self, candidate: Candidate) -> tuple[dict[str, CompressedLinear], float]:
        """Module of every linear for a candidate, as it will be stored, and the error of all in the method's metric."""
        return built(self.method, self.state, candidate.setting, self.members)


def built(method: Engine, state: Any, setting: dict[str, Any], members: Mapping[str, Any]) -> tuple[dict[str, CompressedLinear], float]:
    """Module of every linear for a setting, as it will be stored, and the error of all in the method's metric."""
    made = method.compress(state, setting)
    error = method.measure(state, made)
    if isinstance(method, ModuleMethod):
        return {name: made[role] for name, role in members.items()}, error
    return (dict.fromkeys(members, made) if len(members) == 1 else made.split(members)), error


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
    infos = {name: assignments[name].info for name in group.members}
    denses = {name: dense_weight(assignments[name]) for name in group.members}
    found = []
    for method in group.methods:
        if isinstance(method, ModuleMethod):
            keys = keys_of(method, group, assignments)
            state = method.prepare(group.name, {key: Part(name, denses[name], stats[name]) for name, key in keys.items()})
            found.append(Decomposition(method, state, method.candidates(state), keys))
        else:
            heights = {name: info.out_features for name, info in infos.items()}
            joined = stacked(list(denses.values())), stacked_stats([stats[name] for name in group.members])
            found += decompose(group.name, [method], *joined, heights)
    return found


def decompose(name: str, methods: Sequence[Method], dense: Dense, stats: LinearStats, members: dict[str, int]) -> list[Decomposition]:
    found = []
    for method in methods:
        state = method.prepare(name, dense, stats)
        found.append(Decomposition(method, state, method.candidates(state), members))
    return found


def gram_error(assignment: Assignment, module: CompressedLinear, stats: LinearStats) -> float:
    """tr(D G Dᵀ) / tr(W G Wᵀ) of a module as it is stored: the `error` of reports, one yardstick for every method."""
    return linalg.relative_error(dense_weight(assignment).weight, module.to_dense(), linalg.Metric(stats.gram, 1 / stats.tokens))
