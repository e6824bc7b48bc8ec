"""Pairs of linears in two blocks that share one dictionary, each with codes and an input metric of
its own.

Reference: GeoPair, arXiv 2609.25963.

Glossary: as in `base`, and
    objective      Σ_i ω_i tr((W_i − S_iᵀ Dᵀ) G_i (W_i − S_iᵀ Dᵀ)ᵀ), ω_i = 1, or one over the
                   linear's own energy (`relative`)
    start D₀       leading directions of the stacked weights in the metric Σ ω_i G_i (`whitened`) or
                   unweighted (`plain`, the paper's)
    codes          hard thresholding pursuit (HTP) with H_i = Dᵀ G_i D and R_i = Dᵀ G_i W_iᵀ, from
                   the codes of the round before
    dictionary     the generalised Sylvester update of `sylvester`; for equal Grams the closed form
                   (0.3) of the stacked linears
Coordinates of each A_i in an orthonormal basis of the first 1, 2, … directions of D₀, by one QR of
L_i D₀, make its truncated errors exact;
sizes are screened in them as those of `cospadi` are (`base.profile_sizes`), of whose problem equal
Grams make this an instance.

Differs from the paper: each error counts relative to its linear's own energy unless `relative` is
off, since inputs of later blocks are often much larger. Pairs are linears of the same role in
consecutive blocks, not matched by similarity. The last linear of an odd number has a dictionary of
its own, by the same solver. A round ends with the dictionary, which cannot raise the objective, HTP
can: the best round is kept; the first is D₀ with its codes, and the best dictionary of these. η I
in the Grams is a shrinkage towards their mean diagonal. Atoms never outnumber the smaller side of
the stacked weights. Masks and atoms are counted, the atoms once.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compressor import linalg
from compressor.errors import ConfigError
from compressor.linalg import Metric
from compressor.linears import CompressedLinear, Dense
from compressor.methods import register
from compressor.methods.base import Approximation, Member, Method, stack_denses
from compressor.methods.dictionary import base
from compressor.methods.dictionary.cospadi import expected_level
from compressor.methods.dictionary.sparse_coding import (
    column_errors,
    htp_codes,
    project_columns,
    unit_atoms,
)
from compressor.methods.dictionary.sylvester import gram_basis, shared_dictionary
from compressor.plan import Candidate, Curve


@dataclass(frozen=True)
class Pair:
    """Two linears, or one that is left over, and what all their dictionaries start from."""

    name: str
    parts: tuple[Member, ...]
    dense: Dense  # the linears stacked
    grams: tuple[Tensor, ...]  # ω_i G_i (in, in), per token, shrunk, float64
    basis: tuple[Tensor, Tensor] | None  # of two different Grams, see `sylvester.gram_basis`
    start: Tensor  # D₀ᵀ (r, in), leading directions first
    coordinates: Tensor  # (r, outputs of all) of the A_i in bases of D₀

    @property
    def weights(self) -> list[Tensor]:
        return [part.dense.weight.double() for part in self.parts]

    @property
    def energy(self) -> float:
        """Σ ω_i tr(W_i G_i W_iᵀ), per token."""
        return self.coordinates.square().sum().item()


def stack_pair(members: Mapping[str, Member]) -> Dense:
    """Stack linears. Raises ConfigError naming them if they cannot have one dictionary."""
    names, found = list(members), [member.dense for member in members.values()]
    if len({dense.weight.shape[1] for dense in found}) > 1:
        widths = " and ".join(str(dense.weight.shape[1]) for dense in found)
        raise ConfigError(
            f"{' and '.join(names)}: {widths} inputs cannot share a dictionary; leave one of them "
            "out of the targets"
        )
    if len({dense.bias is None for dense in found}) > 1:
        raise ConfigError(
            f"{' and '.join(names)}: one has a bias and one has none; leave one of them out of "
            "the targets"
        )
    return stack_denses(found)


@register
@dataclass(frozen=True)
class GeoPair(Method[Pair]):
    """Dictionaries that linears of the same role in consecutive blocks share."""

    name: ClassVar[str] = "geopair"
    paper: ClassVar[str] = "GeoPair, arXiv 2609.25963"
    unit: ClassVar[str] = "pair"

    start: Literal["whitened", "plain"] = "whitened"
    relative: bool = True  # whether each linear's error counts relative to its own energy
    rounds: Annotated[int, Field(ge=0)] = 30  # at most
    steps: Annotated[int, Field(ge=1)] = 2  # of HTP in a round
    ratios: tuple[base.Ratio, ...] = base.RATIOS  # atoms to nonzeros
    # atom counts offered; by default at most 32 of them, evenly spaced
    atom_step: Annotated[int, Field(ge=1)] | None = None
    # sizes fitted for the curve, see `profile_sizes`; None fits all
    anchors: Annotated[int, Field(ge=0)] | None = 0
    # shrinkage of the input Grams; above 0, since their Cholesky factors are needed
    shrink_gram: base.Fraction = 1e-3

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram"})

    def sizes_of_unit(self, members: Mapping[str, Member]) -> list[Candidate]:
        return self.list_sizes(stack_pair(members))

    def list_sizes(self, dense: Dense) -> list[Candidate]:
        return base.list_sizes(
            self.name, dense, self.ratios, self.atom_step, min(dense.weight.shape)
        )

    def prepare_unit(self, unit: str, members: Mapping[str, Member]) -> Pair:
        """Find the start D₀ of every dictionary, and the coordinates of both weights in it.

        D₀ᵀ (r, in) holds the leading directions of the stacked weights W (Σ out_i, in) in the
        metric Σ ω_i G_i: Σ^(−½) Uᵀ W from the eigenpairs of W (Σ ω_i G_i) Wᵀ. With L_i L_iᵀ =
        ω_i G_i, the coordinates of A_i = L_iᵀ W_iᵀ in an orthonormal basis of L_iᵀ D₀ make the
        errors of truncations exact. Costs one eigenproblem of size r, and a Cholesky factor and a
        QR of size in for each linear.
        """
        dense = stack_pair(members)
        for part in members.values():
            part.stats.require(part.linear, self.needs)
        weights = [part.dense.weight.double() for part in members.values()]
        grams = [
            linalg.shrink(
                part.stats.total(part.linear, "gram").double() / part.stats.tokens, self.shrink_gram
            )
            for part in members.values()
        ]
        if self.relative:
            grams = [
                gram / (Metric(gram).energy(weight) or 1.0)
                for gram, weight in zip(grams, weights, strict=True)
            ]
        roots = [
            linalg.cholesky(gram, f"{part.linear}: the Gram", "shrink_gram")
            for gram, part in zip(grams, members.values(), strict=True)
        ]
        whole = torch.cat(weights)
        values, vectors = linalg.principal_outputs(
            whole,
            Metric(sum(grams, torch.zeros_like(grams[0])) if self.start == "whitened" else None),
            unit,
        )
        scales = torch.where(
            values > 1e-12 * values[0], values.rsqrt(), 0.0
        )  # directions without energy are left out
        start = scales[:, None] * (vectors.T @ whole)  # (r, in)
        coordinates = [
            coordinates_of(start, root, weight) for root, weight in zip(roots, weights, strict=True)
        ]
        basis = (
            None
            if len(grams) == 1 or torch.equal(*grams)
            else gram_basis((grams[0], grams[1]), unit)
        )
        return Pair(
            unit,
            tuple(members.values()),
            dense,
            tuple(grams),
            basis,
            start,
            torch.cat(coordinates, dim=1),
        )

    def candidates(self, state: Pair) -> Curve:
        def fit(atoms: int, nonzeros: int) -> float:
            return self.fit(state, atoms, nonzeros)[2] / state.energy

        found = base.profile_sizes(
            self.list_sizes(state.dense), state.coordinates, self.anchors, fit, expected_level
        )
        return Curve(
            state.name,
            self.name,
            tuple(found),
            state.dense.bits,
            state.dense.parameters,
            state.energy,
        )

    def fit(self, state: Pair, atoms: int, nonzeros: int) -> tuple[Tensor, Tensor, float]:
        """Alternate codes and dictionary; return those of the best round and the objective.

        A round codes every W_i by HTP on H_i = Dᵀ G_i D (k, k) and R_i = Dᵀ G_i W_iᵀ (k, out_i),
        then solves Σ_i G_i D S_i S_iᵀ = Σ_i G_i W_iᵀ S_iᵀ for D (in, k). Costs O(in² k) a round.

        Returns:
            Dᵀ (k, in), codes (k, Σ out_i), float64, and Σ_i ω_i tr((W_i − S_iᵀ Dᵀ) G_i (…)ᵀ).
        """
        weights, rows = state.weights, state.start[:atoms]
        errors: list[float] = []
        codes = [weight.new_zeros(atoms, len(weight)) for weight in weights]
        best = rows, torch.cat(codes, dim=1), state.energy
        problems = [
            problem(rows, gram, weight) for gram, weight in zip(state.grams, weights, strict=True)
        ]
        for _ in range(self.rounds + 1):
            codes = [
                code_columns(*each, code, nonzeros, self.steps)
                for each, code in zip(problems, codes, strict=True)
            ]
            rows = shared_dictionary(weights, state.grams, codes, state.name, state.basis)
            problems = [
                problem(rows, gram, weight)
                for gram, weight in zip(state.grams, weights, strict=True)
            ]
            lost = state.energy + sum(
                column_errors(*each, code).sum().item()
                for each, code in zip(problems, codes, strict=True)
            )
            if lost < min(errors, default=math.inf):
                best = rows, torch.cat(codes, dim=1), max(0.0, lost)
            errors.append(lost)
            if base.has_stalled(errors):
                break
        return best

    def compress_unit(
        self, state: Pair, setting: dict[str, Any], outputs: Mapping[str, int]
    ) -> dict[str, CompressedLinear]:
        atoms, nonzeros = base.require_atoms(state.name, setting, len(state.start))
        rows, codes, _ = self.fit(state, atoms, nonzeros)
        module = base.store(
            state.dense, torch.ones_like(codes[0]), codes, project_columns(nonzeros)(codes), rows
        )
        return {**module.split(outputs)}

    def measure_unit(self, state: Pair, modules: Mapping[str, Approximation]) -> float:
        lost = [
            Metric(gram).energy(weight - modules[part.linear].to_dense().double())
            for gram, weight, part in zip(state.grams, state.weights, state.parts, strict=True)
        ]
        return sum(lost) / state.energy if state.energy > 0 else 0.0


def coordinates_of(start: Tensor, root: Tensor, weight: Tensor) -> Tensor:
    """Coordinates (r, out) of A = Lᵀ Wᵀ in an orthonormal basis of Lᵀ D₀, direction after
    direction; root: L with L Lᵀ = G.
    """
    frame = torch.linalg.qr(root.T @ start.T)[0]
    return frame.T @ (root.T @ weight.T)


def problem(rows: Tensor, gram: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """H = Dᵀ G D (k, k) and R = Dᵀ G Wᵀ (k, out) for atoms Dᵀ (k, in), float64."""
    weighted = rows @ gram
    return weighted @ rows.T, weighted @ weight.T


def code_columns(
    gram: Tensor, correlations: Tensor, codes: Tensor, nonzeros: int, steps: int
) -> Tensor:
    """Codes (k, out), float64, by HTP in float32 on atoms of unit norm."""
    gram, correlations, norms = unit_atoms(gram, correlations)
    found = htp_codes(
        gram.float(),
        correlations.float(),
        project_columns(nonzeros),
        (codes * norms).float(),
        steps,
    )
    return found.double() / norms
