"""What can be chosen for each linear, and what was chosen: plain data that survives JSON.

Sizes are bits as stored on disk, bias included. `parameters` counts stored real numbers only (no
indices, masks or pivots).
"""

from dataclasses import asdict, dataclass, field
from typing import Any

VERSION = 2  # of plan.json; files without one are version 1
DENSE = "dense"  # the method name of a linear that keeps its weight
# entries of `Plan.contest` of a plan with low-rank residuals
WITH_RESIDUALS, FINER_BASES = "with_residuals", "finer_bases"
SINGLE_LINEARS = "single_linears"  # entry of `Plan.contest`: all methods of single linears
RENAMED = {  # keys of version 1
    "with residuals": WITH_RESIDUALS,
    "finer bases instead": FINER_BASES,
    "single linears": SINGLE_LINEARS,
    "in order": "in_order",
}


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
    # energy that errors are relative to, in the method's metric (Gram: tr(W G Wᵀ), per token)
    energy: float
    # squared singular values ÷ energy, descending; low-rank methods only
    spectrum: tuple[float, ...] = ()
    # whether errors have the shape of the real ones only: what is built tells how large they are
    screened: bool = False
    # of every candidate and of dense, descending: too large under a global threshold above it
    thresholds: tuple[float, ...] = ()


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
    # tr(D G Dᵀ) / tr(W G Wᵀ) of the stored module, D = W − Ŵ, G the Gram of the dense model
    error: float | None = None
    # damage the allocation counted with, nats per token; None where it is not measured in nats
    kl: float | None = None
    # rank of the low-rank residual, counted in bits and parameters; None without compensation
    residual: int | None = None
    # options that tell the candidate from others of its method; None where it has none beside it
    options: dict[str, Any] | None = None
    # of a linear that was solved again in order: the dampings that took, by name
    sequential: dict[str, float] | None = None
    # why it stays dense whatever the budget (the calibration text says nothing about it)
    reason: str | None = None
    # linears that one decomposition covers, this one among them; none where it stands alone
    members: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return asdict(self) | {"members": list(self.members)}


@dataclass(frozen=True)
class Plan:
    """Linear name → choice. Editable as JSON and run again with `compress --plan`."""

    linears: dict[str, Choice]
    # marginal price of the budget, nats per MiB; None where the allocation measures no nats
    price: float | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    # held-out divergence of whole models: all methods together, each alone, …
    contest: dict[str, float] = field(default_factory=dict)
    # what each linear could have been, see `allocation.curves`
    curves: tuple[dict[str, Any], ...] = ()
    # what was tried in search of the recipe, and what was taken
    search: dict[str, Any] = field(default_factory=dict)
    # repair, heal → whether it was kept, divergences before and after
    trained: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return what plan.json holds: all but the curves, which have a file of their own."""
        linears = {name: choice.to_json() for name, choice in self.linears.items()}
        data = {key: value for key, value in asdict(self).items() if key != "curves"}
        return {"version": VERSION} | data | {"linears": linears}

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Plan":
        """Read what `to_json` gives, of this version or an older one.

        Raises ValueError for a newer version, KeyError or TypeError for anything else.
        """
        if (version := data.get("version", 1)) > VERSION:
            raise ValueError(f"version {version}, this release reads {VERSION} and older ones")
        return Plan(
            linears={name: _read_choice(choice) for name, choice in data["linears"].items()},
            price=data.get("price"),
            recipe=data.get("recipe", {}),
            contest=rename_keys(data.get("contest", {})),
            search=rename_keys(data.get("search", {})),
            trained=data.get("trained", {}),
        )


def rename_keys(data: dict[str, Any]) -> dict[str, Any]:
    """Return a contest or a search of any version with the keys of this one."""
    return {RENAMED.get(key, key): value for key, value in data.items()}


def _read_choice(data: dict[str, Any]) -> Choice:
    """Read one choice; version 1 has its members among the setting, as `shared`."""
    setting = dict(data["setting"])
    members = data.get("members") or setting.pop("shared", ())
    return Choice(**data | {"setting": setting, "members": tuple(members)})
