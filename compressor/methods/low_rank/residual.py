"""The low-rank part that best makes up for what a compressed weight has lost, for any compressed
weight: EoRA in closed form.

Reference: EoRA, arXiv 2410.21271; the same optimum as QERA-exact (arXiv 2410.06040) and SVD-LLM's
whitening applied to E.

Glossary
    lost E (out, in)   W − Ŵ                      Δ W
    metric M, H = L Lᵀ                            X̃ X̃ᵀ; EoRA has no H
    frame U (out, r)   leading eigenvectors of Lᵀ E M Eᵀ L; up · down = L⁻ᵀ U · Uᵀ Lᵀ E        B', A
    tail               Σ of the other eigenvalues, which is tr(H (E − up · down) M (E − up ·
                       down)ᵀ): one decomposition serves every rank

Differs from the paper: it takes the truncated SVD of E times a root of M and multiplies by the
inverse root, which explodes where M is nearly singular; the eigenvectors on the side of the outputs
give the same product without an inverse. M is a plain mean over tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor import linalg
from compressor.linalg import Metric


@dataclass(frozen=True)
class Residual:
    """Residuals of every rank up to some largest one."""

    # (largest rank + 1,) error left behind a residual of rank 0, 1, …; absolute, float64
    tail: Tensor
    frame: Tensor  # (out, largest rank) U, float64

    def pair(self, lost: Tensor, root: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
        """up (out, r) and down (r, in) of one rank, float64; lost: the very E (out, in) that was
        decomposed.
        """
        frame = self.frame[:, :rank]
        if root is None:
            return frame, frame.T @ lost.double()
        up = torch.linalg.solve_triangular(root.T, frame, upper=True)
        scale = up.norm(dim=0)  # gradients may be far from 1, and half precision is not wide
        return up / scale, scale[:, None] * (frame.T @ (root.T @ lost.double()))


def decompose(lost: Tensor, metric: Metric, root: Tensor | None, most: int, what: str) -> Residual:
    """Residuals of E (out, in) up to rank `most`. root: L (out, out) or None. Raises NumericalError
    naming `what`.
    """
    seen = lost.double() if root is None else root.T @ lost.double()
    values, frame = linalg.principal_outputs(seen, metric, what)
    tail = torch.cat([values.clamp(min=0).flip(0).cumsum(0).flip(0), values.new_zeros(1)])
    return Residual(tail[: most + 1].clone(), frame[:, :most].clone())
