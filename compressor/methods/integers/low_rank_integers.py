"""Low rank in a metric with integer factors: Ŵ = B̂ Â, both packed codes, each rounded in the
metric that its error is seen in.

References: SVD-LLM with GPTQ (arXiv 2403.07378, 2210.17323): factors first, then GPTQ on both. One
factor refitted on the other, which is rounded already, is one sweep of LPLR and CALDERA (arXiv
2310.11028, 2405.18886).

Glossary
    metric M, grad_gram H = L Lᵀ, σ   as in `low_rank`
    down A (r, in)   D⁻¹ Uᵀ Lᵀ W, rounded under M: Lᵀ B has orthogonal columns, so tr(H B (A − Â) M
                     (A − Â)ᵀ Bᵀ) counts the rows of A one by one, and those of every rank are
                     the first of one rounding
    up B (out, r)    W M Âᵀ S⁺ with S = Â M Âᵀ: least squares on the rounded Â, whatever H is;
                     rounded under H and S, the second moment of what Â makes of the inputs
    balance D        √σ, as in the paper: the outputs of B have one scale for all of its inputs, so
                     inputs that count more are larger

Differs from the papers: SVD-LLM's code collects the second moment of A x, not of Â x, and refits
nothing. The refit takes no damping but leaves directions in which S has nothing (pseudo-inverse).

Screening: error(r) = tail(r) + excess(r). The tail is that of exact factors, in closed form; the
excess, what rounding adds, is measured at a few ranks, the anchors, by the very function that
builds modules, and interpolated between them.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from compressor.linalg import Metric
from compressor.linears import Chained, Dense, Packed
from compressor.linears.packed import packed_size
from compressor.methods import register
from compressor.methods.base import Approximation
from compressor.methods.integers.quantize import (
    Bits,
    Group,
    Prepared,
    QuantizeMethod,
    Scheme,
    group_size,
)
from compressor.methods.low_rank.low_rank import Factors, LowRankMethod
from compressor.methods.sparse.base import MetricName, TwoSided, Weighed
from compressor.plan import Candidate, Curve
from compressor.statistics import LinearStats

SMALLEST = 1e-4  # of the balance, beside its largest entry: directions without energy stay finite


@dataclass(frozen=True)
class Rounded:
    """One linear decomposed at full rank, with the down factor of all ranks."""

    factors: Factors
    down: Packed  # (k, in)
    damping: float | None  # that its error feedback took; None without


def balance_down(factors: Factors) -> Tensor:
    """Down factor (k, in) at full rank, float64, scaled so that the largest column of the up factor
    has length 1, the others √(σ ÷ σ₁).
    """
    up, down = factors.factors(len(factors.values))
    lengths = up.norm(dim=0)  # gradients may be far from 1, and half precision is not wide
    sizes = factors.values.clamp(min=0).sqrt() * lengths
    balance = (
        (sizes / sizes.max().clamp(min=torch.finfo(sizes.dtype).tiny)).sqrt().clamp(min=SMALLEST)
    )
    return down * (lengths / balance)[:, None]


def refit(weight: Tensor, down: Tensor, metric: Metric) -> tuple[Tensor, Tensor]:
    """Up factor (out, r) that is best for a down factor (r, in), and S (r, r), float64."""
    weighted = metric.weigh(down)
    moment = weighted @ down.double().T
    return weight.double() @ weighted.T @ torch.linalg.pinv(moment, hermitian=True), moment


@register
@dataclass(frozen=True)
class LowRankIntegers(TwoSided[Rounded]):
    """Best rank-r weight in a chosen metric, both factors stored as integer codes."""

    name: ClassVar[str] = "low_rank_integers"
    paper: ClassVar[str] = "SVD-LLM, arXiv 2403.07378; GPTQ, arXiv 2210.17323"
    integers: ClassVar[bool] = True

    solver: Literal["rtn", "gptq"] = "gptq"
    metric: MetricName = "gram"
    bits: Bits = 4  # width of the codes of both factors
    # inputs of the down factor that share a scale, as in `quantize`; the up factor has one for each
    # output
    group: Group = "auto:32"
    symmetric: bool = True  # no zero points
    # smallest part of a range that the clip search tries; 1 for none
    clip: Annotated[float, Field(gt=0, le=1)] = 0.4
    # `gptq` only: over the mean diagonal, the first that works
    damping: tuple[Annotated[float, Field(ge=0)], ...] = (0.01, 0.1, 1.0)
    # ranks offered; by default at most 256 of them, evenly spaced
    rank_step: Annotated[int, Field(ge=1)] | None = None
    # ranks at which the error is measured; null for all
    anchors: Annotated[int, Field(ge=2)] | None = 8

    @property
    def exact(self) -> LowRankMethod:
        """Low rank in the same metric, factors not rounded."""
        return LowRankMethod(
            metric=self.metric, shrink_gram=self.shrink_gram, shrink_grad_gram=self.shrink_grad_gram
        )

    def sizes(self, dense: Dense, linear: str = "a target") -> list[Candidate]:
        """As `Method.sizes`. Raises ConfigError naming the linear if the group does not divide its
        width.
        """
        (height, width), found = dense.weight.shape, []
        full, group = min(height, width), group_size(self.group, width, linear)
        step = self.rank_step or max(1, full // 256)
        for rank in range(step, full, step):
            shapes = (rank, width, group), (height, rank, rank)
            parts = [
                packed_size(rows, columns, self.bits, size, self.symmetric)
                for rows, columns, size in shapes
            ]
            numbers = sum(scales for _, scales in parts) + (0 if dense.bias is None else height)
            bits = sum(codes for codes, _ in parts) + 8 * dense.dtype.itemsize * numbers
            if bits < dense.bits:
                found.append(
                    Candidate(
                        self.name, {"rank": rank}, bits, numbers, math.nan, rank * (height + width)
                    )
                )
        return found

    def prepare(self, linear: str, dense: Dense, stats: LinearStats) -> Rounded:
        """Decompose W (out, in) as `low_rank` does, and round the balanced down factor Uᵀ Lᵀ W
        (k, in) of full rank once: its leading rows serve every rank. Costs one eigenproblem of size
        k = min(out, in) and one rounding with error feedback, O(k · in²).
        """
        factors = self.exact.prepare(linear, dense, stats)
        group = group_size(self.group, dense.weight.shape[1], linear)
        down = Dense(balance_down(factors), None, dense.dtype)
        rounded = self.round(f"{linear}: the down factor", down, factors.metric, None, group)
        return Rounded(factors, rounded.module, rounded.damping)

    def round(
        self, what: str, dense: Dense, metric: Metric, root: Tensor | None, group: int
    ) -> Scheme:
        """Round one factor as `quantize` rounds a weight."""
        energy = metric.energy(dense.weight if root is None else root.T @ dense.weight)
        state = Prepared(Weighed(what, dense, metric, root, energy, None))
        rounder = QuantizeMethod(
            solver=self.solver, symmetric=self.symmetric, clip=self.clip, damping=self.damping
        )
        rounder.solve(state, [(self.bits, group)])
        return state.schemes[self.bits, group]

    def candidates(self, state: Rounded) -> Curve:
        """List every rank that saves bits and that no smaller one matches; errors are measured at
        the anchors.
        """
        factors, found = state.factors, list[Candidate]()
        sizes, (energy, _, tails) = self.sizes(factors.dense, factors.linear), factors.tails()
        count = len(sizes) if self.anchors is None else min(self.anchors, len(sizes))
        places = (
            sorted({round(place) for place in np.linspace(0, len(sizes) - 1, count)})
            if sizes
            else []
        )
        anchors = [sizes[place].setting for place in places]
        excess = [
            self.measure(state, self.compress(state, setting)) - tails[setting["rank"]]
            for setting in anchors
        ]
        rung = {} if state.damping is None else {"damping": state.damping}
        for size in sizes:
            rank = size.setting["rank"]
            error = tails[rank] + float(
                np.interp(rank, [setting["rank"] for setting in anchors], excess)
            )
            if not found or error < found[-1].error or error == 0:
                found.append(replace(size, setting=size.setting | rung, error=error))
        dense, screened = factors.dense, self.anchors is not None
        return Curve(
            factors.linear,
            self.name,
            tuple(found),
            dense.bits,
            dense.parameters,
            energy,
            screened=screened,
        )

    def compress(self, state: Rounded, setting: dict[str, Any]) -> Chained:
        dense, metric, rank = state.factors.dense, state.factors.metric, setting["rank"]
        down = state.down.leading(rank)
        up, moment = refit(dense.weight, down.to_dense(), metric)
        what = f"{state.factors.linear}: the up factor"
        return Chained(
            down,
            self.round(
                what, Dense(up, dense.bias, dense.dtype), Metric(moment), state.factors.root, rank
            ).module,
        )

    def measure(self, state: Rounded, module: Approximation) -> float:
        return self.exact.measure(state.factors, module)
