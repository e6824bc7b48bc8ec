"""Smaller ranks for products of two factors, by the exact QR route. Pure functions of tensors; no
(out, in) matrix is formed.

Reference: LoRA-Squeeze (arXiv 2602.10993). With B = Q_B R_B and Aᵀ = Q_A R_A, ΔW = s B A = Q_B K
Q_Aᵀ with the small core K = s R_B R_Aᵀ, so the SVD of K is that of ΔW: O((out + in) r²). Under a
metric M (in, in) the SVD is that of K C, where C Cᵀ = Q_Aᵀ M Q_A; its left vectors U alone give the
best rank-t approximation, Q_B U_t U_tᵀ K Q_Aᵀ, so that C is never inverted and M may be singular.

Glossary
    up B (out, r)   down A (r, in)   scale s   error = tr(D M Dᵀ) with D = ΔW − ΔW'; σ² = what one
                    component adds to it when left out
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import NumericalError
from compressor.linalg import Metric, eigh_descending, require_finite


@dataclass(frozen=True)
class Product:
    """Product that an adapter adds to one weight: scale · up · down."""

    up: Tensor  # (out, r)
    down: Tensor  # (r, in)
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def price(self) -> int:
        """Parameters of one rank."""
        return self.up.shape[0] + self.down.shape[1]


@dataclass(frozen=True)
class Components:
    """A product as a sum of rank-one parts, largest share of the energy first: left · right. At
    most min(out, in, r) of them.
    """

    left: Tensor  # (out, k) float64, orthonormal columns
    right: Tensor  # (k, in) float64
    energies: Tensor  # (k,) float64, σ²

    def tail(self, rank: int) -> float:
        """Error of the first `rank` parts: Σ σ² of the others."""
        return self.energies[rank:].sum().item()

    def take(self, rank: int) -> Product:
        """Take the best product of this rank, its size shared equally between the factors: without
        a metric B' = Q_B U √Σ, A' = √Σ Vᵀ Q_Aᵀ.
        """
        norms = torch.linalg.vector_norm(self.right[:rank], dim=1).sqrt()
        return Product(
            self.left[:, :rank] * norms,
            self.right[:rank] / torch.where(norms > 0, norms, 1.0)[:, None],
        )


def core(product: Product, what: str) -> tuple[Tensor, Tensor, Tensor]:
    """Q_B (out, p), K (p, q) with p ≤ q, and Q_Aᵀ (q, in) with Q_B K Q_Aᵀ = ΔW, float64. Raises
    NumericalError naming `what`.
    """
    up, down = product.up.double(), product.down.double()
    require_finite(up, what)
    require_finite(down, what)
    left, upper = torch.linalg.qr(up)
    right, lower = torch.linalg.qr(down.T)
    frame, inner = torch.linalg.qr(
        product.scale * upper @ lower.T
    )  # so that no row of K is beyond its columns
    return left @ frame, inner, right.T


def decompose(product: Product, metric: Metric, what: str) -> Components:
    """Decompose a product under tr(D M Dᵀ), M (in, in). Raises NumericalError naming `what`."""
    left, inner, right = core(product, what)
    weighted = inner
    if metric.moment is not None:
        values, vectors = eigh_descending(metric.weigh(right) @ right.T, what)
        weighted = inner @ vectors * values.clamp(min=0).sqrt()
    try:
        vectors, sigma, _ = torch.linalg.svd(weighted, full_matrices=False)
    except torch.linalg.LinAlgError as error:
        raise NumericalError(
            f"{what}: the singular value decomposition does not converge ({error})"
        ) from None
    return Components(left @ vectors, vectors.T @ inner @ right, sigma.square())


def energy(product: Product, metric: Metric, what: str) -> float:
    """Compute tr(ΔW M ΔWᵀ), never below 0. Raises NumericalError naming `what`."""
    _, inner, right = core(product, what)
    return max(metric.energy(inner @ right), 0.0)


def difference(product: Product, other: Product) -> Product:
    """Write ΔW − ΔW' as a product, of the sum of the ranks."""
    up = torch.cat([product.scale * product.up.double(), -other.scale * other.up.double()], dim=1)
    return Product(up, torch.cat([product.down.double(), other.down.double()]))
