"""What a decomposition is: prepare once, ask for the whole size–error curve, build any point of it.

`Method` decomposes one linear, `ModuleMethod` several that only make sense together, such as all of
a feed-forward block.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from compressor.linears.base import CompressedLinear, Dense
from compressor.plan import Candidate, Curve
from compressor.statistics import LinearStats

State = TypeVar("State")


@dataclass(frozen=True)
class Engine(ABC, Generic[State]):
    """What every decomposition has. Options are the fields of the concrete frozen dataclass, each
    with a default.

    A method is pure: it follows the device of its inputs, never writes to them, and draws random
    numbers only from a generator seeded by an option. Concrete classes are final and registered
    with `@register`.
    """

    name: ClassVar[str]  # what recipes write
    paper: ClassVar[str]  # first source: authors' title and arXiv id
    integers: ClassVar[bool] = (
        # whether most of what it stores are integers, which a count of parameters does not see
        False
    )

    @property
    @abstractmethod
    def needs(self) -> frozenset[str]:
        """Fields of `LinearStats` that `prepare` reads."""

    @abstractmethod
    def candidates(self, state: State) -> Curve:
        """Every size this method offers, with its closed-form error; empty when none is smaller
        than dense.
        """


@dataclass(frozen=True)
class Method(Engine[State]):
    """Abstract decomposition of one linear."""

    shares: ClassVar[bool] = (
        # whether linears with the same inputs may be stacked: its modules can be split again by
        # outputs
        False
    )

    @abstractmethod
    def sizes(self, dense: Dense) -> list[Candidate]:
        """Every size offered for a linear of this shape, in growing order, errors NaN; looks at
        shapes only, so meta tensors do.
        """

    @abstractmethod
    def prepare(self, linear: str, dense: Dense, stats: LinearStats) -> State:
        """Do the expensive decomposition once. `linear` is the module's name, for messages and
        seeds only.
        """

    @abstractmethod
    def compress(self, state: State, setting: dict[str, Any]) -> CompressedLinear:
        """Build the module of one candidate, floating tensors already in `dense.dtype`."""

    @abstractmethod
    def measure(self, state: State, module: CompressedLinear) -> float:
        """Relative error of a built module in the method's own metric: what `candidates` predicted,
        measured after the cast.
        """


@dataclass(frozen=True)
class Part:
    """One linear of a module."""

    linear: str  # its name
    dense: Dense
    stats: LinearStats


@dataclass(frozen=True)
class ModuleMethod(Engine[State]):
    """Abstract decomposition of a module: linears by key that are compressed together. A key is a
    role, of `roles.ROLES`; where all linears have the same one (unit "pair") it is the name of the
    linear.
    """

    unit: ClassVar[str]  # which linears: a key of `roles.GROUPS`

    @abstractmethod
    def sizes(self, denses: Mapping[str, Dense]) -> list[Candidate]:
        """Every size offered for a module of these shapes, as `Method.sizes`."""

    @abstractmethod
    def prepare(self, module: str, parts: Mapping[str, Part]) -> State:
        """Do the expensive decomposition once. Raises ConfigError naming the module if it is not of
        a form that the method knows.
        """

    @abstractmethod
    def compress(self, state: State, setting: dict[str, Any]) -> dict[str, CompressedLinear]:
        """Build the linears of one candidate, by key, floating tensors already in the stored
        dtype.
        """

    @abstractmethod
    def measure(self, state: State, modules: Mapping[str, CompressedLinear]) -> float:
        """As `Method.measure`, of all linears together."""
