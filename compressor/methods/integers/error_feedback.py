"""Rounding a weight to a grid of integers: scales with clip search, nearest codes, and error
feedback in the metric. Pure tensors.

References: error feedback column by column is GPTQ (arXiv 2210.17323); feedback along both sides of
the two-sided metric is YAQA's (arXiv 2505.22988); the clip search is weighted by the metric's
diagonal.

Glossary
    metric  tr(H D M Dᵀ), D = W − Ŵ                     scale s (out, groups)      zero z, integer
            Ŵ = s (q − z)
    inner   U (in, in), upper, UᵀU = (M + damping)⁻¹    Cholesky(H⁻¹)ᵀ of GPTQ, in the order in
            which inputs are rounded
    outer   V (out, out), upper, VᵀV = (H + damping)⁻¹  the same for the outputs; the identity for
            GPTQ
    error e (out, in) = (w − ŵ) / (U_jj V_ii), w with the feedback it has received: D = Vᵀ e U, and
    tr(H D M Dᵀ) = Σ e² with both damped
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Grid:
    """Where the codes of a weight (out, in) may lie; scales already have the precision that is
    stored.
    """

    scales: Tensor  # (out, groups) float64
    zeros: Tensor | None  # (out, groups) float64, integers; None if symmetric
    bits: int
    group: int

    def columns(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of every entry, (out, in) each."""
        scales = self.scales.repeat_interleave(self.group, 1)
        return scales, torch.zeros_like(
            scales
        ) if self.zeros is None else self.zeros.repeat_interleave(self.group, 1)


