"""Calibration statistics of one linear layer: additive sums over tokens, so that shards (batches, processes) add."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

from torch import Tensor

from compressor.errors import DataError


@dataclass(frozen=True)
class LinearStats:
    """Sums over calibration tokens at the input x (in,) and the output gradient g (out,) of one linear. Absent is None.

    Every field is a sum, never a mean. Output gradients may be clipped or trimmed, so their sums carry `grad_tokens` of their own.
    g is the gradient of the summed next-token cross-entropy in nats. In sequential runs x is what the linear receives behind the compressed
    linears before it, x₀ what it receives in the dense model for the same token; the gradient sums stay those of the dense model.
    """

    tokens: int = 0
    gram: Tensor | None = None  # (in, in) float64: sum of x xᵀ
    sum: Tensor | None = None  # (in,) float64: sum of x
    abs_sum: Tensor | None = None  # (in,) float64: sum of |x|
    cross_gram: Tensor | None = None  # (in, in) float64: sum of x₀ xᵀ, rows by the dense input; sequential runs only
    fisher: Tensor | None = None  # (in,) float64: sum of ‖g‖² x², the squared weight gradient of each token summed over outputs
    grad_tokens: int = 0  # tokens behind `fisher` and `grad_gram`
    grad_gram: Tensor | None = None  # (out, out) float64: sum of g gᵀ

    def __add__(self, other: "LinearStats") -> "LinearStats":
        """Add the sums of two shards that collected the same fields."""
        merged = {}
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if (mine is None) != (theirs is None):
                raise DataError(f"statistics shards cannot be added: only one of them has '{field.name}'")
            merged[field.name] = None if mine is None else mine + theirs
        return LinearStats(**merged)

    def require(self, linear: str, needs: frozenset[str]) -> None:
        """Raise DataError naming the linear and the missing fields unless all of `needs` were collected."""
        missing = sorted(name for name in needs if getattr(self, name) is None)
        if missing:
            raise DataError(
                f"{linear}: the statistics lack {', '.join(missing)}; collect them with `compressor calibrate MODEL STATS --config RECIPE`"
            )


def blind_spots(stats: Mapping[str, LinearStats]) -> list[str]:
    """Lines about linears of whose inputs the text shows too little: what their weights do there counts for nothing.

    Directions without energy are left out of every metric by themselves; these are the ones that can be told without a decomposition.
    """
    grams = {name: one for name, one in stats.items() if one.gram is not None}
    dead = {name: (one.gram.diagonal() <= 0).sum().item() for name, one in grams.items()}
    few = {name: len(one.gram) - one.tokens for name, one in grams.items() if one.tokens < len(one.gram)}
    lines = []
    if names := [name for name, count in dead.items() if count]:
        worst = max(names, key=dead.__getitem__)
        lines.append(f"{len(names)} linears have inputs that the text never sets ({worst}: {dead[worst]} of {len(grams[worst].gram)})")
    if few:
        worst = max(few, key=few.__getitem__)
        count = f"{grams[worst].tokens} for {len(grams[worst].gram)}"
        lines.append(f"{len(few)} linears have more inputs than the text has tokens ({worst}: {count}); give more text")
    return lines
