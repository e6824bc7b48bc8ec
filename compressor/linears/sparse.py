"""Sparse: Ŵ with the entries outside a bit mask at zero, stored as the packed values inside it and
the mask.

A bit mask takes 16 d + 1 bits for each entry at density d, within 4 % of the entropy bound for
densities from 0.25 to 0.75. N:M patterns are stored the same way: at 2:4 two-bit positions of the
kept entries would take just as many bits, one for each entry, and at 4:8 (three-bit positions) half
as many again.

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

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from compressor.linears.base import Blank
from compressor.linears.masks import Masked
from compressor.linears.rebuilt import memoise


class Sparse(Masked):
    """y = Ŵ x + bias with Ŵ[mask] = weight and zero elsewhere."""

    kind = "sparse"
    sizes: ClassVar = {"nonzeros": "nonzeros", "bias": "has_bias"}

    def __init__(
        self, weight: Tensor, mask: Tensor, bias: Tensor | None, in_features: int, out_features: int
    ):
        """Wrap stored tensors as they are (no copy, no cast).

        Args:
            weight: (nonzeros,).
            mask: packed mask of (out, in), uint8.
            bias: (out,) or None.
        """
        super().__init__(in_features, out_features)
        self.store(weight=weight, mask=mask, bias=bias)

    @classmethod
    def empty(cls, spec: Mapping[str, Any], blank: Blank) -> Self:
        width, height = spec["in_features"], spec["out_features"]
        mask = blank.bits(height * width)
        return cls(blank.floats(spec["nonzeros"]), mask, blank.bias(spec), width, height)

    @property
    def columns(self) -> int:
        return self.in_features

    def forward(self, input: Tensor) -> Tensor:
        learning = torch.is_grad_enabled() and self.weight.requires_grad
        dense = self.matrix() if learning else memoise((self.weight, self.mask), self.matrix)
        return functional.linear(input, dense, self.bias)

    def multiply_adds(self) -> int:
        return self.out_features * self.in_features

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        return self.matrix().to(torch.promote_types(self.weight.dtype, torch.float32))
