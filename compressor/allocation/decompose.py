"""Decompositions of linears and groups of linears, and the modules built from them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor import linalg
from compressor.allocation.assign import Assignment, Group
from compressor.errors import ConfigError
from compressor.linears import CompressedLinear, Dense
from compressor.methods.base import Member, Method
from compressor.models.linears import dense_of
from compressor.plan import Candidate, Choice, Curve
from compressor.resume.store import NOWHERE, Store, digest
from compressor.statistics import LinearStats


@dataclass(frozen=True)
class Decomposition:
    """One method's decomposition of one linear or of a group: its curve, and the state that any
    point of it is built from.
    """

    method: Method
    state: Any
    curve: Curve
    members: dict[str, int]  # linear → its number of outputs
    # digest of method, options, linears and stored dtype, which pieces of work are kept under
    key: str = ""

    def build(self, candidate: Candidate) -> tuple[dict[str, CompressedLinear], float]:
        """Module of every linear for a candidate, as it will be stored, and the error of all in the
        method's metric.
        """
        return built(self.method, self.state, candidate.setting, self.members)


Decompositions = dict[str, list[Decomposition]]  # linear or group → one for each of its methods


def built(
    method: Method, state: Any, setting: dict[str, Any], outputs: Mapping[str, int]
) -> tuple[dict[str, CompressedLinear], float]:
    """Build the module of every linear for a setting, as it will be stored, and measure the error
    of all in the method's metric.
    """
    modules = method.compress_unit(state, setting, outputs)
    return modules, method.measure_unit(state, modules)


def options_as_json(part: Decomposition) -> dict[str, Any]:
    """Return all options of a method as JSON values."""
    return json.loads(json.dumps(asdict(part.method)))


def distinguishing_options(
    part: Decomposition, found: Sequence[Decomposition]
) -> dict[str, Any] | None:
    """Return the options that tell a decomposition from others of its method; None if it has none
    beside it.
    """
    same = [options_as_json(one) for one in found if one.method.name == part.method.name]
    if len(same) == 1:
        return None
    return {
        key: value
        for key, value in options_as_json(part).items()
        if any(other[key] != value for other in same)
    }


def find_offer(
    name: str, choice: Choice, found: Sequence[Decomposition]
) -> tuple[Decomposition, Candidate]:
    """Find the decomposition and the candidate that a choice came from.

    Raises ConfigError if there are none in the recipe, or several and the choice does not say
    which.
    """
    setting, wanted = choice.setting, choice.options or {}
    named = [one for one in found if one.method.name == choice.method]
    named = [
        one
        for one in named
        if wanted == {key: value for key, value in options_as_json(one).items() if key in wanted}
    ]
    if not named:
        said = f"'{choice.method}' with {choice.options}" if wanted else f"'{choice.method}'"
        raise ConfigError(f"{name}: the plan says {said}, which the recipe does not offer for it")
    offers = [
        (one, candidate)
        for one in named
        for candidate in one.curve.candidates
        if candidate.setting == setting
    ]
    if not offers:
        raise ConfigError(
            f"{name}: {choice.method} offers no setting {setting}; `compressor plan` lists those "
            "it has"
        )
    if choice.options is None and any(one is not offers[0][0] for one, _ in offers):
        labels = " or ".join(str(distinguishing_options(one, found)) for one, _ in offers)
        raise ConfigError(
            f"{name}: several candidates '{choice.method}' offer {setting}; say which by "
            f"`options`: {labels}"
        )
    return offers[0]


def dense_weight(assignment: Assignment) -> Dense:
    """Return the dense linear of a target, in the dtype of the result."""
    return dense_of(assignment.info, assignment.dtype)


def move_beside(
    assignments: Mapping[str, Assignment], stats: dict[str, LinearStats]
) -> dict[str, LinearStats]:
    """Move statistics to the devices of their linears' weights.

    Files and calibrations in several passes leave them on the CPU. Tensors that linears share stay
    shared; those of other linears stay where they are.
    """
    moved: dict[tuple[int, torch.device], Tensor] = {}
    beside = dict(stats)
    for name in stats.keys() & assignments.keys():
        device = dense_weight(assignments[name]).weight.device
        tensors = {
            key: value for key, value in vars(stats[name]).items() if isinstance(value, Tensor)
        }
        for value in tensors.values():
            if (id(value), device) not in moved:
                moved[id(value), device] = value.to(device)
        fields: dict[str, Any] = {key: moved[id(t), device] for key, t in tensors.items()}
        beside[name] = replace(stats[name], **fields)
    return beside


def member_of(name: str, assignment: Assignment, stats: LinearStats) -> Member:
    """Describe a target and its statistics as a method takes them."""
    return Member(name, dense_weight(assignment), stats, assignment.info.role)


def decompose_one(
    name: str, assignment: Assignment, stats: LinearStats, store: Store = NOWHERE
) -> list[Decomposition]:
    """Prepare every method that competes for one linear alone."""
    members = {name: member_of(name, assignment, stats)}
    return [decompose(name, method, members, store) for method in assignment.methods]


def decompose_group(
    group: Group,
    assignments: dict[str, Assignment],
    stats: dict[str, LinearStats],
    store: Store = NOWHERE,
) -> list[Decomposition]:
    """Prepare every method that decomposes the linears of a group together."""
    members = {name: member_of(name, assignments[name], stats[name]) for name in group.members}
    return [decompose(group.name, method, members, store) for method in group.methods]


def decompose(unit: str, method: Method, members: dict[str, Member], store: Store) -> Decomposition:
    """Prepare one method for one unit."""
    outputs = {name: len(member.dense.weight) for name, member in members.items()}
    dtype = next(iter(members.values())).dense.dtype
    key = digest([method.name, asdict(method), outputs, str(dtype)])
    state, curve = store.recall(
        "decomposition", key, partial(_prepare, method, unit, members), known=members
    )
    return Decomposition(method, state, curve, outputs, key)


def _prepare(method: Method, unit: str, members: dict[str, Member]) -> tuple[Any, Curve]:
    state = method.prepare_unit(unit, members)
    return state, method.candidates(state)


def list_sizes(
    assignments: Mapping[str, Assignment], groups: Mapping[str, Group]
) -> Decompositions:
    """Return decompositions that know their sizes alone, errors NaN, from shapes.

    Linears on the meta device will do. None of them can be built.
    """

    def size(unit: str, method: Method, names: Sequence[str]) -> Decomposition:
        linears = [assignments[name] for name in names]
        members = {
            name: Member(name, dense_weight(linear), role=linear.info.role)
            for name, linear in zip(names, linears, strict=True)
        }
        candidates = tuple(method.sizes_of_unit(members))
        whole = sum(linear.bits for linear in linears), sum(linear.parameters for linear in linears)
        curve = Curve(unit, method.name, candidates, *whole, energy=1.0)
        outputs = {name: assignments[name].info.out_features for name in names}
        return Decomposition(method, None, curve, outputs)

    units: dict[str, tuple[tuple[str, ...], tuple[Method, ...]]]
    units = {name: ((name,), assignment.methods) for name, assignment in assignments.items()}
    units |= {name: (group.members, group.methods) for name, group in groups.items()}
    return {
        unit: [size(unit, method, names) for method in methods]
        for unit, (names, methods) in units.items()
    }


def gram_error(assignment: Assignment, module: nn.Module, stats: LinearStats) -> float:
    """Measure tr(D G Dᵀ) / tr(W G Wᵀ) of a module as it is stored, D = W − Ŵ.

    It is the `error` of reports, one yardstick for every method.
    """
    if isinstance(module, CompressedLinear):
        stored = module.to_dense()
    else:
        info = replace(assignment.info, module=module)
        stored = dense_of(info, assignment.dtype).weight
    return linalg.relative_error(
        dense_weight(assignment).weight, stored, linalg.Metric(stats.gram, 1 / stats.tokens)
    )
