"""Bit masks as storage kinds keep them, one bit for each position, most significant bit first, in
whole bytes; and the storage of the entries of a matrix inside such a mask.
"""

from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.linears.base import CompressedLinear


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a boolean mask (n,) into uint8 (⌈n / 8⌉,), most significant bit first."""
    padded = functional.pad(mask.to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=mask.device)
    return (padded * weights).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, length: int) -> Tensor:
    """Undo `pack_mask`: uint8 (⌈length / 8⌉,) to a boolean mask (length,)."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).flatten()[:length].bool()


class Masked(CompressedLinear):
    """Storage of the entries of one matrix inside a bit mask, for kinds that differ in what the
    matrix is.
    """

    has_movable_support = True
    can_absorb = True

    weight: nn.Parameter  # (nonzeros,)
    mask: Tensor

    @property
    @abstractmethod
    def columns(self) -> int:
        """Width of the matrix, whose rows are the outputs."""

    @property
    def nonzeros(self) -> int:
        return self.weight.numel()

    def support(self) -> Tensor:
        return unpack_mask(self.mask, self.out_features * self.columns).view(
            self.out_features, self.columns
        )

    def matrix(self) -> Tensor:
        """Rebuild the matrix (out, columns) in the dtype of the values, differentiable in them."""
        support = self.support()
        return self.weight.new_zeros(support.shape).masked_scatter(support, self.weight)
