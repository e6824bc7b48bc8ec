"""Basis of the sparse-dictionary methods: one for the whole grid of sizes, closed-form errors, the
best dictionary, storage.

Reference: the problem is CoSpaDi's, arXiv 2509.22075.

Glossary (W (out, in); papers write y = x W, so that their W is our Wᵀ)
    A = L Wᵀ    whitened target (in, out), LᵀL = G the Gram, never formed: with A = B Σ Uᵀ all that
                coding needs is
    coordinates C = Σ Uᵀ = Bᵀ A (r, out), r = min(out, in), from the eigenpairs σ², U of W G Wᵀ; no
    inverse, whatever the rank of G
    codes S     (k, out), one column for each output; `nonzeros` s in each column, or in each on
                average
    atoms Dᵀ    (k, in), rows of the dictionary in the original space
Equations
    (0.2)  ‖A − B_k S‖² = ‖A‖² − ‖S‖² for S = C_k ⊙ M: with orthonormal atoms the s largest of each
           column are the best
    (0.3)  D = Wᵀ Sᵀ (S Sᵀ)⁻¹ is the best dictionary of given codes, whatever the Gram
    (0.4)  and its error is ‖A‖² − tr(Zᵀ (S Sᵀ)⁻¹ Z), Z = S Aᵀ; B drops out, so that Z = S Cᵀ does
`metric: weighted_gram` weighs each output by its mean squared gradient f: everything then speaks of
√f W, and codes are divided by √f
when they are stored; supports and dictionary change, the algorithms do not.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from compressor import linalg
from compressor.errors import ConfigError
from compressor.linalg import Metric
from compressor.linears import Dense, Dictionary
from compressor.linears.masks import pack_mask
from compressor.methods.base import Approximation, LinearMethod
from compressor.methods.dictionary.sparse_coding import ascending
from compressor.plan import Candidate, Curve
from compressor.statistics import LinearStats

# added to each atom's own energy in S Sᵀ, relative: two atoms may serve the very same outputs
DAMPING = 1e-6
RATIOS = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0)  # atoms to nonzeros; the optimum is flat
ATOM_COUNTS = 32  # dictionaries of this many sizes are offered unless a step is given
SPAN = 5  # rounds over which progress is judged
FLAT = 1e-3  # relative progress of a span below which rounds end

Law = Callable[
    [np.ndarray, np.ndarray, int, int], np.ndarray
]  # (atoms, nonzeros, r, n) → expected θ, see `profile_sizes`
Ratio = Annotated[float, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
MetricName = Literal["gram", "weighted_gram"]


def no_law(atoms: np.ndarray, nonzeros: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Nothing is expected: the start is as good as a fit."""
    return np.ones(len(atoms))


@dataclass(frozen=True)
class Basis:
    """One linear in the coordinates of its leading whitened directions; all its dictionaries start
    here.
    """

    linear: str
    dense: Dense
    metric: Metric  # G per token, shrunk as the method says
    # (out,) √f, weights of the outputs: all below speaks of √f W; 1 for the plain metric
    roots: Tensor
    values: Tensor  # (r,) σ², descending, not negative
    vectors: Tensor  # (out, r) U

    @property
    def weight(self) -> Tensor:
        """√f W (out, in), float64."""
        return self.roots[:, None] * self.dense.weight.double()

    @property
    def coordinates(self) -> Tensor:
        """C (r, out), float64."""
        return self.values.sqrt()[:, None] * self.vectors.T

    @property
    def energy(self) -> float:
        """‖A‖² = tr(F W G Wᵀ), per token."""
        return self.values.sum().item()

    def error(self, module: Approximation) -> float:
        """Relative error of a built module, tr(F D G Dᵀ) / tr(F W G Wᵀ) with D = W − Ŵ."""
        return linalg.relative_error(
            self.weight, self.roots[:, None] * module.to_dense(), self.metric, whole=self.energy
        )


def needs_of(metric: str) -> frozenset[str]:
    return frozenset({"gram", "grad_gram"} if metric == "weighted_gram" else {"gram"})


def output_roots(
    linear: str, dense: Dense, stats: LinearStats, metric: str, shrink: float
) -> Tensor:
    """√f (out,): f the mean squared gradient of each output, shrunk towards their mean by a
    fraction `shrink`; 1 for other metrics.
    """
    if metric != "weighted_gram":
        return torch.ones(len(dense.weight), dtype=torch.float64, device=dense.weight.device)
    squares = stats.total(linear, "grad_gram").diagonal().double() / stats.grad_tokens
    return ((1 - shrink) * squares + shrink * squares.mean()).sqrt()


