"""What a decomposition is: prepare once, ask for the whole size–error curve, build any point of it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from compressor.linears.base import CompressedLinear, Dense
from compressor.plan import Candidate, Curve
from compressor.stats import LinearStats

State = TypeVar("State")


@dataclass(frozen=True)
class Method(ABC, Generic[State]):
    """Abstract decomposition. Options are the fields of the concrete frozen dataclass, each with a default.

    A method is pure: it follows the device of its inputs, never writes to them, and draws random numbers only from a generator
    seeded by an option. Concrete classes are final and registered with `@register`.
    """

    name: ClassVar[str]  # what recipes write
    paper: ClassVar[str]  # first source: authors' title and arXiv id
    shares: ClassVar[bool] = False  # whether linears with the same inputs may be stacked: its modules can be split again by outputs
    integers: ClassVar[bool] = False  # whether most of what it stores are integers, which a count of parameters does not see

    @property
    @abstractmethod
    def needs(self) -> frozenset[str]:
        """Fields of `LinearStats` that `prepare` reads."""

    @abstractmethod
    def sizes(self, dense: Dense) -> list[Candidate]:
        """Every size offered for a linear of this shape, in growing order, errors NaN; looks at shapes only, so meta tensors do."""

    @abstractmethod
    def prepare(self, linear: str, dense: Dense, stats: LinearStats) -> State:
        """Do the expensive decomposition once. `linear` is the module's name, for messages and seeds only."""

    @abstractmethod
    def candidates(self, state: State) -> Curve:
        """Every size this method offers for the linear, with its closed-form error; empty when none is smaller than dense."""

    @abstractmethod
    def compress(self, state: State, setting: dict[str, Any]) -> CompressedLinear:
        """Build the module of one candidate, floating tensors already in `dense.dtype`."""

    @abstractmethod
    def measure(self, state: State, module: CompressedLinear) -> float:
        """Relative error of a built module in the method's own metric: what `candidates` predicted, measured after the cast."""
