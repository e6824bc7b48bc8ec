"""One dictionary shared by two linears: the generalised Sylvester equation of its least-squares
update.

Reference: GeoPair, arXiv 2609.25963.

Objective: Σ_i tr((W_i − S_iᵀ Dᵀ) G_i (W_i − S_iᵀ Dᵀ)ᵀ) over D for fixed codes S_i. Its gradient
vanishes where G_1 D B_1 + G_2 D B_2 = K, with B_i = S_i S_iᵀ and K = Σ_i G_i W_iᵀ S_iᵀ. The
eigenvectors P of the pair (G_1, G_2) and Q of (B_1, B_2) make both terms diagonal: Pᵀ G_1 P = I, Pᵀ
G_2 P = Λ, Qᵀ B_1 Q = I, Qᵀ B_2 Q = Σ, so that D = P [(Pᵀ K Q) / (1 + λ σᵀ)] Qᵀ.

Differs from the paper: linears that read the same inputs have one Gram, for which the update is the
closed form of one linear on their concatenation, whatever that Gram is; then nothing is factorised
but S Sᵀ.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from compressor import linalg
from compressor.methods.dictionary.base import best_dictionary

DAMPING = 1e-6  # of the code moments B_i, relative to their mean diagonal, as published


def pair_basis(first: Tensor, second: Tensor, what: str, option: str) -> tuple[Tensor, Tensor]:
    """P (n, n) and λ (n,) with Pᵀ · first · P = I and Pᵀ · second · P = diag(λ), float64.

    first: (n, n), positive definite; second: (n, n), symmetric. Raises NumericalError naming `what`
    and the damping `option` otherwise.
    """
    root = linalg.cholesky(first, what, option)  # first = L Lᵀ
    reduced = torch.linalg.solve_triangular(
        root, torch.linalg.solve_triangular(root, second.double(), upper=False).T, upper=False
    )
    values, vectors = linalg.eigh_descending((reduced + reduced.T) / 2, what)
    return torch.linalg.solve_triangular(root.T, vectors, upper=True), values


def gram_basis(grams: tuple[Tensor, Tensor], what: str) -> tuple[Tensor, Tensor]:
    """P and λ of two Grams, see `pair_basis`: the same for all codes. Raises NumericalError naming
    `what`.
    """
    return pair_basis(*grams, f"{what}: the Gram", "shrink_gram")


def sylvester(
    basis: tuple[Tensor, Tensor], moments: tuple[Tensor, Tensor], right: Tensor, what: str
) -> Tensor:
    """D (m, k) with G_1 D B_1 + G_2 D B_2 = K. basis: `gram_basis` of two (m, m) Grams; moments:
    two (k, k), the first positive definite, the second at least semi-definite; right: K (m, k).
    Raises NumericalError naming `what` otherwise.
    """
    inputs, input_values = basis
    codes, code_values = pair_basis(*moments, f"{what}: the moment of the codes", "nonzeros")
    return (
        inputs
        @ ((inputs.T @ right.double() @ codes) / (1 + torch.outer(input_values, code_values)))
        @ codes.T
    )


def shared_dictionary(
    weights: Sequence[Tensor],
    grams: Sequence[Tensor],
    codes: Sequence[Tensor],
    what: str,
    basis: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Compute Dᵀ (k, in), the best dictionary that two linears share, each in its own metric, for
    given codes; or that of one alone.

    weights: two (out_i, in); grams: two (in, in), sums or means alike, the first positive definite;
    codes: two (k, out_i); basis: that of the Grams where it is known.
    """
    if len(grams) == 1 or torch.equal(*grams):
        return best_dictionary(torch.cat(list(codes), dim=1), torch.cat(list(weights)))
    first, second = (code.double() for code in codes)
    moments = damp(first @ first.T), damp(second @ second.T)
    right = sum(
        (
            gram.double() @ (code.double() @ weight.double()).T
            for weight, gram, code in zip(weights, grams, codes, strict=True)
        ),
        weights[0].new_zeros(()).double(),
    )
    basis = basis or gram_basis((grams[0], grams[1]), what)
    return sylvester(basis, moments, right, what).T


def damp(moment: Tensor) -> Tensor:
    """Form B + DAMPING · mean(diag B) · I; DAMPING · I if there are no codes at all."""
    level = moment.diagonal().mean().item() or 1.0
    return moment + DAMPING * level * torch.eye(len(moment)).to(moment)