@dataclass(frozen=True)
class Entries:
    """Scale and zero point of every entry of K grids, (K, out, in) each, and half of their numbers
    of codes, (K, 1).
    """

    scales: Tensor
    zeros: Tensor
    halves: Tensor

    @classmethod
    def of(cls, grids: Sequence[Grid]) -> "Entries":
        scales, zeros = map(torch.stack, zip(*(grid.columns() for grid in grids), strict=True))
        return cls(
            scales,
            zeros,
            torch.tensor(
                [[2.0 ** (grid.bits - 1)] for grid in grids],
                dtype=scales.dtype,
                device=scales.device,
            ),
        )

    def at(self, *place: Any) -> "Entries":
        """Those of some outputs and inputs."""
        return Entries(self.scales[:, *place], self.zeros[:, *place], self.halves)

    def round(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest codes of values, (K, entries), and what rounding loses."""
        codes = nearest(values, self.scales, self.zeros, self.halves)
        return codes, values - self.scales * (codes - self.zeros)


def nearest(values: Tensor, scales: Tensor, zeros: Tensor, half: Tensor | int) -> Tensor:
    """Codes from −half to half − 1 nearest to `values`."""
    half = torch.as_tensor(half).to(values)
    return (values / scales + zeros).round().clamp(-half, half - 1)


def fit_grid(
    weight: Tensor,
    bits: int,
    group: int,
    symmetric: bool,
    importance: Tensor,
    clips: Tensor,
    dtype: torch.dtype,
) -> Grid:
    """Scales and zero points by clip search: of the ranges clipped to `clips` times the whole one,
    each group takes the best.

    weight: (out, in) float64; importance: (in,), what a squared error of each input counts.
    Symmetric scales are negative where the entry of largest magnitude is positive, since there is
    one more code below zero than above. Scales are rounded to `dtype` before the codes are chosen;
    one beyond its range is infinite. A group of zeros has scale 1.
    """
    parts, weights = (
        weight.unflatten(1, (-1, group)),
        importance.unflatten(0, (-1, group)),
    )  # (out, groups, group)
    low, high, half = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0), 2 ** (bits - 1)
    whole = (
        -torch.where(high > -low, high, low) / half if symmetric else (high - low) / (2 * half - 1)
    )
    best = torch.full(whole.shape, torch.inf, device=weight.device)
    scales, zeros = stored(whole, dtype), torch.zeros_like(whole)
    size = (
        parts.abs().amax().clamp(min=torch.finfo(torch.float64).tiny)
    )  # single precision is enough to compare, and not wide
    parts, weights = (
        (parts / size).float(),
        (weights / weights.amax().clamp(min=torch.finfo(torch.float64).tiny)).float(),
    )
    for clip in clips.tolist():
        scale = stored(clip * whole, dtype)
        zero = (
            torch.zeros_like(scale)
            if symmetric
            else (-half - clip * low / scale).round().clamp(-half, half - 1)
        )
        step = (scale / size).float()[..., None]
        ends = (
            (-half, half - 1)
            if symmetric
            else ((bound - zero).float()[..., None] for bound in (-half, half - 1))
        )
        off = (parts / step).round_().clamp_(*ends)
        error = off.mul_(step).sub_(parts).square_().mul_(weights).sum(2)
        better = error < best
        best, scales, zeros = (
            torch.where(better, new, old)
            for new, old in ((error, best), (scale, scales), (zero, zeros))
        )
    return Grid(scales, None if symmetric else zeros, bits, group)


def stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as they will be stored: rounded to `dtype`, 1 for a group of zeros, and never so small
    that they vanish.
    """
    tiny = torch.finfo(dtype).tiny
    rounded = scales.to(dtype).to(scales.dtype)
    return torch.where(rounded.abs() < tiny, torch.where(scales == 0, 1.0, tiny), rounded)


def round_columns(
    weight: Tensor, grids: Sequence[Grid], inner: Tensor, order: Tensor, block: int
) -> Tensor:
    """Codes (K, out, in) on K grids by error feedback from input to input in `order`, all outputs
    at once: GPTQ.

    weight: (out, in), or one for each grid (K, out, in), float64; inner: U (in, in) in that order.
    """
    return feed_back(weight, Entries.of(grids), inner, order, block)


def feed_back(weight: Tensor, entries: Entries, inner: Tensor, order: Tensor, block: int) -> Tensor:
    """`round_columns` on scales of any layout; U may be one for each grid too. Blocks only delay
    the update of the columns behind them.
    """
    entries = entries.at(slice(None), order)
    weight = weight[..., order].expand_as(entries.scales).clone()
    codes = torch.empty_like(weight)
    for start in range(0, len(order), block):
        end = min(start + block, len(order))
        errors = torch.empty_like(weight[..., start:end])
        for column in range(start, end):
            codes[..., column], lost = entries.at(slice(None), column).round(weight[..., column])
            errors[..., column - start] = error = lost / inner[..., column, column, None]
            weight[..., column + 1 : end] -= (
                error[..., None] * inner[..., column, None, column + 1 : end]
            )
        weight[..., end:] -= errors @ inner[..., start:end, end:]
    return codes[..., order.argsort()]


def round_entries(
    weight: Tensor,
    grids: Sequence[Grid],
    inner: Tensor,
    order: Tensor,
    outer: Tensor,
    rows: Tensor,
    block: int,
) -> Tensor:
    """Codes (K, out, in) by error feedback from input to input in `order` and from output to output
    in `rows`: the two-sided metric.

    inner: U (in, in) and outer: V (out, out) in those orders. An entry needs those before it in its
    row and in its column, so the blocks of one antidiagonal of blocks are rounded together, and in
    them the entries of one antidiagonal; between blocks, feedback is a product.
    """
    (height, width), entries = weight.shape, Entries.of(grids).at(rows[:, None], order)
    right, below = (
        -width % block,
        -height % block,
    )  # so much is added for whole blocks; nothing reaches it, and it reaches nothing
    scales = functional.pad(entries.scales, (0, right, 0, below), value=1.0)
    zeros = functional.pad(entries.zeros, (0, right, 0, below))
    entries = Entries(scales, zeros, entries.halves)
    inner = torch.block_diag(inner, torch.eye(right, dtype=inner.dtype, device=inner.device))
    outer = torch.block_diag(outer, torch.eye(below, dtype=outer.dtype, device=outer.device))
    weight = functional.pad(weight[rows][:, order], (0, right, 0, below))
    codes, errors, passed = (
        torch.zeros_like(entries.scales) for _ in range(3)
    )  # passed: e U of all blocks so far
    down, along = (height + below) // block, (width + right) // block
    for front in range(down + along - 1):
        places = [
            (
                slice(row * block, (row + 1) * block),
                slice((front - row) * block, (front - row + 1) * block),
            )
            for row in range(max(0, front - along + 1), min(down, front + 1))
        ]
        reached = [
            errors[:, row, : column.start] @ inner[: column.start, column] for row, column in places
        ]
        now = [
            weight[row, column] - outer[: row.start, row].T @ passed[:, : row.start, column]
            for row, column in places
        ]
        corners = Corners(
            torch.stack(now),
            torch.stack(reached),
            Entries(
                torch.stack([entries.scales[:, row, column] for row, column in places]),
                torch.stack([entries.zeros[:, row, column] for row, column in places]),
                entries.halves,
            ),
            torch.stack([outer[row, row] for row, _ in places])[:, None],
            torch.stack([inner[column, column] for _, column in places])[:, None],
        )
        for (row, column), *found in zip(places, *corners.round(), strict=True):
            codes[:, row, column], errors[:, row, column], passed[:, row, column] = found
    return codes[:, :height, :width][:, rows.argsort()[:, None], order.argsort()]


@dataclass(frozen=True)
class Corners:
    """N blocks of entries, with the feedback from the blocks before each: from above in `weight`,
    from the left in `passed`.
    """

    weight: Tensor  # (N, K, out, in)
    passed: Tensor  # (N, K, out, in)
    entries: Entries
    outer: Tensor  # (N, 1, out, out) V of the outputs of each
    inner: Tensor  # (N, 1, in, in) U of its inputs

    def round(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, errors e and e U, (N, K, out, in) each, antidiagonal after antidiagonal.

        Inputs are turned around, which makes antidiagonals diagonals, and these views: nothing is
        gathered.
        """
        turned = (
            self.weight,
            self.passed,
            self.inner.flip(-2),
            self.entries.scales,
            self.entries.zeros,
        )
        weight, passed, inner, scales, zeros = (part.flip(-1) for part in turned)
        height, width = weight.shape[-2:]
        codes, errors = torch.empty_like(weight), torch.empty_like(weight)
        divisor = (
            self.outer.diagonal(dim1=-2, dim2=-1)[..., None]
            * inner.diagonal(dim1=-2, dim2=-1)[..., None, :]
        )
        for offset in range(width - 1, -height, -1):
            top, left = max(0, -offset), max(0, offset)
            size = min(height - top, width - left)
            bottom, right = top + size, left + size
            place = partial(torch.diagonal, offset=offset, dim1=-2, dim2=-1)
            now = place(weight) - (
                self.outer[..., :bottom, top:bottom] * passed[..., :bottom, left:right]
            ).sum(-2)
            chosen, lost = Entries(place(scales), place(zeros), self.entries.halves).round(now)
            error = lost / place(divisor)
            place(codes).copy_(chosen)
            place(errors).copy_(error)
            passed[..., top:bottom, :right].addcmul_(
                error[..., None], inner[..., left:right, :right]
            )
        return codes.flip(-1), errors.flip(-1), passed.flip(-1)
