"""CoSpaDi: a dictionary learned for the whitened weight, every output combining its own few atoms.

References: CoSpaDi, arXiv 2509.22075; fast solver: HTP and ADMM codes of arXiv 2609.25963 and
2401.02938 with the closed-form dictionary (0.3).

Glossary: as in `base`, and
    atoms to nonzeros ρ = k / s    2 in the paper                     rounds T           60 in the
                                   paper, its K-SVD alone
    penalty ρ of ADMM              0.2 of the atoms' squared norm     inner iterations   4: more of
                                   them change little

Differs from the paper: `solver: fast` starts from the leading whitened directions and alternates
ADMM codes with the best dictionary of those codes. Its iterates need not improve one by one
(guarding every column, as `sparse_coding.keep_better` does, stalls it), so the best one is kept,
never worse than the start. `solver: ksvd` is the published algorithm, in whitened coordinates,
which change no inner product. Values are stored at the width of the output dtype, not in 14 bits,
and atoms never outnumber the smaller side of the weight: more of them would seldom save anything.
Sizes are screened in closed form: between truncation and start (see `base.profile_sizes`) fits of
the fast solver end near θ = 0.07 (n / r) (k / r)^−0.7 (s / k)^−0.3 (1 − p)^⅓ of the way, with n
outputs, r the smaller side and p = s / r + k / n the part of the weight's numbers that codes and
atoms have: a law measured on linears of two trained models, which predicts errors within about a
tenth on average; `anchors` corrects it by fits.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from compressor.linears import Dictionary
from compressor.methods import register
from compressor.methods.base import Approximation
from compressor.methods.dictionary import base
from compressor.methods.dictionary.ksvd import ksvd
from compressor.methods.dictionary.sparse_coding import (
    admm_codes,
    column_errors,
    project_columns,
    unit_atoms,
)
from compressor.plan import Curve
from compressor.recipe.quantities import Size, size_in_bytes

# conjugate-gradient steps that end a round's coding; more change nothing, since the next round
# starts from there
REFIT = 4


def expected_level(atoms: np.ndarray, nonzeros: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """θ of the module docstring, 1 at most."""
    left = np.clip(
        1 - nonzeros / rows - atoms / columns, 0.02, 1
    )  # of the numbers of the weight, 1 − p
    return np.minimum(
        1,
        0.07
        * columns
        / rows
        * (atoms / rows) ** -0.7
        * (nonzeros / atoms) ** -0.3
        * left ** (1 / 3),
    )


def leading_codes(coordinates: Tensor, atoms: int, nonzeros: int) -> Tensor:
    """Codes (k, n) of the leading whitened directions: the largest `nonzeros` coordinates of each
    column, optimal for them (0.2).
    """
    leading = coordinates[:atoms]
    return leading * project_columns(nonzeros)(leading)


def revive_atoms(atoms: Tensor, codes: Tensor, coordinates: Tensor) -> Tensor:
    """Atoms (k, r) with those that no code uses replaced by the residuals of the worst-fitted
    targets, one each.
    """
    dead = (codes == 0).all(1).nonzero().flatten()[: codes.shape[1]]
    if len(dead) == 0:
        return atoms
    residual = coordinates - atoms.T @ codes
    worst = residual.square().sum(0).argsort(descending=True, stable=True)[: len(dead)]
    return atoms.index_copy(0, dead, residual[:, worst].T)


def alternate(
    coordinates: Tensor,
    codes: Tensor,
    nonzeros: int,
    rounds: int,
    penalty: float = 0.2,
    inner: int = 4,
) -> Tensor:
    """Codes (k, n) after up to `rounds` rounds of best dictionary and ADMM codes; the best of all
    rounds, the first codes included.

    coordinates: (r, n) targets, in the dtype to compute in. Errors are those of codes with their
    own best dictionary.
    """
    energy, best = coordinates.square().sum(), codes
    errors: list[float] = []
    for round_ in range(rounds + 1):
        atoms = base.best_dictionary(codes, coordinates.T).to(codes.dtype)  # (k, r)
        lost = (energy + column_errors(atoms @ atoms.T, atoms @ coordinates, codes).sum()).item()
        best = codes if lost < min(errors, default=math.inf) else best
        errors.append(lost)
        if round_ == rounds or base.has_stalled(errors):
            break
        atoms = revive_atoms(atoms, codes, coordinates)
        gram, correlations, norms = unit_atoms(atoms @ atoms.T, atoms @ coordinates)
        codes = (
            admm_codes(
                gram,
                correlations,
                project_columns(nonzeros),
                codes * norms,
                inner,
                penalty,
                refit=REFIT,
            )
            / norms
        )
    return best


@register
@dataclass(frozen=True)
class Cospadi(base.DictionaryMethod):
    """Learned dictionary with a fixed number of atoms for each output."""

    name: ClassVar[str] = "cospadi"
    paper: ClassVar[str] = "CoSpaDi, arXiv 2509.22075"

    solver: Literal["fast", "ksvd"] = "fast"
    # by default at most 40 of the fast solver, 60 of K-SVD
    rounds: Annotated[int, Field(ge=0)] | None = None
    power_iterations: Annotated[int, Field(ge=1)] = 8  # for each atom of a K-SVD sweep
    seed: Annotated[int, Field(ge=0)] = 42  # of K-SVD's first atoms
    memory: Size = "1GiB"  # held by the pursuit of K-SVD at most; a bound on targets coded at once
    # sizes fitted for the curve, see `profile_sizes`; None fits all
    anchors: Annotated[int, Field(ge=0)] | None = 0

    def candidates(self, state: base.Basis) -> Curve:
        coordinates = state.coordinates

        def fit(atoms: int, nonzeros: int) -> float:
            codes, dictionary = self.codes(coordinates, atoms, nonzeros)
            if dictionary is None:
                return base.fitted_error(codes, coordinates.T)
            return (
                coordinates - dictionary.double() @ codes.double()
            ).square().sum().item() / state.energy

        return self.screen(state, fit, expected_level)

    def codes(self, coordinates: Tensor, atoms: int, nonzeros: int) -> tuple[Tensor, Tensor | None]:
        """Fitted codes (k, out), float32, and K-SVD's own dictionary (r, k) where that is the
        solver.
        """
        coordinates = coordinates.float()
        if self.solver == "ksvd":
            generator = torch.Generator().manual_seed(self.seed)
            rounds = 60 if self.rounds is None else self.rounds
            dictionary, codes = ksvd(
                coordinates,
                atoms,
                nonzeros,
                rounds,
                generator,
                self.power_iterations,
                memory=size_in_bytes(self.memory),
            )
            return codes, dictionary
        start = leading_codes(coordinates, atoms, nonzeros)
        return alternate(
            coordinates, start, nonzeros, 40 if self.rounds is None else self.rounds
        ), None

    def compress(self, state: base.Basis, setting: dict[str, Any]) -> Dictionary:
        atoms, nonzeros = base.require_atoms(state.linear, setting, len(state.values))
        codes, dictionary = self.codes(state.coordinates, atoms, nonzeros)
        rows = (
            base.best_dictionary(codes, state.weight)
            if dictionary is None
            else base.unwhiten(state, dictionary)
        )
        return base.store(
            state.dense, state.roots, codes.double(), project_columns(nonzeros)(codes), rows
        )

    def measure(self, state: base.Basis, module: Approximation) -> float:
        return state.error(module)
