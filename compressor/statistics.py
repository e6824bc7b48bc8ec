"""Calibration statistics of one linear layer: additive sums over tokens, so that shards (batches,
processes) add.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from compressor import linalg
from compressor.errors import DataError
from compressor.files.documents import some


@dataclass(frozen=True)
class LinearStats:
    """Sums over calibration tokens at the input x (in,) and the output gradient g (out,) of one
    linear. Absent is None.

    Every field is a sum, never a mean. Output gradients may be clipped or trimmed, so their sums
    carry `grad_tokens` of their own. g is the gradient of the summed next-token cross-entropy in
    nats. In sequential runs x is what the linear receives behind the compressed linears before it,
    x₀ what it receives in the dense model for the same token; the gradient sums stay those of the
    dense model.
    """

    tokens: int = 0
    gram: Tensor | None = None  # (in, in) float64: sum of x xᵀ
    sum: Tensor | None = None  # (in,) float64: sum of x
    abs_sum: Tensor | None = None  # (in,) float64: sum of |x|
    # (in, in) float64: sum of x₀ xᵀ, rows by the dense input; sequential runs only
    cross_gram: Tensor | None = None
    # (in,) float64: sum of ‖g‖² x², the squared weight gradient of each token summed over outputs
    fisher: Tensor | None = None
    grad_tokens: int = 0  # tokens behind `fisher` and `grad_gram`
    grad_gram: Tensor | None = None  # (out, out) float64: sum of g gᵀ

    def __add__(self, other: "LinearStats") -> "LinearStats":
        """Add the sums of two shards that collected the same fields."""
        merged: dict[str, Any] = {}
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if (mine is None) != (theirs is None):
                raise DataError(
                    f"statistics shards cannot be added: only one of them has '{field.name}'"
                )
            merged[field.name] = None if mine is None else mine + theirs
        return LinearStats(**merged)

    def require(self, linear: str, needs: frozenset[str]) -> None:
        """Raise DataError naming the linear and the missing fields unless all of `needs` were
        collected.
        """
        missing = sorted(name for name in needs if getattr(self, name) is None)
        if missing:
            raise DataError(
                f"{linear}: the statistics lack {', '.join(missing)}; collect them with "
                "`compressor calibrate MODEL STATS --config RECIPE`"
            )

    def total(self, linear: str, name: str) -> Tensor:
        """Return one of the sums.

        Raises:
            DataError: it was not collected; names the linear.
        """
        self.require(linear, frozenset({name}))
        return getattr(self, name)

    @property
    def silence(self) -> str | None:
        """Why the text says nothing about this linear: a clause for people; None where it says
        something.

        Without tokens, with inputs that are zero, or without a gradient, every metric of its weight
        is identically zero: each approximation is as good as any other, and no damping makes it
        less so. Such a linear stays dense, see `stages.left_dense`.
        """
        if self.tokens == 0:
            return "no token reaches it"
        if self.gram is not None and not self.gram.diagonal().any():
            return "its inputs are all zero"
        gradients = self.fisher if self.grad_gram is None else self.grad_gram.diagonal()
        return "no gradient reaches it" if gradients is not None and not gradients.any() else None

    def gradient_moment(self, linear: str, shrink: float) -> Tensor:
        """H (out, out), float64: the mean g gᵀ, shrunk towards its mean diagonal by a fraction
        `shrink`.

        Raises DataError naming the linear where the gradients were not collected, or are all zero
        and would weigh every error by nothing.
        """
        grad_gram = self.total(linear, "grad_gram")
        if not grad_gram.diagonal().any():
            raise DataError(
                f"{linear}: no gradient reaches it, so metric 'two_sided' does not see it; leave "
                "it dense or take 'gram'"
            )
        return linalg.shrink(grad_gram.double() / self.grad_tokens, shrink)

    def gradient_root(self, linear: str, shrink: float, option: str = "shrink_grad_gram") -> Tensor:
        """Lower L (out, out) with L Lᵀ = H of `gradient_moment`, float64.

        Raises as that does, and NumericalError that names the damping `option` to raise where H is
        singular.
        """
        return linalg.cholesky(
            self.gradient_moment(linear, shrink), f"{linear}: the output-gradient moment", option
        )


def describe_blind_spots(statistics: Mapping[str, LinearStats]) -> list[str]:
    """Name the linears of whose inputs the text shows too little: what their weights do there
    counts for nothing. Silent linears are named elsewhere.

    Directions without energy are left out of every metric by themselves; these are the ones that
    can be told without a decomposition.

    Args:
        statistics: by name of the linear.

    Returns:
        At most two lines, without a full stop.
    """
    energies = {  # (in,), sums over tokens of each squared input
        name: stats.gram.diagonal()
        for name, stats in statistics.items()
        if stats.gram is not None and stats.silence is None
    }
    dead = {name: int((energy <= 0).sum()) for name, energy in energies.items()}
    missing = {name: len(energy) - statistics[name].tokens for name, energy in energies.items()}
    lines = []
    if names := [name for name, count in dead.items() if count]:
        worst = max(names, key=dead.__getitem__)
        lines.append(
            f"{len(names)} linears have inputs that the text never sets ({worst}: {dead[worst]} "
            f"of {len(energies[worst])})"
        )
    if names := [name for name, count in missing.items() if count > 0]:
        worst = max(names, key=missing.__getitem__)
        tokens = f"{statistics[worst].tokens} for {len(energies[worst])}"
        lines.append(
            f"{len(names)} linears have more inputs than the text has tokens ({worst}: {tokens}); "
            "give more text"
        )
    return lines


def describe_dense(reasons: Mapping[str, str]) -> list[str]:
    """Give each reason why linears stay dense a line.

    Args:
        reasons: name of a linear → a clause.
    """
    named: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        named.setdefault(reason, []).append(name)
    return [
        f"{len(names)} linears stay dense, each because {reason}: {some(names)}"
        for reason, names in named.items()
    ]
