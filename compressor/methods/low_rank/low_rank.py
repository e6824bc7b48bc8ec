"""Low rank in a metric: the SVD family as one eigenproblem, Ŵ = argmin tr(H (W − Ŵ) M (W − Ŵ)ᵀ)
over rank-r matrices.

References (metric → paper)
    identity       truncated SVD (Eckart and Young 1936)
    fisher         FWSVD, arXiv 2207.00112
    mean_abs       ASVD, arXiv 2312.05821
    gram_diagonal  AWSVD of LoRAP, arXiv 2404.09695
    gram           SVD-LLM, arXiv 2403.07378; LoRD, arXiv 2309.14021
    centred_gram   AFM, arXiv 2405.18146
    two_sided      KFAC-SVD and LEMS (ICML 2026); IO-SVD, arXiv 2605.15626

Glossary
    metric M      second moment of the inputs or a diagonal stand-in     Gram, E|x|^α, Fisher row
                  weight
    grad_gram H   second moment of the output gradients, H = L Lᵀ         L_H (KFAC-SVD)
    up A          (out, r) = L⁻ᵀ U_r;  A = U_r for one-sided metrics       U_r Σ^½
    down B        (r, in) = U_rᵀ Lᵀ W                                     Σ^½ V_rᵀ S⁻¹
    σ²            eigenvalues of Lᵀ W M Wᵀ L; the error at rank r is Σ_{i>r} σᵢ²

Differs from the papers: nothing is inverted or whitened on the input side, so singular Grams need
no damping and the factors at rank r are the leading slice of the factors at full rank. FWSVD's
Fisher is per token (the papers square batch means). The two-sided form multiplies by Lᵀ; the
authors' code multiplies by L, which weighs by LᵀL instead of H.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compressor import linalg
from compressor.linalg import Metric
from compressor.linears import Dense, LowRank
from compressor.linears.low_rank import pair_size
from compressor.methods import register
from compressor.methods.base import Approximation, LinearMethod
from compressor.plan import Candidate, Curve
from compressor.statistics import LinearStats

MetricName = Literal[
    "identity", "fisher", "mean_abs", "gram_diagonal", "gram", "centred_gram", "two_sided"
]
NEEDS: dict[MetricName, tuple[str, ...]] = {
    "identity": (),
    "fisher": ("fisher",),
    "mean_abs": ("abs_sum",),
    "gram_diagonal": ("gram",),
    "gram": ("gram",),
    "centred_gram": ("gram", "sum"),
    "two_sided": ("gram", "grad_gram"),
}
Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Factors:
    """Decomposition of one linear at full rank k = min(out, in); the factors of every smaller rank
    are leading slices.
    """

    linear: str
    dense: Dense
    metric: Metric  # M, per token
    root: (
        Tensor | None
    )  # L: (out, out) lower triangular, L Lᵀ = H shrunk, per token; None for one-sided metrics
    values: Tensor  # (k,) σ², descending
    vectors: Tensor  # (out, k) U

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return A (out, r) and B (r, in), float64: A B = L⁻ᵀ U_r · U_rᵀ Lᵀ W."""
        weight, leading = self.dense.weight.double(), self.vectors[:, :rank]
        if self.root is None:
            return leading, leading.T @ weight
        return torch.linalg.solve_triangular(self.root.T, leading, upper=True), (
            self.root @ leading
        ).T @ weight

    def tails(self) -> tuple[float, Tensor, list[float]]:
        """Energy Σ σᵢ², the spectrum σᵢ² ÷ energy (k,), and the error Σ_{i>r} σᵢ² ÷ energy at every
        rank from 0 to k.
        """
        values = self.values.clamp(
            min=0
        )  # eigenvalues of a positive semi-definite matrix: negative only by rounding
        energy = values.sum().item()
        spectrum = values / energy if energy > 0 else torch.zeros_like(values)
        return energy, spectrum, [*spectrum.flip(0).cumsum(0).flip(0).tolist(), 0.0]


def saves(dense: Dense, size: tuple[int, int, int]) -> bool:
    """Whether bits and parameters are both below the dense linear's: above that the weight stays
    dense.
    """
    return size[0] < dense.bits and size[1] < dense.parameters


def candidate(
    method: str, setting: dict[str, int], size: tuple[int, int, int], error: float = math.nan
) -> Candidate:
    bits, parameters, multiply_adds = size
    return Candidate(method, setting, bits, parameters, error, multiply_adds)


