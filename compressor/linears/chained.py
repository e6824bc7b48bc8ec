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

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.linears.base import Blank, CompressedLinear
from compressor.linears.packed import IntegerMatrix, Packed


class Chained(CompressedLinear):
    """y = up · (down · x) + bias."""

    kind = "chained"
    sizes: ClassVar = {"rank": "rank", "down": "down_spec", "up": "up_spec"}
    factor_names = ("scales", "up_scales")

    scales: nn.Parameter
    zeros: Tensor | None
    up_codes: Tensor
    up_scales: nn.Parameter
    up_zeros: Tensor | None

    def __init__(self, down: Packed, up: Packed):
        """Take the tensors of two packed weights as they are (no copy, no cast); the bias is that
        of `up`.

        Args:
            down: (r, in), without bias.
            up: (out, r).
        """
        super().__init__(down.in_features, up.out_features)
        self.rank, self.code_bits = down.out_features, (down.code_bits, up.code_bits)
        self.store(weight=down.weight, scales=down.scales, zeros=down.zeros)
        self.store(up_codes=up.weight, up_scales=up.scales, up_zeros=up.zeros, bias=up.bias)

    @classmethod
    def empty(cls, spec: Mapping[str, Any], blank: Blank) -> Self:
        return cls(Packed.empty(spec["down"], blank), Packed.empty(spec["up"], blank))

    @property
    def down(self) -> IntegerMatrix:
        return IntegerMatrix(
            self.weight, self.scales, self.zeros, self.code_bits[0], self.in_features
        )

    @property
    def up(self) -> IntegerMatrix:
        return IntegerMatrix(
            self.up_codes, self.up_scales, self.up_zeros, self.code_bits[1], self.rank
        )

    @property
    def down_spec(self) -> dict[str, Any]:
        return self.down.spec(False)

    @property
    def up_spec(self) -> dict[str, Any]:
        return self.up.spec(self.has_bias)

    def multiply_adds(self) -> int:
        return self.rank * (self.in_features + self.out_features)

    def forward(self, input: Tensor) -> Tensor:
        inner = functional.linear(input, self.down.rebuild())
        return functional.linear(inner, self.up.rebuild(), self.bias)

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        wide = torch.promote_types(self.scales.dtype, torch.float32)
        return self.up.decode(wide) @ self.down.decode(wide)
