"""Rounding a weight to a grid of integers: scales with clip search, nearest codes, and error feedback in the metric. Pure tensors.

References: error feedback column by column is GPTQ (arXiv 2210.17323); feedback along both sides of the two-sided metric is YAQA's
(arXiv 2505.22988); the clip search is weighted by the metric's diagonal (quantisation card §2).

Glossary
    metric  tr(H D M Dᵀ), D = W − Ŵ                     scale s (out, groups)      zero z, integer     Ŵ = s (q − z)
    inner   U (in, in), upper, UᵀU = (M + damping)⁻¹    Cholesky(H⁻¹)ᵀ of GPTQ, in the order in which inputs are rounded
    outer   V (out, out), upper, VᵀV = (H + damping)⁻¹  the same for the outputs; the identity for GPTQ
    error e (out, in) = (w − ŵ) / (U_jj V_ii), w with the feedback it has received: D = Vᵀ e U, and tr(H D M Dᵀ) = Σ e² with both damped
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Where the codes of a weight (out, in) may lie; scales already have the precision that is stored."""

    scales: Tensor  # (out, groups) float64
    zeros: Tensor | None  # (out, groups) float64, integers; None if symmetric
    bits: int
    group: int

    def columns(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of every entry, (out, in) each."""
        scales = self.scales.repeat_interleave(self.group, 1)
        return scales, torch.zeros_like(scales) if self.zeros is None else self.zeros.repeat_interleave(self.group, 1)


@dataclass(frozen=True)
class Entries:
    """Scale and zero point of every entry of K grids, (K, out, in) each, and half of their numbers of codes, (K, 1)."""

    scales: Tensor
    zeros: Tensor
    halves: Tensor

    @classmethod
    def of(cls, grids: Sequence[Grid]) -> "Entries":
        scales, zeros = map(torch.stack, zip(*(grid.columns() for grid in grids), strict=True))
        return cls(scales, zeros, torch.tensor([[2.0 ** (grid.bits - 1)] for grid in grids], dtype=scales.dtype, device=scales.device))

    def at(self, *place: Any) -> "Entries":
        """Those of some outputs and inputs."""
        return Entries(self.scales[:, *place], self.zeros[:, *place], self.halves)

    def round(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest codes of values, (K, entries), and what rounding loses."""
        codes = nearest(values, self.scales, self.zeros, self.halves)
        return codes, values - self.scales * (codes - self.zeros)


def nearest(values: Tensor, scales: Tensor, zeros: Tensor, half: Tensor | int) -> Tensor:
    """Codes from −half to half − 1 nearest to `values`."""
    return (values / scales + zeros).round().clamp(-half, half - 1)


def fit_grid(weight: Tensor, bits: int, group: int, symmetric: bool, importance: Tensor, clips: Tensor, dtype: torch.dtype) -> Grid:
    """Scales and zero points by clip search: of the ranges clipped to `clips` times the whole one, each group takes the best.

    weight: (out, in) float64; importance: (in,), what a squared error of each input counts. Symmetric scales are negative where the entry
    of largest magnitude is positive, since there is one more code below zero than above. Scales are rounded to `dtype` before the codes are
    chosen; one beyond its range is infinite. A group of zeros has scale 1.
    """
    parts, weights = weight.unflatten(1, (-1, group)), importance.unflatten(0, (-1, group))  # (out, groups, group)
    best = torch.full(parts.shape[:2], torch.inf, dtype=weight.dtype, device=weight.device)
    low, high, half = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0), 2 ** (bits - 1)
    whole = -torch.where(high > -low, high, low) / half if symmetric else (high - low) / (2 * half - 1)
    scales, zeros = stored(whole, dtype), torch.zeros_like(best)
    for clip in clips.tolist():
        scale = stored(clip * whole, dtype)
        zero = torch.zeros_like(scale) if symmetric else (-half - clip * low / scale).round().clamp(-half, half - 1)
        values = scale[..., None] * (nearest(parts, scale[..., None], zero[..., None], half) - zero[..., None])
        error = ((parts - values).square() * weights).sum(2)
        better = error < best
        best, scales, zeros = (torch.where(better, new, old) for new, old in ((error, best), (scale, scales), (zero, zeros)))
    return Grid(scales, None if symmetric else zeros, bits, group)


def stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as they will be stored: rounded to `dtype`, 1 for a group of zeros, and never so small that they vanish."""
    tiny = torch.finfo(dtype).tiny
    rounded = scales.to(dtype).to(scales.dtype)
    return torch.where(rounded.abs() < tiny, torch.where(scales == 0, 1.0, tiny), rounded)


def round_columns(weight: Tensor, grids: Sequence[Grid], inner: Tensor, order: Tensor, block: int) -> Tensor:
    """Codes (K, out, in) on K grids by error feedback from input to input in `order`, all outputs at once: GPTQ.

    weight: (out, in) float64; inner: U (in, in) in that order. Blocks only delay the update of the columns behind them.
    """
    entries = Entries.of(grids).at(slice(None), order)
    weight = weight[:, order].expand_as(entries.scales).clone()
    codes = torch.empty_like(weight)
    for start in range(0, len(order), block):
        end = min(start + block, len(order))
        errors = torch.empty_like(weight[..., start:end])
        for column in range(start, end):
            codes[..., column], lost = entries.at(slice(None), column).round(weight[..., column])
            errors[..., column - start] = error = lost / inner[column, column]
            weight[..., column + 1 : end] -= error[..., None] * inner[column, column + 1 : end]
        weight[..., end:] -= errors @ inner[start:end, end:]
    return codes[..., order.argsort()]


def round_entries(weight: Tensor, grids: Sequence[Grid], inner: Tensor, order: Tensor, outer: Tensor, rows: Tensor, block: int) -> Tensor:
    """Codes (K, out, in) by error feedback from input to input in `order` and from output to output in `rows`: the two-sided metric.

    inner: U (in, in) and outer: V (out, out) in those orders. An entry needs those before it in its row and in its column, so the entries
    of one antidiagonal of a block are rounded together; between blocks, feedback is a matrix product.
    """
    entries = Entries.of(grids).at(rows[:, None], order)
    weight = weight[rows][:, order].expand_as(entries.scales).clone()
    codes = torch.empty_like(weight)
    for top in range(0, len(rows), block):
        across = slice(top, min(top + block, len(rows)))
        passed = torch.zeros_like(weight[:, across])  # e U of these outputs so far
        for left in range(0, len(order), block):
            along = slice(left, min(left + block, len(order)))
            corner = Corner(weight[:, across, along], passed[..., along], entries.at(across, along), outer[across, across])
            codes[:, across, along], errors = corner.round(inner[along, along])
            passed[..., left:] += errors @ inner[along, left:]
        weight[:, across.stop :] -= outer[across, across.stop :].T @ passed
    return codes[:, rows.argsort()[:, None], order.argsort()]


@dataclass(frozen=True)
class Corner:
    """One block of entries, with the feedback from the blocks before it: from above in `weight`, from the left in `passed`."""

    weight: Tensor  # (K, out, in)
    passed: Tensor  # (K, out, in)
    entries: Entries
    outer: Tensor  # V of these outputs

    def round(self, inner: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and errors e, (K, out, in) each, antidiagonal after antidiagonal; inner: U of these inputs."""
        _, height, width = self.weight.shape
        passed, codes, errors = self.passed.clone(), torch.empty_like(self.weight), torch.empty_like(self.weight)
        divisor = torch.outer(self.outer.diagonal(), inner.diagonal())
        for diagonal in range(height + width - 1):
            i = torch.arange(max(0, diagonal - width + 1), min(height, diagonal + 1), device=self.weight.device)
            j = diagonal - i
            now = self.weight[:, i, j] - (self.outer[:, i] * passed[..., j]).sum(1)
            codes[:, i, j], lost = self.entries.at(i, j).round(now)
            errors[:, i, j] = error = lost / divisor[i, j]
            passed[:, i] += error[..., None] * inner[j]
        return codes, errors
