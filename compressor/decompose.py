"""Decompositions of linears and groups of linears, and the modules built from them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from compressor import linalg
from compressor.assignments import Assignment, Group, keys_of
from compressor.linears import CompressedLinear, Dense
from compressor.methods.base import Engine, ModuleMethod, Part
from compressor.model import dense_of
from compressor.plan import Candidate, Curve
from compressor.stats import LinearStats
from compressor.store import NOWHERE, Store, digest


@dataclass(frozen=True)
class Decomposition:
    """One method's decomposition of one linear or of a group: its curve, and the state that any point of it is built from."""

    method: Engine
    state: Any
    curve: Curve
    members: dict[str, Any]  # linear → what tells it apart: its number of outputs among stacked ones, its key in a module
    key: str = ""  # digest of method, options, linears and stored dtype, which pieces of work are kept under

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


def decompose_one(name: str, assignment: Assignment, stats: LinearStats, store: Store = NOWHERE) -> list[Decomposition]:
    """Prepare every method that competes for one linear alone."""
    members, inputs = {name: assignment.info.out_features}, (dense_weight(assignment), stats)
    return [decompose(name, method, inputs, members, assignment.dtype, store) for method in assignment.methods]


def decompose_group(
    group: Group, assignments: dict[str, Assignment], stats: dict[str, LinearStats], store: Store = NOWHERE
) -> list[Decomposition]:
    """Prepare every method that decomposes the linears of a group together."""
    infos = {name: assignments[name].info for name in group.members}
    denses = {name: dense_weight(assignments[name]) for name in group.members}
    found = []
    for method in group.methods:
        if isinstance(method, ModuleMethod):
            keys = keys_of(method, group, assignments)
            inputs, members = ({key: Part(name, denses[name], stats[name]) for name, key in keys.items()},), keys
        else:
            inputs = stacked(list(denses.values())), stacked_stats([stats[name] for name in group.members])
            members = {name: info.out_features for name, info in infos.items()}
        found.append(decompose(group.name, method, inputs, members, next(iter(denses.values())).dtype, store))
    return found


def decompose(name: str, method: Engine, inputs: Any, members: dict[str, Any], dtype: torch.dtype, store: Store) -> Decomposition:
    """Prepare one method. inputs: what its `prepare` takes behind the name."""
    key = digest([method.name, asdict(method), members, str(dtype)])
    state, curve = store.recall("decomposition", key, partial(_prepare, method, name, inputs), known=inputs)
    return Decomposition(method, state, curve, members, key)


def _prepare(method: Engine, name: str, inputs: Any) -> tuple[Any, Curve]:
    state = method.prepare(name, *inputs)
    return state, method.candidates(state)


def gram_error(assignment: Assignment, module: nn.Module, stats: LinearStats) -> float:
    """tr(D G Dᵀ) / tr(W G Wᵀ) of a module as it is stored: the `error` of reports, one yardstick for every method."""
    compressed = isinstance(module, CompressedLinear)
    stored = module.to_dense() if compressed else dense_of(replace(assignment.info, module=module), assignment.dtype).weight
    return linalg.relative_error(dense_weight(assignment).weight, stored, linalg.Metric(stats.gram, 1 / stats.tokens))
