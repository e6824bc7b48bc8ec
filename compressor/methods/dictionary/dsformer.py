"""DSFormer: every slice of the inputs has a small dictionary of its own, and every output combines
a few of its atoms.

References: DSFormer, arXiv 2312.13211.

Glossary (per slice, W_p (out, in / P) the columns of one of P slices)
    atoms Dᵀ        (k, in / P) small dense basis of the slice
    codes S         (k, out), s nonzeros for each output and slice: semi-structured
    coordinates C   (r, P · out) of the slices side by side, each in its own leading directions

Start: the leading directions of every slice, the s largest coordinates of each column, which are
the best for them (0.2), then the best dictionary of those codes (0.3). All of it is closed form.

Differs from the paper: that is the start alone, without the task-aware training that follows it
there (its Straight-Through Factorizer). Slices run along the inputs, where they share no input; the
paper's layout is not stated in what we have of it. `metric: gram` weighs each slice by its own
block of the Gram, `weighted_gram` each output by its mean squared gradient besides; the paper
weighs nothing.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from compressor import linalg
from compressor.errors import ConfigError
from compressor.linalg import Metric
from compressor.linears import Dense, Dictionary
from compressor.methods import register
from compressor.methods.base import Approximation, LinearMethod
from compressor.methods.dictionary import base
from compressor.methods.dictionary.sparse_coding import project_columns
from compressor.plan import Candidate, Curve
from compressor.statistics import LinearStats


def _group(value: str | int) -> str | int:
    if not re.fullmatch(r"(auto:)?[1-9][0-9]{0,8}", str(value)):
        raise ValueError(
            f"must be a number of inputs, or auto: and a number, such as auto:32, not {value!r}"
        )
    return value


def slice_width(group: str | int, width: int, linear: str) -> int:
    """Count the inputs of a slice: `group` itself, or for `auto:32` the divisor of `width` nearest
    to 32, the larger one of two.

    Raises ConfigError naming the linear if an explicit `group` does not divide the width.
    """
    wanted = int(str(group).removeprefix("auto:"))
    divisors = [size for size in range(1, width + 1) if width % size == 0]
    if str(group).startswith("auto:"):
        return min(divisors, key=lambda size: (abs(size - wanted), -size))
    if wanted not in divisors:
        near = min(divisors, key=lambda size: abs(size - wanted))
        raise ConfigError(
            f"{linear}: its {width} inputs do not split into slices of {wanted}; choose {near}, "
            f"or 'auto:{wanted}'"
        )
    return wanted


@dataclass(frozen=True)
class Slices:
    """One linear as P narrow ones, each in the coordinates of its own leading directions."""

    linear: str
    dense: Dense
    roots: Tensor  # (out,) √f, weights of the outputs; 1 unless the metric is `weighted_gram`
    parts: tuple[Tensor, ...]  # P times √f W_p (out, in / P), float64
    metrics: tuple[Metric, ...]  # of each part
    coordinates: Tensor  # (r, P · out), float64
    energy: float  # sum over parts of tr(W_p M_p W_pᵀ)


@register
@dataclass(frozen=True)
class DSFormer(LinearMethod[Slices]):
    """A small dictionary for each slice of the inputs, with a fixed number of atoms for each output
    and slice.
    """

    name: ClassVar[str] = "dsformer"
    paper: ClassVar[str] = "DSFormer, arXiv 2312.13211"
    shares: ClassVar[bool] = True

    metric: Literal["identity", "gram", "weighted_gram"] = "identity"
    group: Annotated[str | int, AfterValidator(_group)] = "auto:32"  # inputs in a slice
    ratios: tuple[base.Ratio, ...] = base.RATIOS  # atoms to nonzeros
    # atom counts considered; by default at most 32 of them, evenly spaced
    atom_step: Annotated[int, Field(ge=1)] | None = None
    # sizes fitted for the curve, see `profile_sizes`; None fits all, 0 none
    anchors: Annotated[int, Field(ge=0)] | None = 4
    # `weighted_gram` only: shrinkage of the outputs' weights towards equal ones
    shrink_grad_gram: base.Fraction = 0.1

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.metric == "identity" else base.needs_of(self.metric)

    def sizes(self, dense: Dense) -> list[Candidate]:
        height, width = dense.weight.shape
        group = slice_width(self.group, width, "this linear")
        return base.list_sizes(
            self.name, dense, self.ratios, self.atom_step, min(group, height), width // group
        )

    def prepare(self, linear: str, dense: Dense, stats: LinearStats) -> Slices:
        """Find the leading directions of each of the P slices √f W_p (out, in / P) in its own block
        of the metric: P eigenproblems of size min(out, in / P).
        """
        stats.require(linear, self.needs)
        width = dense.weight.shape[1]
        group = slice_width(self.group, width, linear)
        roots = base.output_roots(linear, dense, stats, self.metric, self.shrink_grad_gram)
        parts, starts = (
            (roots[:, None] * dense.weight.double()).split(group, dim=1),
            range(0, width, group),
        )
        if self.metric == "identity":
            metrics = [Metric()] * len(parts)
        else:
            gram = stats.total(linear, "gram")
            metrics = [
                Metric(gram[start : start + group, start : start + group], 1 / stats.tokens)
                for start in starts
            ]
        bases = [
            linalg.principal_outputs(part, metric, linear)
            for part, metric in zip(parts, metrics, strict=True)
        ]
        coordinates = torch.cat(
            [values.clamp(min=0).sqrt()[:, None] * vectors.T for values, vectors in bases], dim=1
        )
        return Slices(
            linear,
            dense,
            roots,
            parts,
            tuple(metrics),
            coordinates,
            coordinates.square().sum().item(),
        )

    def codes(self, state: Slices, atoms: int, nonzeros: int) -> tuple[Tensor, Tensor]:
        """Codes of the leading directions (k, P · out), and their mask."""
        leading = state.coordinates[:atoms]
        mask = project_columns(nonzeros)(leading)
        return leading * mask, mask

    def candidates(self, state: Slices) -> Curve:
        height, dense = len(state.dense.weight), state.dense

        def fit(atoms: int, nonzeros: int) -> float:
            pairs = [
                part.split(height, dim=1)
                for part in (self.codes(state, atoms, nonzeros)[0], state.coordinates)
            ]
            return (
                sum(
                    base.fitted_error(codes, whole.T) * whole.square().sum().item()
                    for codes, whole in zip(*pairs, strict=True)
                )
                / state.energy
            )

        found = base.profile_sizes(self.sizes(dense), state.coordinates, self.anchors, fit)
        return Curve(
            state.linear,
            self.name,
            tuple(found),
            dense.bits,
            dense.parameters,
            state.energy,
            screened=self.anchors is not None,
        )

    def compress(self, state: Slices, setting: dict[str, Any]) -> Dictionary:
        base.require_atoms(state.linear, setting, len(state.coordinates))
        height = len(state.dense.weight)
        codes, mask = (matrix.split(height, dim=1) for matrix in self.codes(state, **setting))
        atoms = torch.cat(
            [
                base.best_dictionary(code, part)
                for code, part in zip(codes, state.parts, strict=True)
            ]
        )
        return base.store(
            state.dense, state.roots, torch.cat(codes), torch.cat(mask), atoms, len(state.parts)
        )

    def measure(self, state: Slices, module: Approximation) -> float:
        lost = torch.cat(state.parts, dim=1) - state.roots[:, None] * module.to_dense()
        parts = lost.split(state.parts[0].shape[1], dim=1)
        whole = state.energy
        return (
            sum(metric.energy(part) for metric, part in zip(state.metrics, parts, strict=True))
            / whole
            if whole > 0
            else 0.0
        )