@register
@dataclass(frozen=True)
class LowRankMethod(LinearMethod[Factors]):
    """Best rank-r weight in a chosen metric, stored as a factor pair or pivoted."""

    name: ClassVar[str] = "low_rank"
    paper: ClassVar[str] = (
        "SVD-LLM, arXiv 2403.07378; LoRD, arXiv 2309.14021; KFAC-SVD / LEMS, ICML 2026"
    )

    metric: MetricName = "two_sided"
    alpha: Annotated[float, Field(ge=0)] = 0.5  # exponent of E|x|, `mean_abs` only
    storage: Literal["factors", "pivoted"] = "pivoted"
    shrink_gram: Fraction = 0.01  # `two_sided` only: shrinkage of the input Gram
    shrink_grad_gram: Fraction = 0.1  # `two_sided` only: shrinkage of the output-gradient moment
    # ranks offered; by default at most 256 of them, evenly spaced
    rank_step: Annotated[int, Field(ge=1)] | None = None
    # largest rank offered, as a fraction of full rank (WeLore's dense rule: 0.5)
    max_rank: Annotated[float, Field(gt=0, le=1)] = 1.0

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(NEEDS[self.metric])

    def input_metric(self, linear: str, stats: LinearStats) -> Metric:
        """Form M of the chosen metric, per token."""
        match self.metric:
            case "identity":
                return Metric()
            case "fisher":
                return Metric(stats.fisher, 1 / stats.grad_tokens)
            case "mean_abs":
                return Metric(
                    (stats.total(linear, "abs_sum").double() / stats.tokens) ** (2 * self.alpha)
                )
            case "gram_diagonal":
                return Metric(stats.total(linear, "gram").diagonal(), 1 / stats.tokens)
            case "centred_gram":
                mean = stats.total(linear, "sum").double() / stats.tokens
                return Metric(stats.gram, 1 / stats.tokens, mean)
            case "two_sided":
                return Metric(stats.gram, 1 / stats.tokens).shrink(self.shrink_gram)
        return Metric(stats.gram, 1 / stats.tokens)

    def sizes(self, dense: Dense) -> list[Candidate]:
        full, pivoted = min(dense.weight.shape), self.storage == "pivoted"
        step, largest = (
            self.rank_step or max(1, full // 256),
            min(full - 1, int(self.max_rank * full)),
        )
        biased = dense.bias is not None or self.metric == "centred_gram"
        sizes = {
            rank: pair_size(dense, rank, pivoted, biased) for rank in range(step, largest + 1, step)
        }
        return [
            candidate(self.name, {"rank": rank}, size)
            for rank, size in sizes.items()
            if saves(dense, size)
        ]

    def prepare(self, linear: str, dense: Dense, stats: LinearStats) -> Factors:
        """Find the directions of the outputs that matter: eigenpairs of Lᵀ W M Wᵀ L.

        With U_r the r leading eigenvectors, the best Ŵ of rank r is L⁻ᵀ U_r U_rᵀ Lᵀ W, and its
        error tr(Lᵀ D M Dᵀ L), D = W − Ŵ, is the sum of the other eigenvalues. W (out, in), M
        (in, in) of the inputs, L Lᵀ (out, out) of the output gradients, or I. One product W M,
        O(out · in²), and one eigenproblem of the smaller side serve every rank.
        """
        stats.require(linear, self.needs)
        metric, weight, root = self.input_metric(linear, stats), dense.weight.double(), None
        if self.metric == "two_sided":
            root = stats.gradient_root(linear, self.shrink_grad_gram)
            weight = root.T @ weight
        return Factors(
            linear, dense, metric, root, *linalg.principal_outputs(weight, metric, linear)
        )

    def candidates(self, state: Factors) -> Curve:
        """Every rank that saves bits, with its closed-form error Σ_{i>r} σᵢ² ÷ Σ σᵢ²."""
        energy, spectrum, tails = state.tails()
        candidates = tuple(
            replace(size, error=tails[size.setting["rank"]]) for size in self.sizes(state.dense)
        )
        singular = state.values.clamp(min=0).sqrt()
        span = (singular[0] - singular[-1]).clamp(min=torch.finfo(torch.float64).tiny)
        normalised = ((singular - singular[-1]) / span).tolist()  # WeLore's min–max scale
        ranks = [size.setting["rank"] for size in candidates]
        thresholds = (
            *tuple(normalised[rank - 1] for rank in ranks),
            normalised[ranks[-1] if ranks else 0],
        )
        bits, parameters = state.dense.bits, state.dense.parameters
        return Curve(
            state.linear,
            self.name,
            candidates,
            bits,
            parameters,
            energy,
            tuple(spectrum.tolist()),
            thresholds=thresholds,
        )

    def compress(self, state: Factors, setting: dict[str, Any]) -> LowRank:
        up, down = state.factors(setting["rank"])
        bias = state.dense.bias
        if (
            state.metric.mean is not None
            # AFM: what the discarded directions contribute on average, (W − A B) μ, moves to the
            # bias
        ):
            lost = (state.dense.weight.double() - up @ down) @ state.metric.mean
            bias = lost if bias is None else bias.double() + lost
        return LowRank.of(up, down, bias, state.dense.dtype, self.storage == "pivoted")

    def measure(self, state: Factors, module: Approximation) -> float:
        whole = state.values.clamp(min=0).sum().item()
        return linalg.relative_error(
            state.dense.weight, module.to_dense(), state.metric, state.root, whole
        )
