"""COMPOT: an orthonormal dictionary for the whitened weight, by Procrustes rotations and exact
codes in turn.

References: COMPOT, arXiv 2602.15200.

Glossary: as in `base`, and
    rotation Q    (r, k) orthonormal dictionary D_L = B Q in whitened coordinates
    Procrustes    Q = P Rᵀ from the thin singular value decomposition C Sᵀ = P Σ Rᵀ: the orthonormal
                  Q nearest to the codes S

Both half-steps are exact minimisers, so ‖A − D_L S‖² = ‖A‖² − ‖S‖² never grows; the first codes are
those of the leading directions.

Differs from the paper: first dictionary and stopping rule are ours (the paper's are not stated in
what we have of it). `free` ends with the best dictionary of the last codes (0.3), no longer
orthonormal and never worse. Sizes come from the allocation; the paper pools singular values.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compressor.linears import Dictionary
from compressor.methods import register
from compressor.methods.base import Approximation
from compressor.methods.dictionary import base
from compressor.methods.dictionary.sparse_coding import project_columns
from compressor.plan import Curve

FLAT = 1e-4  # end when a round lowers the error by less than this, relative


def procrustes(targets: Tensor, codes: Tensor) -> Tensor:
    """Orthonormal Q (r, k) that minimises ‖T − Q S‖; the minimum is ‖T‖² + ‖S‖² − 2 Σ σᵢ(T Sᵀ).
    targets: (r, n); codes: (k, n), k ≤ r.
    """
    left, _, right = torch.linalg.svd(targets @ codes.T, full_matrices=False)
    return left @ right


def rotate(coordinates: Tensor, atoms: int, nonzeros: int, rounds: int) -> tuple[Tensor, Tensor]:
    """Rotation Q (r, k) and codes S (k, n) after at most `rounds` rounds, codes last. coordinates:
    (r, n).
    """
    project, energy = project_columns(nonzeros), coordinates.square().sum().item()
    rotation = torch.eye(
        len(coordinates), atoms, dtype=coordinates.dtype, device=coordinates.device
    )
    correlations = coordinates[:atoms]
    codes = correlations * project(correlations)
    for _ in range(rounds):
        lost = energy - codes.square().sum().item()
        rotation = procrustes(coordinates, codes)
        correlations = rotation.T @ coordinates
        codes = correlations * project(correlations)
        if lost - (energy - codes.square().sum().item()) <= FLAT * lost:
            break
    return rotation, codes


@register
@dataclass(frozen=True)
class Compot(base.DictionaryMethod):
    """Orthonormal dictionary in the whitened space, with a fixed number of atoms for each
    output.
    """

    name: ClassVar[str] = "compot"
    paper: ClassVar[str] = "COMPOT, arXiv 2602.15200"

    free: bool = False  # end with the best dictionary of the codes, no longer orthonormal
    rounds: Annotated[int, Field(ge=0)] = 20

    def candidates(self, state: base.Basis) -> Curve:
        coordinates, energy = state.coordinates, state.energy

        def fit(atoms: int, nonzeros: int) -> float:
            codes = rotate(coordinates, atoms, nonzeros, self.rounds)[1]
            if self.free:
                return base.fitted_error(codes, coordinates.T)
            return max(0.0, 1 - codes.square().sum().item() / energy)

        return self.screen(state, fit)

    def compress(self, state: base.Basis, setting: dict[str, Any]) -> Dictionary:
        atoms, nonzeros = base.require_atoms(state.linear, setting, len(state.values))
        rotation, codes = rotate(state.coordinates, atoms, nonzeros, self.rounds)
        rows = (
            base.best_dictionary(codes, state.weight)
            if self.free
            else base.unwhiten(state, rotation)
        )
        return base.store(state.dense, state.roots, codes, project_columns(nonzeros)(codes), rows)

    def measure(self, state: base.Basis, module: Approximation) -> float:
        return state.error(module)
