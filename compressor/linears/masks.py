"""Bit masks as storage kinds keep them: one bit for each position, most significant bit first, in
whole bytes.
"""

import torch
from torch import Tensor
from torch.nn import functional


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a boolean mask (n,) into uint8 (⌈n / 8⌉,), most significant bit first."""
    padded = functional.pad(mask.to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=mask.device)
    return (padded * weights).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, length: int) -> Tensor:
    """Undo `pack_mask`: uint8 (⌈length / 8⌉,) to a boolean mask (length,)."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).flatten()[:length].bool()
