"""Sparse: Ŵ with the entries outside a bit mask at zero, stored as the packed values inside it and
the mask.

References: bitmap storage is the sparse-dictionary card's §10.1: 16 d + 1 bits for each entry at
density d, within 4 % of the entropy bound for densities from 0.25 to 0.75. N:M patterns are stored
the same way: at 2:4 two-bit positions of the kept entries would take just as many bits, one for
each entry, and at 4:8 (three-bit positions) half as many again.

Glossary
    weight  (nonzeros,) values of Ŵ inside the mask, row-major, so that the values of an output are
            contiguous; rows may differ in number
    mask    bit mask of Ŵ, row-major, most significant bit first, ⌈out · in / 8⌉ bytes; a value
            inside it may be zero

Execution: Ŵ is rebuilt and multiplied as a dense matrix. Without autograd it is rebuilt once and
kept, which costs the memory of the dense weight, in the dtype of the values, beside the stored
tensors; with autograd on the values it is rebuilt for each forward pass. Measured on one core, 1024
× 1024 at density 0.5, float32, milliseconds for 1 and for 512 tokens: dense product 0.2 and 13;
rebuilding first 12 and 25; CSR product (which needs 32-bit indices besides) 1.9 and 76. Sparsity
saves bytes on disk and in transfer, not time.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.linears.base import CompressedLinear
from compressor.linears.masks import unpack_mask
from compressor.linears.rebuilt import kept


class Sparse(CompressedLinear):
    """y = Ŵ x + bias with Ŵ[mask] = weight and zero elsewhere."""

    kind = "sparse"

    def __init__(
        self, weight: Tensor, mask: Tensor, bias: Tensor | None, in_features: int, out_features: int
    ):
        """Wrap stored tensors as they are (no copy, no cast).

        weight: (nonzeros,); mask: packed mask of (out, in), uint8; bias: (out,) or None.
        """
        super().__init__(in_features, out_features)
        self.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)
        self.register_buffer("mask", mask)
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias, requires_grad=bias.requires_grad)
        )

    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "nonzeros": self.weight.numel(),
            "bias": self.bias is not None,
        }

    @classmethod
    def empty(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> Self:
        width, height = spec["in_features"], spec["out_features"]
        return cls(
            weight=torch.empty(spec["nonzeros"], dtype=dtype, device=device),
            mask=torch.empty((height * width + 7) // 8, dtype=torch.uint8, device=device),
            bias=torch.empty(height, dtype=dtype, device=device) if spec["bias"] else None,
            in_features=width,
            out_features=height,
        )

    def rebuild(self) -> Tensor:
        """Ŵ (out, in) in the dtype of the values, differentiable in them."""
        mask = unpack_mask(self.mask, self.out_features * self.in_features)
        return (
            self.weight.new_zeros(mask.numel())
            .masked_scatter(mask, self.weight)
            .view(self.out_features, self.in_features)
        )

    def forward(self, input: Tensor) -> Tensor:
        learning = torch.is_grad_enabled() and self.weight.requires_grad
        return functional.linear(
            input,
            self.rebuild() if learning else kept((self.weight, self.mask), self.rebuild),
            self.bias,
        )

    def multiply_adds(self) -> int:
        return self.out_features * self.in_features

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        return self.rebuild().to(torch.promote_types(self.weight.dtype, torch.float32))
