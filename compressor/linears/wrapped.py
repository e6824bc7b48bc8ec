"""Wrapped: a 2:4 sparse core between two block-diagonal wrappers, Ŵ = A S B.

References: ARMOR (arXiv 2510.05528).

Glossary
    weight     (out · in / 2,) the two values of every four consecutive entries of a row of S,
               row-major
    positions  their places within the four, ascending, two bits each, most significant bits first,
               ⌈out · in / 8⌉ bytes
    left       (out / b, b, b) diagonal blocks of A
    right      (in / c, c, c) diagonal blocks of B

Execution: the wrappers are two batched small products, S is rebuilt and multiplied as a dense
matrix, and kept as `sparse` keeps its weight. Four rows of positions and values are what sparse
tensor cores read, after a permutation of their own.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.linears.base import Blank, CompressedLinear
from compressor.linears.rebuilt import memoise

KEPT, GROUP = 2, 4  # of every four consecutive entries two are stored


def pack_positions(positions: Tensor) -> Tensor:
    """Pack positions (n,) from 0 to 3 into uint8 (⌈n / 4⌉,), the first one into the most
    significant bits.
    """
    padded = functional.pad(positions.to(torch.uint8), (0, -positions.numel() % 4)).view(-1, 4)
    return (padded << torch.tensor([6, 4, 2, 0], dtype=torch.uint8, device=positions.device)).sum(
        1, dtype=torch.uint8
    )


def unpack_positions(packed: Tensor, length: int) -> Tensor:
    """Undo `pack_positions`: uint8 (⌈length / 4⌉,) to int64 (length,)."""
    shifts = torch.tensor([6, 4, 2, 0], dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 3).flatten()[:length].long()


def multiply_blocks(blocks: Tensor, x: Tensor) -> Tensor:
    """Multiply every row of x by a block-diagonal matrix: x · blocksᵀ.

    Args:
        blocks: (n / b, b, b), the blocks of its diagonal.
        x: (…, n).
    """
    slices = x.reshape(-1, *blocks.shape[:2]).transpose(0, 1)  # (n / b, rows, b)
    return torch.bmm(slices, blocks.mT).transpose(0, 1).reshape(x.shape)


class Wrapped(CompressedLinear):
    """y = left · (S · (right · x)) + bias, two of four consecutive entries of S stored."""

    kind = "wrapped"
    sizes: ClassVar = {"left": "left_block", "right": "right_block", "bias": "has_bias"}
    can_absorb = True

    weight: nn.Parameter
    positions: Tensor
    left: nn.Parameter
    right: nn.Parameter

    def __init__(
        self, weight: Tensor, positions: Tensor, left: Tensor, right: Tensor, bias: Tensor | None
    ):
        """Wrap stored tensors as they are (no copy, no cast).

        Args:
            weight: (out · in / 2,).
            positions: packed, uint8.
            left: (out / b, b, b).
            right: (in / c, c, c).
            bias: (out,) or None.
        """
        super().__init__(right.shape[0] * right.shape[1], left.shape[0] * left.shape[1])
        self.store(weight=weight, left=left, right=right, positions=positions, bias=bias)

    @classmethod
    def of(
        cls,
        core: Tensor,
        mask: Tensor,
        left: Tensor,
        right: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Self:
        """Store a core (out, in) whose mask holds two of every four consecutive entries of a row;
        everything cast to `dtype`.

        Args:
            core: (out, in).
            mask: (out, in), boolean.
            left: (out / b, b, b).
            right: (in / c, c, c).
            bias: (out,) or None.
        """
        fours = mask.view(-1, GROUP).to(torch.uint8)
        places = fours.sort(dim=1, descending=True, stable=True).indices[:, :KEPT]
        return cls(
            core.reshape(-1, GROUP).gather(1, places).flatten().to(dtype),
            pack_positions(places.flatten()),
            left.to(dtype, copy=True),
            right.to(dtype, copy=True),
            None if bias is None else bias.to(dtype, copy=True),
        )

    @classmethod
    def empty(cls, spec: Mapping[str, Any], blank: Blank) -> Self:
        height, width, b, c = spec["out_features"], spec["in_features"], spec["left"], spec["right"]
        if b < 1 or c < 1 or height % b or width % c or width % GROUP:
            raise ValueError(
                f"wrappers of {b} and {c} around groups of {GROUP} do not make {height} outputs "
                f"of {width} inputs"
            )
        return cls(
            blank.floats(height * width // 2),
            blank.bits(height * width),
            blank.floats(height // b, b, b),
            blank.floats(width // c, c, c),
            blank.bias(spec),
        )

    @property
    def left_block(self) -> int:
        return self.left.shape[1]

    @property
    def right_block(self) -> int:
        return self.right.shape[1]

    def places(self) -> Tensor:
        """Return the places of the stored entries within their fours, (out, in / 4, 2) int64."""
        return unpack_positions(self.positions, self.out_features * self.in_features // 2).view(
            self.out_features, -1, KEPT
        )

    def support(self) -> Tensor:
        places = self.places()
        fours = torch.zeros(*places.shape[:2], GROUP, dtype=torch.bool, device=places.device)
        return fours.scatter(2, places, True).flatten(1)

    def core(self) -> Tensor:
        """Rebuild S (out, in) in the dtype of the values, differentiable in them."""
        values = self.weight.view(self.out_features, -1, KEPT)
        return (
            values.new_zeros(*values.shape[:2], GROUP).scatter(2, self.places(), values).flatten(1)
        )

    def forward(self, input: Tensor) -> Tensor:
        learning = torch.is_grad_enabled() and self.weight.requires_grad
        core = self.core() if learning else memoise((self.weight, self.positions), self.core)
        output = multiply_blocks(
            self.left, functional.linear(multiply_blocks(self.right, input), core)
        )
        return output if self.bias is None else output + self.bias

    def multiply_adds(self) -> int:
        return self.out_features * self.in_features + self.left.numel() + self.right.numel()

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return multiply_blocks(
            self.right.to(wide).mT, multiply_blocks(self.left.to(wide), self.core().to(wide).T).T
        )
