"""Abstract decompositions: prepare once, ask for the whole size–error curve, build any point of it.

`Method` works on a unit: one linear, or several of one kind that only make sense together, such as
all of a feed-forward block. `LinearMethod` is the simple case: it is written for one linear, and
serves several with the same inputs by stacking them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from compressor.linears.base import CompressedLinear, Dense
from compressor.linears.dictionary import Dictionary
from compressor.plan import Candidate, Curve
from compressor.statistics import LinearStats

State = TypeVar("State")

LINEAR = "linear"  # kind of unit: one linear, or several with the same inputs, stacked
PAIR = "pair"  # kind of unit: linears of one role in two blocks; the others lie in one module


class Approximation(Protocol):
    """Anything that stands in for a weight."""

    def to_dense(self) -> Tensor:
        """Ŵ (out, in)."""


@dataclass(frozen=True)
class Member:
    """One linear of a unit."""

    linear: str  # its name
    dense: Dense
    stats: LinearStats = field(default_factory=LinearStats)  # empty where only sizes are asked for
    role: str | None = None  # of `roles.ROLES`; None where it is not known


@dataclass(frozen=True)
class Method(ABC, Generic[State]):
    """Abstract decomposition of a unit. Options are the fields of the concrete frozen dataclass,
    each with a default.

    A method is pure: it follows the device of its inputs, never writes to them, and draws random
    numbers only from a generator seeded by an option. Concrete classes are final and registered
    with `@register`. Members and modules go by the names of their linears, in the order of the
    model.
    """

    name: ClassVar[str]  # what recipes write
    paper: ClassVar[str]  # first source: authors' title and arXiv id
    unit: ClassVar[str]  # kind of its units: LINEAR, or a key of `roles.GROUPS`
    shares: ClassVar[bool] = False  # whether stacked linears can be split again; LINEAR only
    integers: ClassVar[bool] = False  # whether it stores integers, which are no parameters

    @property
    @abstractmethod
    def needs(self) -> frozenset[str]:
        """Fields of `LinearStats` that `prepare_unit` reads."""

    @abstractmethod
    def sizes_of_unit(self, members: Mapping[str, Member]) -> list[Candidate]:
        """List every size offered for these shapes in growing order, errors NaN; meta tensors do.

        Raises ConfigError for members of a form that the method does not know.
        """

    @abstractmethod
    def prepare_unit(self, unit: str, members: Mapping[str, Member]) -> State:
        """Do the expensive decomposition once.

        Args:
            unit: name of the unit, for messages and seeds only.
            members: linears with their statistics.

        Raises:
            ConfigError: the unit is not of a form that the method knows.
            DataError: the statistics lack what the method needs.
        """

    @abstractmethod
    def candidates(self, state: State) -> Curve:
        """List every size with its closed-form error; none where none is smaller than dense."""

    @abstractmethod
    def compress_unit(
        self, state: State, setting: dict[str, Any], outputs: Mapping[str, int]
    ) -> dict[str, CompressedLinear]:
        """Build the modules of one candidate, floating tensors already in the stored dtype.

        Args:
            setting: that of the candidate.
            outputs: number of outputs of each member.
        """

    @abstractmethod
    def measure_unit(self, state: State, modules: Mapping[str, Approximation]) -> float:
        """Measure the relative error of built modules, all together, in the method's own metric:
        what `candidates` predicted, after the cast.
        """


@dataclass(frozen=True)
class LinearMethod(Method[State]):
    """Abstract decomposition of one linear."""

    unit: ClassVar[str] = LINEAR

    @abstractmethod
    def sizes(self, dense: Dense) -> list[Candidate]:
        """List every size offered for a linear of this shape, as `sizes_of_unit`."""

    @abstractmethod
    def prepare(self, linear: str, dense: Dense, stats: LinearStats) -> State:
        """Do the expensive decomposition once. `linear` is the module's name, for messages and
        seeds only.
        """

    @abstractmethod
    def compress(self, state: State, setting: dict[str, Any]) -> CompressedLinear:
        """Build the module of one candidate, floating tensors already in `dense.dtype`."""

    @abstractmethod
    def measure(self, state: State, module: Approximation) -> float:
        """Measure the relative error of a built module, as `measure_unit`."""

    def sizes_of_unit(self, members: Mapping[str, Member]) -> list[Candidate]:
        return self.sizes(stack_denses([member.dense for member in members.values()]))

    def prepare_unit(self, unit: str, members: Mapping[str, Member]) -> State:
        dense = stack_denses([member.dense for member in members.values()])
        stats = stack_stats([member.stats for member in members.values()])
        return self.prepare(unit, dense, stats)

    def compress_unit(
        self, state: State, setting: dict[str, Any], outputs: Mapping[str, int]
    ) -> dict[str, CompressedLinear]:
        module = self.compress(state, setting)
        if len(outputs) == 1:
            return dict.fromkeys(outputs, module)
        if not isinstance(module, Dictionary):
            raise TypeError(f"{self.name} builds modules that cannot be split by outputs")
        return {**module.split(outputs)}

    def measure_unit(self, state: State, modules: Mapping[str, Approximation]) -> float:
        stacked = list(modules.values())
        return self.measure(state, stacked[0] if len(stacked) == 1 else Stack(stacked))


@dataclass(frozen=True)
class Stack:
    """Modules that were decomposed together, outputs below each other."""

    modules: Sequence[Approximation]

    def to_dense(self) -> Tensor:
        return torch.cat([module.to_dense() for module in self.modules])


def by_role(members: Mapping[str, Member]) -> dict[str, Member]:
    """Key members by their roles, of which each has one of its own."""
    return {member.role or name: member for name, member in members.items()}


def dense_size(members: Mapping[str, Member]) -> tuple[int, int]:
    """Add up the bits and the parameters of dense members."""
    denses = [member.dense for member in members.values()]
    return sum(dense.bits for dense in denses), sum(dense.parameters for dense in denses)


def stack_denses(denses: Sequence[Dense]) -> Dense:
    """Stack linears with the same inputs, outputs below each other; one alone stays as it is."""
    if len(denses) == 1:
        return denses[0]
    biases = [dense.bias for dense in denses if dense.bias is not None]
    weight = torch.cat([dense.weight for dense in denses])  # (sum of out, in)
    heights = tuple(len(dense.weight) for dense in denses)
    return Dense(weight, torch.cat(biases) if biases else None, denses[0].dtype, heights)


def stack_stats(stats: Sequence[LinearStats]) -> LinearStats:
    """Join the statistics of stacked linears: their common inputs, and the gradients of each;
    products across linears are unknown and count as 0.
    """
    if len(stats) == 1:
        return stats[0]
    joined = {}
    if grad_grams := [one.grad_gram for one in stats if one.grad_gram is not None]:
        joined["grad_gram"] = torch.block_diag(*grad_grams)
    if fishers := [one.fisher for one in stats if one.fisher is not None]:
        joined["fisher"] = torch.stack(fishers).sum(0)  # of all outputs, for each input
    return replace(stats[0], **joined)
