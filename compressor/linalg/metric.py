"""Metrics of the error of a weight, and that error. Pure functions of tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """M = scale · moment − mean meanᵀ + shift · I, a positive semi-definite (in, in) matrix that is
    never formed.

    The moment is shared by every linear that reads the same inputs, so scaling, centring and
    shrinking must not copy it. moment: (in, in), its diagonal (in,), or None for the identity;
    mean: (in,) or None.
    """

    moment: Tensor | None = None
    scale: float = 1.0
    mean: Tensor | None = None
    shift: float = 0.0

    def shrink(self, fraction: float) -> "Metric":
        """Shrink towards the scaled identity: (1 − a) M + a · mean(diag M) · I, a in [0, 1]."""
        if self.moment is None:
            return self  # the identity
        level = self.scale * self.moment.diagonal().double().mean().item()
        return Metric(self.moment, (1 - fraction) * self.scale, shift=fraction * level)

    def matrix(self) -> Tensor:
        """Form M (in, in) of a full moment that is not centred: a new tensor, float64."""
        if self.moment is None:
            raise ValueError("the identity has no size to be formed in")
        matrix = self.scale * self.moment.double()
        matrix.diagonal().add_(self.shift)
        return matrix

    def diagonal(self) -> Tensor:
        """Form the diagonal of M (in,), float64, as `matrix` does."""
        if self.moment is None:
            raise ValueError("the identity has no size to be formed in")
        return self.scale * self.moment.diagonal().double() + self.shift

    def weigh(self, weight: Tensor) -> Tensor:
        """Multiply W (out, in) by M: (out, in), float64."""
        weight = weight.double()
        if self.moment is None:
            weighted = self.scale * weight
        else:
            moment = self.moment.double()
            weighted = self.scale * (weight @ moment if moment.ndim == 2 else weight * moment)
        if self.mean is not None:
            weighted = weighted - torch.outer(weight @ self.mean, self.mean)
        return weighted + self.shift * weight if self.shift else weighted

    def energy(self, weight: Tensor) -> float:
        """Compute tr(W M Wᵀ), summed in float64."""
        return (self.weigh(weight) * weight).sum(dtype=torch.float64).item()


def relative_error(
    weight: Tensor,
    approximation: Tensor,
    metric: Metric,
    root: Tensor | None = None,
    whole: float | None = None,
) -> float:
    """Compute tr(H D M Dᵀ) / tr(H W M Wᵀ), D = W − Ŵ: the error that plans and reports speak of;
    0 when the weight has no energy.

    Args:
        weight: W (out, in).
        approximation: Ŵ (out, in).
        metric: M (in, in).
        root: L (out, out) with L Lᵀ = H, or None for H = I.
        whole: the denominator, where it is known.
    """
    weight = weight.double()
    lost = weight - approximation.double()
    if whole is None:
        whole = metric.energy(weight if root is None else root.T @ weight)
    return metric.energy(lost if root is None else root.T @ lost) / whole if whole > 0 else 0.0


def shrink(moment: Tensor, fraction: float) -> Tensor:
    """Shrink a matrix (n, n) that is to be factorised, as `Metric.shrink`; a new tensor unless
    a = 0.
    """
    if fraction == 0:
        return moment
    mean = moment.diagonal().mean()
    return torch.diagonal_scatter(
        (1 - fraction) * moment, (1 - fraction) * moment.diagonal() + fraction * mean
    )