def basis_of(
    linear: str,
    dense: Dense,
    stats: LinearStats,
    metric: MetricName,
    shrink_gram: float,
    shrink_grad_gram: float,
) -> Basis:
    """Whitened coordinates of a linear under its Gram, shrunk by `shrink_gram` (see
    `Metric.shrink`), outputs weighted as `metric` says.
    """
    stats.require(linear, needs_of(metric))
    moment = Metric(stats.gram, 1 / stats.tokens)
    moment = moment.shrink(shrink_gram) if shrink_gram else moment
    roots = output_roots(linear, dense, stats, metric, shrink_grad_gram)
    values, vectors = linalg.principal_outputs(
        roots[:, None] * dense.weight.double(), moment, linear
    )
    return Basis(linear, dense, moment, roots, values.clamp(min=0), vectors)


def stored_size(dense: Dense, atoms: int, nonzeros: int, blocks: int = 1) -> tuple[int, int]:
    """(bits, parameters) of a dictionary: atoms and codes, bias, and one mask bit for each place of
    a code, in whole bytes.

    atoms, nonzeros: of each of the `blocks` slices of the inputs. Linears that are stacked have a
    mask each.
    """
    height, width = dense.weight.shape
    parameters = atoms * width + blocks * nonzeros * height + (0 if dense.bias is None else height)
    masks = sum((outputs * blocks * atoms + 7) // 8 for outputs in dense.heights or (height,))
    return parameters * dense.dtype.itemsize * 8 + 8 * masks, parameters


def count_multiply_adds(dense: Dense, atoms: int, blocks: int = 1) -> int:
    """Multiply-adds for a token, of every linear that is stacked: as a pair or as the dense
    product, whichever are fewer.
    """
    width = dense.weight.shape[1]
    return sum(
        min(blocks * atoms * (width // blocks + outputs), outputs * width)
        for outputs in dense.heights or (len(dense.weight),)
    )


def list_sizes(
    method: str, dense: Dense, ratios: Sequence[float], step: int | None, most: int, blocks: int = 1
) -> list[Candidate]:
    """Sizes that save something: atom counts up to `most` in even steps, at each ratio of atoms to
    nonzeros; errors NaN, bits growing.
    """
    step = step or max(1, most // ATOM_COUNTS)
    pairs = {(k, max(1, round(k / ratio))) for k in range(step, most + 1, step) for ratio in ratios}
    sizes = [
        Candidate(
            method,
            {"atoms": k, "nonzeros": s},
            *stored_size(dense, k, s, blocks),
            math.nan,
            count_multiply_adds(dense, k, blocks),
        )
        for k, s in sorted(pairs)
        if s <= k
    ]
    return sorted(
        (size for size in sizes if size.bits < dense.bits and size.parameters < dense.parameters),
        key=lambda size: size.bits,
    )


def start_errors(sizes: Sequence[Candidate], coordinates: Tensor) -> np.ndarray:
    """Relative errors of the orthonormal start, by (0.2): one sort for each number of atoms gives
    all its nonzeros.
    """
    energies, whole = (
        coordinates.square().T.contiguous(),
        coordinates.square().sum().item(),
    )  # (n, r)
    lost = {}
    for atoms in {size.setting["atoms"] for size in sizes}:
        kept = ascending(energies[:, :atoms], 1).sum(0).flip(0).cumsum(0)  # by 1, 2, … k nonzeros
        lost[atoms] = (1 - kept / whole).clamp(min=0).tolist() if whole > 0 else [0.0] * atoms
    return np.array([lost[size.setting["atoms"]][size.setting["nonzeros"] - 1] for size in sizes])


def select_front(sizes: Sequence[Candidate], errors: Sequence[float] | np.ndarray) -> list[int]:
    """Places of the sizes, in order of bits, without those that a smaller one matches or beats;
    exact ones all stay.
    """
    places = np.lexsort((np.asarray(errors), np.array([size.bits for size in sizes])))
    chosen: list[int] = []
    for place in places.tolist():
        last = chosen[-1] if chosen else None
        if last is None or (
            sizes[place].bits > sizes[last].bits
            and (errors[place] < errors[last] or errors[place] == 0)
        ):
            chosen.append(place)
    return chosen


def spread_places(bits: Sequence[int], count: int) -> list[int]:
    """At most `count` places: those nearest to the middles of as many equal intervals of size.
    bits: ascending.
    """
    if not bits:
        return []
    middles = bits[0] + (bits[-1] - bits[0]) * (np.arange(count) + 0.5) / max(1, count)
    return sorted({int(np.abs(np.array(bits) - size).argmin()) for size in middles})


def profile_sizes(
    sizes: Sequence[Candidate],
    coordinates: Tensor,
    anchors: int | None,
    fit: Callable[[int, int], float],
    law: Law = no_law,
    tails: Tensor | None = None,
) -> list[Candidate]:
    """Predict the errors of fits and keep the front of sizes by them.

    A fit of k atoms lies between the truncated decomposition at rank k, its error with all codes
    kept, and the orthonormal start of the same nonzeros. How far up, θ, is what `law` expects times
    what is found at `anchors` sizes of the front, linear in bits between them, twice, since better
    codes move the front to more atoms with fewer nonzeros (half as many the first time).

    Args:
        sizes: candidates in order of bits.
        coordinates: C (r, out).
        anchors: sizes fitted; 0 leaves the law alone, None fits the whole front of the start.
        fit: (atoms, nonzeros) → relative error of a finished fit.
        law: (atoms, nonzeros, r, out) → expected θ.
        tails: (r,), errors of the truncated decompositions at ranks 1, 2, …, where the error is not
            the one that the start is known in.
    """

    def fit_size(size: Candidate) -> float:
        return fit(size.setting["atoms"], size.setting["nonzeros"])

    if not sizes:
        return []
    starts, energies = start_errors(sizes, coordinates), coordinates.square().sum(1)
    if energies.sum() == 0 or anchors is None:
        chosen = select_front(sizes, starts)
        exact = [fit_size(sizes[place]) if energies.sum() > 0 else 0.0 for place in chosen]
        found = [
            replace(sizes[place], error=error) for place, error in zip(chosen, exact, strict=True)
        ]
        return [found[place] for place in select_front(found, exact)]
    atoms, nonzeros, bits = (
        np.array(column)
        for column in zip(*((*size.setting.values(), size.bits) for size in sizes), strict=True)
    )
    truncated = (1 - energies.cumsum(0) / energies.sum()).clamp(min=0)
    gaps = (starts - truncated.numpy(force=True)[atoms - 1]).clip(min=0)
    lows = (truncated if tails is None else tails).numpy(force=True)[atoms - 1]
    raised = gaps * law(atoms, nonzeros, len(coordinates), coordinates.shape[1])
    errors = lows + raised
    for count in (anchors // 2, anchors):
        open_ = [
            place for place in select_front(sizes, errors) if gaps[place] > 1e-9
        ]  # elsewhere the start is the best there is
        places = [open_[index] for index in spread_places(bits[open_].tolist(), count)]
        if places:
            levels = [
                max(0.0, (fit_size(sizes[place]) - lows[place]) / raised[place]) for place in places
            ]
            errors = lows + raised * np.interp(bits, bits[places], levels)
    return [
        replace(sizes[place], error=float(errors[place])) for place in select_front(sizes, errors)
    ]


def has_stalled(errors: Sequence[float]) -> bool:
    """Tell whether the best of the last SPAN rounds is hardly below that of the SPAN before."""
    if len(errors) <= 2 * SPAN:
        return False
    return min(errors[-SPAN:]) >= (1 - FLAT) * min(errors[-2 * SPAN : -SPAN])


def curve_of(basis: Basis, method: str, candidates: Sequence[Candidate], screened: bool) -> Curve:
    return Curve(
        basis.linear,
        method,
        tuple(candidates),
        basis.dense.bits,
        basis.dense.parameters,
        basis.energy,
        screened=screened,
    )


def require_atoms(linear: str, setting: dict[str, Any], most: int) -> tuple[int, int]:
    """Atoms and nonzeros of a setting. Raises ConfigError naming the linear unless 1 ≤ nonzeros ≤
    atoms ≤ most.
    """
    atoms, nonzeros = setting["atoms"], setting["nonzeros"]
    if not 1 <= nonzeros <= atoms <= most:
        raise ConfigError(
            f"{linear}: {nonzeros} nonzeros of {atoms} atoms are not possible; choose 1 <= "
            f"nonzeros <= atoms <= {most}, the smaller side"
        )
    return atoms, nonzeros


def best_dictionary(codes: Tensor, targets: Tensor, ridge: float = 0.0) -> Tensor:
    """Dᵀ (k, w) = (S Sᵀ + E)⁻¹ S T, the least-squares dictionary (0.3) of codes S (k, n) for
    targets T (n, w), float64.

    E is diagonal: `ridge` times the mean energy of an atom (ROCKET's μ), plus DAMPING times the
    atom's own energy. Atoms without a code are zero. With T = W this is the stored dictionary, with
    T = Cᵀ the whitened one.
    """
    codes = codes.double()
    energies = codes.square().sum(1)
    damping = ridge * energies.mean() + DAMPING * energies
    scale = torch.where(
        energies > 0, (energies + damping).rsqrt(), 0.0
    )  # to unit diagonal, which Cholesky wants
    moment = (scale[:, None] * (codes @ codes.T) * scale).diagonal_scatter(torch.ones_like(scale))
    factor = torch.linalg.cholesky(moment)
    return scale[:, None] * torch.cholesky_solve(
        scale[:, None] * (codes @ targets.double()), factor
    )


def fitted_error(codes: Tensor, targets: Tensor, ridge: float = 0.0) -> float:
    """Relative error of codes S (k, n) with their best dictionary Xᵀ for targets T (n, w): (‖T‖² −
    2 tr(Xᵀ S T) + ‖Sᵀ X‖²) / ‖T‖².

    That is (0.4), with the ridge as `best_dictionary` adds it. T = Cᵀ gives the error in the
    metric, T = W the error of the weights.
    """
    codes, targets = codes.double(), targets.double()
    whole = targets.square().sum().item()
    atoms = best_dictionary(codes, targets, ridge)  # (k, w)
    lost = (
        whole
        - 2 * (atoms * (codes @ targets)).sum().item()
        + (codes.T @ atoms).square().sum().item()
    )
    return max(0.0, lost / whole) if whole > 0 else 0.0


def unwhiten(basis: Basis, directions: Tensor) -> Tensor:
    """Dᵀ (k, in) of a whitened dictionary, given by its coordinates (r, k): L⁻¹ B = Wᵀ U Σ⁻¹,
    without L.

    Directions in which the weight has no energy are left out (those below rounding, σ² < 1e-12
    σ₁²): no code is asked of them.
    """
    present = basis.values > 1e-12 * basis.values[0]
    inverse = torch.where(present, basis.values.rsqrt(), 0.0)[:, None]
    return (inverse * directions.double()).T @ (basis.vectors.T @ basis.weight)


def store(
    dense: Dense, roots: Tensor, codes: Tensor, mask: Tensor, atoms: Tensor, blocks: int = 1
) -> Dictionary:
    """Build the module of Ŵ = Sᵀ Dᵀ in the stored dtype, for codes of √f W. codes, mask:
    (blocks · k, out); atoms: (blocks · k, in / blocks).

    An output without weight (√f = 0) has no codes. Each atom and its codes are scaled to equal
    norms, which changes nothing but keeps both in the range of 16-bit numbers.
    """
    codes = torch.where(roots > 0, codes / roots, 0.0)
    norms = atoms.norm(dim=1), codes.norm(dim=1)
    balance = torch.where((norms[0] > 0) & (norms[1] > 0), (norms[1] / norms[0]).sqrt(), 1.0)[
        :, None
    ]
    rows = mask.T.contiguous()  # (out, k)
    values = (codes / balance).T[rows]
    return Dictionary(
        values.to(dense.dtype),
        (atoms * balance).to(dense.dtype),
        pack_mask(rows.flatten()),
        None if dense.bias is None else dense.bias.to(dense.dtype, copy=True),
        dense.weight.shape[0],
        blocks,
    )


@dataclass(frozen=True)
class DictionaryMethod(LinearMethod[Basis]):
    """Abstract method with one dictionary for a linear: options, sizes, basis."""

    shares: ClassVar[bool] = True

    metric: MetricName = "gram"
    ratios: tuple[Ratio, ...] = RATIOS  # atoms to nonzeros
    # atom counts offered; by default at most 32 of them, evenly spaced
    atom_step: Annotated[int, Field(ge=1)] | None = None
    # sizes fitted for the curve, see `profile_sizes`; None fits all, 0 none
    anchors: Annotated[int, Field(ge=0)] | None = 4
    shrink_gram: Fraction = 0.0  # shrinkage of the input Gram
    # `weighted_gram` only: shrinkage of the outputs' weights towards equal ones
    shrink_grad_gram: Fraction = 0.1

    @property
    def needs(self) -> frozenset[str]:
        return needs_of(self.metric)

    def sizes(self, dense: Dense) -> list[Candidate]:
        return list_sizes(self.name, dense, self.ratios, self.atom_step, min(dense.weight.shape))

    def prepare(self, linear: str, dense: Dense, stats: LinearStats) -> Basis:
        """Find the coordinates C = Σ Uᵀ (r, out) that all dictionaries start from: eigenpairs σ², U
        of √F W G Wᵀ √F, W (out, in), G (in, in). One eigenproblem of size r = min(out, in).
        """
        return basis_of(linear, dense, stats, self.metric, self.shrink_gram, self.shrink_grad_gram)

    def screen(self, state: Basis, fit: Callable[[int, int], float], law: Law = no_law) -> Curve:
        """List the sizes with the errors that fits will have, see `profile_sizes`."""
        found = profile_sizes(self.sizes(state.dense), state.coordinates, self.anchors, fit, law)
        return curve_of(state, self.name, found, self.anchors is not None)
