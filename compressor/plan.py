"""What can be chosen for each linear, and what was chosen: plain data that survives JSON.

Sizes are bits as stored on disk, bias included. `parameters` counts stored real numbers only (no
indices, masks or pivots).
"""

from dataclasses import asdict, dataclass, field
from typing import Any

DENSE = "dense"  # the method name of a linear that keeps its weight
WITH_RESIDUALS, FINER_BASES = (
    "with residuals",
    "finer bases instead",
)  # entries of `Plan.contest` of a plan with low-rank residuals


@dataclass(frozen=True)
class Candidate:
    """One way to store one linear."""

    method: str  # engine name, or DENSE
    setting: dict[str, Any]  # what `Method.compress` needs, JSON values only, e.g. {"rank": 48}
    bits: int
    parameters: int
    # closed-form error of the method's own metric, relative to the energy (0 = exact, 1 = all lost)
    error: float
    multiply_adds: int | None = None  # for one token, as executed; None where a method does not say


@dataclass(frozen=True)
class Curve:
    """Candidates of one linear from one method, in order of growing size; "keep dense" is not among
    them.
    """

    linear: str
    method: str
    candidates: tuple[Candidate, ...]
    dense_bits: int
    dense_parameters: int
    # what an error of 1 means, in the metric of the method (for the Gram metric tr(W G Wᵀ), per
    # token)
    energy: float
    spectrum: tuple[
        float, ...
    ] = ()  # squared singular values ÷ energy, descending; low-rank methods only
    # whether errors have the shape of the real ones only: what is built tells how large they are
    screened: bool = False
    thresholds: tuple[
        float, ...
        # of every candidate and of dense, descending: too large under a global threshold above it
    ] = ()


@dataclass(frozen=True)
class Choice:
    """The candidate installed in one linear, with the predicted and the measured error."""

    method: str
    setting: dict[str, Any]
    bits: int
    parameters: int
    dense_bits: int
    dense_parameters: int
    predicted: float = 0.0  # curve error, in the method's metric
    measured: float | None = None  # the same, of the module as it is stored; None until it is built
    error: float | None = (
        # tr(D G Dᵀ) / tr(W G Wᵀ) of the module as it is stored, D = W − Ŵ, G the Gram of the dense
        # model
        None
    )
    kl: float | None = (
        # damage the allocation counted with, nats per token; None where it is not measured in nats
        None
    )
    residual: int | None = (
        # rank of the low-rank residual, counted in bits and parameters; None without compensation
        None
    )
    options: dict[str, Any] | None = (
        # those that tell the candidate from others of its method; None where it has none beside it
        None
    )
    sequential: dict[str, float] | None = (
        None  # of a linear that was solved again in order: the dampings that took, by name
    )
    reason: str | None = (
        # why it stays dense whatever the budget: the calibration text says nothing about it; None
        # otherwise
        None
    )


@dataclass(frozen=True)
class Plan:
    """Linear name → choice. Editable as JSON and run again with `compress --plan`."""

    linears: dict[str, Choice]
    price: float | None = (
        # marginal price of the budget, nats per MiB; None where the allocation does not measure
        # nats
        None
    )
    recipe: dict[str, Any] = field(default_factory=dict)
    contest: dict[str, float] = field(
        default_factory=dict
    )  # held-out divergence of whole models: all methods together, each alone, …
    curves: tuple[dict[str, Any], ...] = ()  # what each linear could have been, see `curves`
    search: dict[str, Any] = field(
        default_factory=dict
    )  # what was tried in search of the recipe, and what was taken
    trained: dict[str, Any] = field(
        default_factory=dict
    )  # repair, heal → whether it was kept, divergences before and after

    def to_json(self) -> dict[str, Any]:
        """What plan.json holds: all but the curves, which have a file of their own."""
        return {key: value for key, value in asdict(self).items() if key != "curves"}

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Plan":
        return Plan(
            linears={name: Choice(**choice) for name, choice in data["linears"].items()},
            price=data.get("price"),
            recipe=data.get("recipe", {}),
            contest=data.get("contest", {}),
            search=data.get("search", {}),
            trained=data.get("trained", {}),
        )
