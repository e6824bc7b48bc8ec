"""Chained: a low-rank pair of integers, Ŵ = up · down, each factor packed with scales of its own.

References: SVD-LLM with GPTQ on both factors (arXiv 2403.07378); the factors of LQER (arXiv
2402.02446) and of CALDERA (arXiv 2405.18886) are integers as well.

Glossary
    weight, scales, zeros           codes, scales and zero points of the down factor (r, in), as in
                                    `packed`
    up_codes, up_scales, up_zeros   the same of the up factor (out, r)

Execution: both factors are rebuilt as `packed` rebuilds its weight, and multiplied one after the
other.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.linears.base import CompressedLinear
from compressor.linears.packed import Packed, decode, executed


class Chained(CompressedLinear):
    """y = up · (down · x) + bias."""

    kind = "chained"

    def __init__(self, down: Packed, up: Packed):
        """Take the tensors of two packed weights as they are (no copy, no cast); the bias is that
        of `up`.

        down: (r, in), no bias; up: (out, r).
        """
        super().__init__(down.in_features, up.out_features)
        self.rank, self.code_bits = down.out_features, (down.code_bits, up.code_bits)
        self.register_buffer("weight", down.weight)
        self.scales = down.scales
        self.register_buffer("zeros", down.zeros)
        self.register_buffer("up_codes", up.weight)
        self.up_scales = up.scales
        self.register_buffer("up_zeros", up.zeros)
        self.register_parameter("bias", up.bias)

    def spec(self) -> dict[str, Any]:
        def factor(
            scales: nn.Parameter, zeros: Tensor | None, bits: int, width: int, bias: bool
        ) -> dict[str, Any]:
            height, groups = scales.shape
            sizes = {"kind": Packed.kind, "in_features": width, "out_features": height}
            return sizes | {
                "bits": bits,
                "group": width // groups,
                "symmetric": zeros is None,
                "bias": bias,
            }

        return {
            "kind": self.kind,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "down": factor(self.scales, self.zeros, self.code_bits[0], self.in_features, False),
            "up": factor(
                self.up_scales, self.up_zeros, self.code_bits[1], self.rank, self.bias is not None
            ),
        }

    @classmethod
    def empty(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> Self:
        return cls(
            Packed.empty(spec["down"], dtype, device), Packed.empty(spec["up"], dtype, device)
        )

    def stored(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Arguments of `decode` and `executed` for down and up."""
        down = self.weight, self.scales, self.zeros, self.code_bits[0], self.in_features
        return down, (self.up_codes, self.up_scales, self.up_zeros, self.code_bits[1], self.rank)

    def multiply_adds(self) -> int:
        return self.rank * (self.in_features + self.out_features)

    def forward(self, input: Tensor) -> Tensor:
        down, up = (executed(*factor) for factor in self.stored())
        return functional.linear(functional.linear(input, down), up, self.bias)

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        wide = torch.promote_types(self.scales.dtype, torch.float32)
        down, up = (decode(*factor, wide) for factor in self.stored())
        return up @ down
