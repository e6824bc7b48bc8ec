"""Basis of the sparse methods: the metric of one linear, the sizes on offer, the screened curve,
and the stored form.

Glossary
    payload     numbers that may be stored at a size, once mask and bias are paid for
    screening   error(size) = diagonal(size) · share(size). `diagonal`, the error if entries did not
                interact, is a sum of dropped squares, known for all sizes from one sort. `share`,
                the part of it that the solver leaves, varies by a factor of two to four while the
                error varies by four orders of magnitude. It is 1 without anchors: the curve has the
                right shape, and what is probed and built later tells the rest (`Curve.screened`).
                Otherwise it is measured at a few sizes, the anchors, by the very function that
                builds modules; its log is interpolated over the log of the numbers stored.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from compressor import linalg
from compressor.errors import ConfigError
from compressor.linalg import Metric
from compressor.linears import Dense, Sparse
from compressor.linears.masks import pack_mask
from compressor.methods.base import LinearMethod, State
from compressor.methods.dictionary.sparse_coding import ascending
from compressor.methods.sparse.admm import Problem, n_of_m, pose
from compressor.plan import Candidate, Curve
from compressor.statistics import LinearStats

MetricName = Literal["gram", "two_sided"]
Pattern = Literal["layer", "rows", "2:4", "4:8"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
NEEDS: dict[MetricName, frozenset[str]] = {
    "gram": frozenset({"gram"}),
    "two_sided": frozenset({"gram", "grad_gram"}),
}


@dataclass(frozen=True)
class Weighed:
    """One linear and the metric it is approximated in."""

    linear: str
    dense: Dense
    metric: Metric  # M, per token
    root: Tensor | None  # L: (out, out), L Lᵀ = H, per token; None where H is the identity
    energy: float  # tr(H W M Wᵀ)
    posed: Problem | None  # None where nothing is to be solved in it

    @property
    def problem(self) -> Problem:
        """The problem posed in the metric. Raises ValueError where none was."""
        if self.posed is None:
            raise ValueError(f"{self.linear}: no problem was posed in its metric")
        return self.posed

    def error(self, approximation: Tensor) -> float:
        """Measure the relative error of Ŵ (out, in)."""
        return linalg.relative_error(
            self.dense.weight, approximation, self.metric, self.root, self.energy
        )


@dataclass(frozen=True)
class TwoSided(LinearMethod[State]):
    """Abstract method whose error is tr(H D M Dᵀ), D = W − Ŵ: M of the inputs, and H of the output
    gradients where the metric is `two_sided`, the identity where it is `gram`.
    """

    metric: MetricName = "two_sided"
    shrink_gram: Fraction = 0.01  # `two_sided` only: shrinkage of the input Gram
    shrink_grad_gram: Fraction = 0.1  # `two_sided` only: shrinkage of the output-gradient moment

    @property
    def needs(self) -> frozenset[str]:
        return NEEDS[self.metric]

    def weigh(
        self, linear: str, dense: Dense, stats: LinearStats, is_posed: bool = True
    ) -> Weighed:
        """Form the metric from statistics; `two_sided` shrinks both moments as the low-rank method
        does, `gram` is taken as it is.

        Args:
            linear: its name, for messages.
            dense: W (out, in).
            stats: sums, with the fields of `needs`.
            is_posed: whether to pose the problem as well, which takes a copy of the Gram.
        """
        stats.require(linear, self.needs)
        inputs, shrink = Metric(stats.gram, 1 / stats.tokens), 0.0
        weight, grad_gram, root = dense.weight.double(), None, None
        if self.metric == "two_sided":
            shrink = self.shrink_gram
            inputs = inputs.shrink(shrink)
            grad_gram = stats.gradient_moment(linear, self.shrink_grad_gram)
            root = stats.gradient_root(linear, self.shrink_grad_gram)
        problem = None
        if is_posed:
            gram = stats.total(linear, "gram").double() / stats.tokens
            moment = linalg.shrink(gram, shrink)
            problem = pose(linear, dense.weight, moment, grad_gram)
        energy = inputs.energy(weight if root is None else root.T @ weight)
        return Weighed(linear, dense, inputs, root, energy, problem)


@dataclass(frozen=True)
class Patterned(TwoSided[State]):
    """Abstract method with a sparse weight: the options that its sizes and its ADMM loop have."""

    pattern: Pattern = "layer"
    rho: Positive = 0.1  # `admm` only: first penalty, relative to the unit diagonals
    refit: Count = 10  # `admm` only: conjugate-gradient steps of least squares on a mask
    step: Annotated[float, Field(gt=0, lt=1)] = 0.01  # between sizes, as a fraction of dense bits
    anchors: Count | None = 0  # sizes of the curve whose error is measured; None measures all


def require_divisible(pattern: Pattern, width: int, linear: str) -> None:
    """Raise ConfigError naming the linear unless an N:M pattern divides its inputs."""
    parts = n_of_m(pattern)
    if parts and width % parts[1]:
        raise ConfigError(
            f"{linear}: pattern {pattern} does not divide its {width} inputs; use pattern 'rows' "
            "or 'layer', or leave it out of the targets"
        )


def pattern_count(dense: Dense, pattern: Pattern) -> int | None:
    """Entries that an N:M pattern keeps; None where the pattern leaves their number open."""
    parts = n_of_m(pattern)
    return dense.weight.numel() * parts[0] // parts[1] if parts else None


def payloads(dense: Dense, step: float) -> list[int]:
    """Numbers that may be stored beside mask and bias at every multiple of `step` of the dense
    bits, different and ascending.

    From one entry in 32: below, the mask is most of what is stored.
    """
    height, width = dense.weight.shape
    fixed = 8 * ((height * width + 7) // 8) + (
        0 if dense.bias is None else height * dense.dtype.itemsize * 8
    )
    fractions = np.arange(1, math.ceil(1 / step)) * step
    numbers = {
        int((fraction * dense.bits + 1e-6 - fixed) // (8 * dense.dtype.itemsize))
        for fraction in fractions
    }
    return sorted(number for number in numbers if 32 * number >= height * width)


def stored_size(dense: Dense, numbers: int) -> tuple[int, int]:
    """(bits, parameters) of a weight kept as `numbers` numbers, a mask and the bias."""
    height, width = dense.weight.shape
    parameters = numbers + (0 if dense.bias is None else height)
    return parameters * dense.dtype.itemsize * 8 + 8 * ((height * width + 7) // 8), parameters


def keep_smaller(
    method: str, dense: Dense, settings: Sequence[tuple[dict, int]]
) -> list[Candidate]:
    """Candidates, errors NaN, of (setting, numbers stored) pairs that are smaller than dense in
    bits and in parameters; bits grow.
    """
    found: dict[int, Candidate] = {}
    for setting, numbers in settings:
        bits, parameters = stored_size(dense, numbers)
        if bits < dense.bits and parameters < dense.parameters:
            executed = dense.weight.numel() + setting.get("rank", 0) * sum(
                dense.weight.shape
            )  # as a dense product, see `Sparse`
            found.setdefault(bits, Candidate(method, setting, bits, parameters, math.nan, executed))
    return [found[bits] for bits in sorted(found)]


def diagonal_errors(problem: Problem, pattern: Pattern, counts: Sequence[int]) -> list[float]:
    """Sum of the dropped squares of W̃ when the largest counts[k] entries are kept: the error if
    entries did not interact.
    """
    squares = problem.weight.square()
    if parts := n_of_m(pattern):
        kept, group = parts
        return [
            ascending(squares.unflatten(1, (-1, group)), 2)[..., : group - kept].sum().item()
        ] * len(counts)
    rows = squares if pattern == "rows" else squares.flatten()[None]
    dropped = ascending(rows, 1).sum(0).cumsum(0)  # of the smallest 1, 2, … of each row
    size = rows.shape[1]
    return [
        dropped[size - 1 - count // len(rows)].item() if count < rows.numel() else 0.0
        for count in counts
    ]


def screen_curve(
    weighed: Weighed,
    method: str,
    sizes: list[Candidate],
    entries: Sequence[int],
    pattern: Pattern,
    anchors: int | None,
    errors: Callable[[list[Candidate]], list[float]],
) -> Curve:
    """Curve of `sizes` by screening, without those that a smaller one matches; `entries` are how
    many the diagonal error of each keeps.

    errors: the solver's errors of some sizes; asked for `anchors` of them, evenly spaced, or for
    all if None.
    """
    diagonal = [
        error / (weighed.energy or 1.0)
        for error in diagonal_errors(weighed.problem, pattern, entries)
    ]
    if (
        anchors == 0 and n_of_m(pattern) and len(sizes) > 1
    ):  # the same entries at every size: nothing to go by
        anchors = 4
    if anchors == 0:
        return drop_matched(weighed, method, sizes, diagonal, screened=True)
    count = len(sizes) if anchors is None else min(anchors, len(sizes))
    places = (
        sorted({round(place) for place in np.linspace(0, len(sizes) - 1, count)}) if sizes else []
    )
    measured = dict(
        zip(places, errors([sizes[place] for place in places]) if places else [], strict=True)
    )
    known = [place for place in places if measured[place] > 0 and diagonal[place] > 0]
    shares = [math.log(measured[place] / diagonal[place]) for place in known]
    numbers = np.log([size.parameters for size in sizes])
    rates = np.exp(np.interp(numbers, numbers[known], shares)) if known else np.zeros(len(sizes))
    found = [
        measured.get(place, float(rate) * part)
        for place, (rate, part) in enumerate(zip(rates, diagonal, strict=True))
    ]
    return drop_matched(weighed, method, sizes, found, screened=anchors is not None)


def drop_matched(
    weighed: Weighed, method: str, sizes: list[Candidate], errors: Sequence[float], screened: bool
) -> Curve:
    """Curve of sizes without those that a smaller one matches."""
    candidates: list[Candidate] = []
    for size, error in zip(sizes, errors, strict=True):
        if not candidates or error < candidates[-1].error or error == 0:
            candidates.append(replace(size, error=error))
    dense = weighed.dense
    return Curve(
        weighed.linear,
        method,
        tuple(candidates),
        dense.bits,
        dense.parameters,
        weighed.energy,
        screened=screened,
    )


def store(weighed: Weighed, values: Tensor, mask: Tensor) -> Sparse:
    """Build the module of the values (out, in) inside a mask, in the stored dtype, with the bias of
    the dense linear.
    """
    dense = weighed.dense
    height, width = dense.weight.shape
    bias = None if dense.bias is None else dense.bias.to(dense.dtype, copy=True)
    return Sparse(values[mask].to(dense.dtype), pack_mask(mask.flatten()), bias, width, height)
