"""Residuals with both factors stored as integers, of every rank from one rounding of the wide
factor.

References: EoRA (arXiv 2410.21271) rounds both factors by GPTQ after the base; the refit of one
factor on the other is a sweep of LPLR and CALDERA (arXiv 2310.11028, 2405.18886).

Glossary
    lost E, metric M, H = L Lᵀ, frame   as in `residual`
    down A (r, in)   rounded under M: Lᵀ B has orthogonal columns, so tr(H B (A − Â) M (A − Â)ᵀ Bᵀ)
                     counts the rows of A one by one, and those of every rank are the first of
                     one rounding
    up B (out, r)    E M Âᵀ S⁺ with S = Â M Âᵀ: least squares on the rounded Â, whatever H is;
                     rounded rank after rank under S
    error            tr(H (E − B̂ Â) M (E − B̂ Â)ᵀ) = tail(0) − 2 tr(H B̂ Cᵀ) + tr(H B̂ S B̂ᵀ) with
                     C = E M Âᵀ: that of what is stored

Differs from the papers: EoRA's code takes both second moments before either factor is rounded and
refits nothing. Scales of B belong to a rank and a group of outputs, since there are few ranks and
many outputs. Outputs of B pass no error on to each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from compressor.linalg import Metric
from compressor.linears.packed import Packed
from compressor.methods.integers.error_feedback import (
    Entries,
    Grid,
    feed_back,
    fit_grid,
    nearest,
    round_columns,
)
from compressor.methods.low_rank.residual import Residual
from compressor.methods.sparse.sparse import obs_factor


@dataclass(frozen=True)
class Codec:
    """How factors are stored and rounded."""

    bits: int
    groups: tuple[int, int]  # outputs that share a scale of up, inputs that share one of down
    clips: Tensor  # of the clip search
    damping: Sequence[float]  # of error feedback; empty to round to nearest
    block: int
    dtype: torch.dtype  # of the scales


@dataclass(frozen=True)
class IntegerResidual:
    """Residuals of one weight up to some largest rank."""

    what: str  # for messages
    codec: Codec
    down: Packed  # (largest rank, in) Â
    cross: Tensor  # (out, largest rank) C, float64
    seen: Tensor  # (out, largest rank) Lᵀ C
    moment: Tensor  # (largest rank, largest rank) S, float64
    root: Tensor | None  # L (out, out), or None for H = I
    lost: float  # tr(H E M Eᵀ)

    def pair(self, rank: int) -> tuple[Packed, Packed]:
        """up, as its transpose (r, out), and down (r, in) of one rank; new tensors."""
        ((codes, grid),) = ups([self], rank)
        return Packed.of_codes(
            codes, grid.scales.to(self.codec.dtype), None, None, grid.bits
        ), self.down.leading(rank)


def ups(residuals: Sequence[IntegerResidual], rank: int) -> list[tuple[Tensor, Grid]]:
    """Codes (r, out) of B̂ᵀ for the first ranks of Â, and their grids, of K residuals of one
    weight, all at once.
    """
    codec, root = residuals[0].codec, residuals[0].root
    moments = torch.stack([one.moment[:rank, :rank] for one in residuals])
    exact = torch.stack([one.cross[:, :rank] for one in residuals]) @ torch.linalg.pinv(
        moments, hermitian=True
    )
    outputs = exact.new_ones(exact.shape[1]) if root is None else root.square().sum(1)
    together = fit_grid(
        exact.mT.flatten(0, 1), codec.bits, codec.groups[0], True, outputs, codec.clips, codec.dtype
    )
    grids = [replace(together, scales=scales) for scales in together.scales.split(rank)]
    across = Entries.of(grids)
    entries = Entries(across.scales.mT, across.zeros.mT, across.halves)
    if codec.damping:
        factors = [
            obs_factor(one.moment[:rank, :rank], codec.damping, f"{one.what}, up factor")[0]
            for one in residuals
        ]
        codes = feed_back(
            exact,
            entries,
            torch.stack(factors),
            torch.arange(rank, device=exact.device),
            codec.block,
        )
    else:
        codes = nearest(exact, entries.scales, entries.zeros, 2 ** (codec.bits - 1))
    return list(zip(codes.mT, grids, strict=True))


def errors(residuals: Sequence[IntegerResidual], rank: int) -> list[float]:
    """Measure what this rank leaves of each of K errors E of one weight, absolute."""
    found = []
    for one, (codes, grid) in zip(residuals, ups(residuals, rank), strict=True):
        up = (codes * grid.columns()[0]).T
        up = up if one.root is None else one.root.T @ up
        found.append(
            max(
                0.0,
                one.lost
                + ((up @ one.moment[:rank, :rank] - 2 * one.seen[:, :rank]) * up).sum().item(),
            )
        )
    return found


def round_residuals(
    what: str,
    lost: Sequence[Tensor],
    found: Sequence[Residual],
    weighing: tuple[Metric, Tensor | None, Tensor],
    codec: Codec,
    feedback: Any,
) -> list[IntegerResidual]:
    """Round the residuals of K errors E (out, in) of one weight, all down factors at once.

    weighing: metric M, root L, and the diagonal of M (in,); feedback: `inner` and `order` among the
    inputs, as in `error_feedback`, or None.
    """
    metric, root, importance = weighing
    downs = torch.stack(
        [
            part.pair(error, root, part.frame.shape[1])[1]
            for error, part in zip(lost, found, strict=True)
        ]
    )
    grids = [
        fit_grid(down, codec.bits, codec.groups[1], True, importance, codec.clips, codec.dtype)
        for down in downs
    ]
    if feedback is None:
        entries = Entries.of(grids)
        codes = nearest(downs, entries.scales, entries.zeros, 2 ** (codec.bits - 1))
    else:
        codes = round_columns(downs, grids, feedback.inner, feedback.order, codec.block)
    rounded = []
    for error, part, grid, chosen in zip(lost, found, grids, codes, strict=True):
        down = Packed.of_codes(chosen, grid.scales.to(codec.dtype), None, None, grid.bits)
        values = chosen * grid.columns()[0]
        weighted = metric.weigh(values)
        cross = error @ weighted.T
        seen = cross if root is None else root.T @ cross
        rounded.append(
            IntegerResidual(
                what, codec, down, cross, seen, weighted @ values.T, root, part.tail[0].item()
            )
        )
    return rounded
