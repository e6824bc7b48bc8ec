"""ROCKET: one-shot sparse factorisation, its codes chosen by a score between output error and
weight error.

References: ROCKET, arXiv 2602.11008; code mts-ai/ROCKET.

Glossary: as in `base`, and
    score       |c_ij| · ‖L⁻¹ b_i‖^λ, λ = `exponent`; as L⁻¹ b_i = Wᵀ u_i / σ_i it is |u_ji|
                σ_i^(1−λ) ‖Wᵀ u_i‖^λ, without L
    margin β    share of the atoms that every column gives up first; the places go to the best
                scores of the whole matrix
    ridge μ     relative to the mean energy of an atom's codes; the value is the code's, the paper
                states none

Differs from the authors' code, where that departs from the paper: profiling uses the same scores,
masks and ridge as the fit (the code thresholds |Σ^½ Vᵀ| with ridge 1e-8 while it profiles); every
column keeps s entries on average (the code's >= keeps s + 1); entries are reactivated by the one
score (the code ranks them by weight-space magnitude); nothing is trained unless `refine_steps` asks
for it (the code runs 100 Adam steps by default), and the better of start and refinement is taken in
the whitened error, which is what both minimise (the code takes it in the weight-space error).
Columns give up whole entries, so β acts as at least one entry of each column.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compressor import linalg
from compressor.linalg import Metric
from compressor.linears import Dictionary
from compressor.methods import register
from compressor.methods.base import Approximation
from compressor.methods.dictionary import base
from compressor.methods.dictionary.sparse_coding import top_mask
from compressor.plan import Curve

BETAS, EPSILON = (0.9, 0.999), 1e-8  # Adam's, as in the authors' code


def reactivate(scores: Tensor, nonzeros: int, margin: float) -> Tensor:
    """Mask (k, n) with `nonzeros` · n entries: s − ⌈β k⌉ of the best in every column, then the best
    of what is left anywhere.
    """
    atoms, columns = scores.shape
    first = max(0, nonzeros - math.ceil(margin * atoms))
    mask = top_mask(scores, first, 0)
    left = scores.masked_fill(mask, -1)
    return mask | top_mask(left.flatten(), (nonzeros - first) * columns, 0).view_as(mask)


def refine_with_adam(
    coordinates: Tensor, codes: Tensor, mask: Tensor, atoms: Tensor, steps: int, rate: float
) -> Tensor:
    """Codes (k, n) after `steps` of Adam on dictionary and codes together, for the relative error
    ‖C − D S‖² / ‖C‖². Their scale is free.

    Both factors are first brought to the scale of an orthonormal dictionary, r^(−½), so that one
    rate suits them at any size of targets. coordinates: C (r, n); atoms: Dᵀ (k, r).
    """
    goal = len(coordinates) ** -0.5
    factors = [
        factor * (goal / factor.square().mean().sqrt()).item() for factor in (atoms, codes[mask])
    ]
    if not all(torch.isfinite(factor).all() for factor in factors):  # no energy: nothing to refine
        return codes
    scale = (factors[0].norm() / atoms.norm() * factors[1].norm() / codes.norm()).item()
    target, energy = coordinates * scale, (coordinates * scale).square().sum()
    values = [factors[0], torch.zeros_like(codes).masked_scatter(mask, factors[1])]
    means, squares = ([torch.zeros_like(value) for value in values] for _ in range(2))
    for step in range(1, steps + 1):
        residual = (values[0].T @ values[1] - target) * (2 / energy)  # (r, n)
        for index, gradient in enumerate((values[1] @ residual.T, (values[0] @ residual) * mask)):
            means[index] = torch.lerp(gradient, means[index], BETAS[0])
            squares[index] = torch.lerp(gradient.square(), squares[index], BETAS[1])
            deviation = (squares[index] / (1 - BETAS[1] ** step)).sqrt() + EPSILON
            values[index] = values[index] - rate / (1 - BETAS[0] ** step) * means[index] / deviation
    return values[1]


@register
@dataclass(frozen=True)
class Rocket(base.DictionaryMethod):
    """Leading whitened directions, scored codes, and the best dictionary of those codes."""

    name: ClassVar[str] = "rocket"
    paper: ClassVar[str] = "ROCKET, arXiv 2602.11008"

    exponent: Annotated[float, Field(ge=0, le=1)] = 0.5  # λ of the score
    margin: Annotated[float, Field(ge=0, le=1)] = 5e-3  # β, fraction of the atoms
    ridge: Annotated[float, Field(ge=0)] = 1e-3  # μ of the dictionary
    # Adam steps on dictionary and codes; 100 in the authors' code
    refine_steps: Annotated[int, Field(ge=0)] = 0
    refine_rate: Annotated[float, Field(gt=0)] = 1e-3
    # errors of the curve: relative output error, or ‖W − Ŵ‖ / ‖W‖ as published
    profile: Literal["gram", "weight"] = "gram"
    ratios: tuple[base.Ratio, ...] = tuple(
        round(1 + 0.1 * step, 1) for step in range(21)
    )  # atoms to nonzeros

    def scores(self, basis: base.Basis) -> Tensor:
        """|c_ij| · ‖L⁻¹ b_i‖^λ (r, out)."""
        spread = (basis.vectors.T @ basis.weight).norm(dim=1)  # ‖Wᵀ u_i‖
        return (
            basis.vectors.T.abs()
            * (basis.values.sqrt() ** (1 - self.exponent) * spread**self.exponent)[:, None]
        )

    def codes(
        self, basis: base.Basis, scores: Tensor, atoms: int, nonzeros: int
    ) -> tuple[Tensor, Tensor]:
        """Codes (k, out) and their mask, closed form."""
        mask = reactivate(scores[:atoms], nonzeros, self.margin)
        return basis.coordinates[:atoms] * mask, mask

    def candidates(self, state: base.Basis) -> Curve:
        """Errors with the best dictionary, reactivation and ridge: of the outputs, or of the
        weights as published.
        """
        scores = self.scores(state)
        targets = state.coordinates.T if self.profile == "gram" else state.weight

        def fit(atoms: int, nonzeros: int) -> float:
            codes, _ = self.codes(state, scores, atoms, nonzeros)
            return base.fitted_error(codes, targets, self.ridge)

        if self.profile == "gram":
            return self.screen(state, fit)
        energy = Metric().energy(state.weight)
        # of ‖W‖², by 1, 2, … leading directions
        kept = (state.vectors.T @ state.weight).square().sum(1).cumsum(0)
        tails = (1 - kept / energy).clamp(min=0) if energy > 0 else torch.zeros_like(kept)
        sizes = self.sizes(state.dense)
        found = base.profile_sizes(sizes, state.coordinates, self.anchors, fit, tails=tails)
        norms = [replace(size, error=size.error**0.5) for size in found]
        curve = base.curve_of(state, self.name, norms, self.anchors is not None)
        return replace(curve, energy=energy)

    def compress(self, state: base.Basis, setting: dict[str, Any]) -> Dictionary:
        codes, mask = self.codes(
            state, self.scores(state), *base.require_atoms(state.linear, setting, len(state.values))
        )
        targets = state.coordinates.T
        if self.refine_steps:
            atoms = base.best_dictionary(codes, targets, self.ridge).float()
            refined = refine_with_adam(
                targets.T.float(), codes.float(), mask, atoms, self.refine_steps, self.refine_rate
            )
            codes = min(
                codes,
                refined.double(),
                key=lambda these: base.fitted_error(these, targets, self.ridge),
            )
        return base.store(
            state.dense,
            state.roots,
            codes,
            mask,
            base.best_dictionary(codes, state.weight, self.ridge),
        )

    def measure(self, state: base.Basis, module: Approximation) -> float:
        if self.profile == "gram":
            return state.error(module)
        stored = state.roots[:, None] * module.to_dense()
        return linalg.relative_error(state.weight, stored, Metric()) ** 0.5
