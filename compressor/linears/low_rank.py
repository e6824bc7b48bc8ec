"""Low rank: Ŵ = up · down, stored as a factor pair or, with r² numbers fewer and no loss, as a
pivoted pair.

References: the factor pair is every SVD method's; the pivoted pair is PIFA (arXiv 2501.19090) and
PivGa (arXiv 2512.03062), here with pivot *columns*, so that outputs, heads and biases keep their
order.

Glossary
    weight  plain: down factor B (r, in); pivoted: Q̃ (r, in − r), the non-pivot columns in terms of
            the pivot columns
    up      plain: A (out, r); pivoted: the r pivot columns of Ŵ
    pivots  bit mask of the pivot columns, most significant bit first, ⌈in / 8⌉ bytes
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.linears.base import CompressedLinear
from compressor.linears.masks import unpack_mask


class LowRank(CompressedLinear):
    """y = up · (weight · x) + bias; pivoted: y = up · (x[pivots] + weight · x[others]) + bias."""

    kind = "low_rank"

    def __init__(
        self, weight: Tensor, up: Tensor, bias: Tensor | None, pivots: Tensor | None = None
    ):
        """Wrap stored tensors as they are (no copy, no cast).

        weight: (r, in), or (r, in − r) with pivots; up: (out, r); bias: (out,) or None; pivots:
        packed mask, uint8.
        """
        rank, width = weight.shape
        super().__init__(width if pivots is None else width + rank, up.shape[0])
        self.rank = rank
        self.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)
        self.up = nn.Parameter(up, requires_grad=up.requires_grad)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=bias.requires_grad)
        self.register_buffer("pivots", pivots)
        self._order: Tensor | None = (
            None  # input columns, pivots first; derived from `pivots` on first use
        )

    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "pivoted": self.pivots is not None,
            "bias": self.bias is not None,
        }

    @classmethod
    def empty(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> Self:
        rank, width, height = spec["rank"], spec["in_features"], spec["out_features"]
        floating = {"dtype": dtype, "device": device}
        return cls(
            weight=torch.empty(rank, width - rank if spec["pivoted"] else width, **floating),
            up=torch.empty(height, rank, **floating),
            bias=torch.empty(height, **floating) if spec["bias"] else None,
            pivots=torch.empty((width + 7) // 8, dtype=torch.uint8, device=device)
            if spec["pivoted"]
            else None,
        )

    def order(self) -> Tensor:
        """Input columns (in,), int64: pivots first, then the others, both ascending."""
        if self._order is None or self._order.device != self.pivots.device:
            with torch.inference_mode(
                False
            ):  # an inference tensor could not be used by a training step later
                mask = unpack_mask(self.pivots.clone(), self.in_features)
                self._order = torch.cat([mask.nonzero().flatten(), (~mask).nonzero().flatten()])
        return self._order

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._order = None

    def forward(self, input: Tensor) -> Tensor:
        if self.pivots is None:
            return functional.linear(functional.linear(input, self.weight), self.up, self.bias)
        pivot, other = input[..., self.order()].split(
            [self.rank, self.in_features - self.rank], dim=-1
        )
        return functional.linear(pivot + functional.linear(other, self.weight), self.up, self.bias)

    def multiply_adds(self) -> int:
        return self.weight.numel() + self.up.numel()

    def factors(self) -> tuple[Tensor, Tensor]:
        """up (out, r) and down (r, in), without autograd; of a pivoted pair what it stands for, the
        identity at its pivots.
        """
        up, weight = self.up.detach(), self.weight.detach()
        if self.pivots is None:
            return up, weight
        down = weight.new_empty(self.rank, self.in_features)
        down[:, self.order()] = torch.cat(
            [torch.eye(self.rank, dtype=weight.dtype, device=weight.device), weight], dim=1
        )
        return up, down

    def to_dense(self) -> Tensor:
        wide = torch.promote_types(self.up.dtype, torch.float32)
        up, weight = self.up.detach().to(wide), self.weight.detach().to(wide)
        if self.pivots is None:
            return up @ weight
        dense = up.new_empty(self.out_features, self.in_features)
        dense[:, self.order()] = torch.cat([up, up @ weight], dim=1)
        return dense
