"""Factorisations behind the methods: eigenbases, Cholesky factors, pivot columns. Pure functions of
tensors.

References: the eigenvector form of weighted truncation is LoRD's (arXiv 2309.14021) and SVD-LLM's
optimum (arXiv 2403.07378, theorem 3.2) without its Cholesky factor; the two-sided metric is
KFAC-SVD's; pivoted storage is PIFA's (arXiv 2501.19090).

Glossary
    weight W (out, in)   metric M (in, in)   grad_gram H = L Lᵀ (out, out)
    error = tr(H D M Dᵀ) with D = W − Ŵ; H is the identity unless the metric is two-sided
"""

from collections.abc import Sequence

import scipy.linalg
import torch
from torch import Tensor

from compressor.errors import NumericalError
from compressor.linalg.metric import Metric

CANCELLED = 1e-6  # of the mean's energy: what float32 sums may leave of a centred metric that is 0


def require_finite(matrix: Tensor, what: str) -> None:
    """Raise NumericalError naming `what` if any entry of `matrix` is NaN or infinite."""
    if not torch.isfinite(matrix).all():
        raise NumericalError(
            f"{what} holds NaN or infinity; check the weights and the calibration text"
        )


def eigh_descending(matrix: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,), descending, and eigenvectors (n, n) of a symmetric matrix, in float64.

    Each eigenvector's largest entry is positive, so that equal inputs give equal factors. LAPACK's
    divide and conquer is tried first and its QR iteration second; both compute the same
    decomposition. Raises NumericalError naming `what`.
    """
    matrix = matrix.double()
    require_finite(matrix, what)
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        try:
            values, vectors = (
                torch.from_numpy(part).to(matrix.device)
                for part in scipy.linalg.eigh(matrix.cpu().numpy(), driver="ev")
            )
        except scipy.linalg.LinAlgError as error:
            raise NumericalError(
                f"{what}: the eigendecomposition does not converge ({error})"
            ) from None
    values, vectors = values.flip(0), vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values, vectors * torch.where(largest < 0, -1.0, 1.0)


def principal_outputs(weight: Tensor, metric: Metric, what: str) -> tuple[Tensor, Tensor]:
    """Leading output directions of a weighted weight: eigenpairs of W M Wᵀ.

    The best rank-r Ŵ under tr(D M Dᵀ) is U_r U_rᵀ W, and its error is the sum of the discarded
    eigenvalues: no inverse, no Cholesky, no damping, whatever the rank of M. The eigenproblem has
    the smaller side of W: a tall W = Q R is reduced by one QR to the core R M Rᵀ, whose
    eigenvectors Q carries back. Where every input is the mean, what centring leaves is rounding,
    and the eigenvalues are 0.

    weight: (out, in). Returns values (k,), descending, and U (out, k), k = min(out, in), float64.
    Raises NumericalError naming `what`.
    """
    weight = weight.double()
    require_finite(weight, what)
    frame, core = None, weight
    if weight.shape[0] > weight.shape[1]:
        frame, core = torch.linalg.qr(weight)
    values, vectors = eigh_descending(metric.weigh(core) @ core.T, what)
    if (
        metric.mean is not None
        and values.clamp(min=0).sum() <= CANCELLED * (core @ metric.mean).square().sum()
    ):
        values = torch.zeros_like(values)
    return values, vectors if frame is None else frame @ vectors


def cholesky(moment: Tensor, what: str, option: str) -> Tensor:
    """Lower L (n, n) with L Lᵀ = moment, float64. Raises NumericalError that names the damping
    `option` to raise.
    """
    factor, failed = torch.linalg.cholesky_ex(moment.double())
    if failed or not torch.isfinite(factor).all():
        raise NumericalError(f"{what} is not positive definite; raise the option '{option}'")
    return factor


def pivot_columns(down: Tensor, bound: float = 2.0) -> tuple[Tensor, Tensor]:
    """Choose r columns that span a factor B (r, in) and express the others in them: B = B[:, p] ·
    [I Q̃] up to column order.

    LU with partial pivoting on an orthonormal basis of the row space chooses them, then columns are
    swapped (Gu and Eisenstat's strong rank-revealing rule) until no entry of Q̃ exceeds `bound`;
    each swap multiplies the volume of the pivots by that entry, so it ends.

    Returns mask (in,), True at pivots, and Q̃ (r, in − r) float64, rows and columns in ascending
    column order. Raises NumericalError if B has not full row rank.
    """
    rank, width = down.shape
    basis = torch.linalg.qr(down.double().T)[0].T  # (r, in), orthonormal rows
    order = torch.arange(width, device=down.device)
    for place, taken in enumerate((torch.linalg.lu_factor(basis.T)[1] - 1).tolist()):
        order[[place, taken]] = order[[taken, place]]
    pivots, others = order[:rank].clone(), order[rank:].clone()
    coefficients = torch.linalg.solve(basis[:, pivots], basis[:, others])  # (r, in − r)
    while coefficients.abs().max() > bound:
        row, column = divmod(int(coefficients.abs().argmax()), width - rank)
        pivots[row], others[column] = others[column].clone(), pivots[row].clone()
        coefficients = exchange(coefficients, row, column)
    pivots, others = pivots.sort().values, others.sort().values
    coefficients = torch.linalg.solve(
        basis[:, pivots], basis[:, others]
    )  # once more: without the rounding of the exchanges
    require_finite(coefficients, "pivoted factor")
    mask = torch.zeros(width, dtype=torch.bool, device=down.device)
    mask[pivots] = True
    return mask, coefficients


def exchange(coefficients: Tensor, row: int, column: int) -> Tensor:
    """Coefficients (r, in − r) after pivot `row` and non-pivot `column` trade places: the simplex
    exchange step, O(r · in).
    """
    pivot = coefficients[row, column].clone()
    updated = coefficients - torch.outer(coefficients[:, column], coefficients[row]) / pivot
    updated[row] = coefficients[row] / pivot
    updated[:, column] = -coefficients[:, column] / pivot
    updated[row, column] = 1 / pivot
    return updated


def drift(
    gram: Tensor, cross_gram: Tensor, dampings: Sequence[float], what: str
) -> tuple[Tensor, float]:
    """Map Δ (in, in) = (C − Ĝ) (Ĝ + λI)⁻¹ from shifted inputs x̂ to what the dense inputs x hold
    beyond them; and the damping taken.

    For targets W x and inputs x̂, ‖W X − Ŵ X̂‖² = tr((W̃ − Ŵ) Ĝ (W̃ − Ŵ)ᵀ) + what no Ŵ can reach,
    with W̃ = W C Ĝ⁻¹ = W (I + Δ) at λ = 0 (SAES-SVD, arXiv 2602.03051; AA-SVD, arXiv 2604.02119).
    Damping λ leaves directions that x̂ hardly has as they are.

    gram: (in, in) Σ x̂ x̂ᵀ; cross_gram: (in, in) Σ x x̂ᵀ; dampings: λ ÷ mean diagonal, tried in
    this order until Ĝ + λI is positive definite. Raises NumericalError naming `what` if none is.
    """
    mean = gram.diagonal().mean()
    for damping in dampings:
        factor, failed = torch.linalg.cholesky_ex(
            gram.double()
            + damping * mean * torch.eye(len(gram), dtype=torch.float64, device=gram.device)
        )
        if not failed and torch.isfinite(factor).all():
            return torch.cholesky_solve((cross_gram - gram).double().T, factor).T, damping
    raise NumericalError(
        f"{what}: the Gram is singular at dampings {list(dampings)}; add a larger one to "
        "calibration.anchor_damping"
    )
