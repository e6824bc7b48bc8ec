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

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor import linalg
from compressor.linalg import Metric
from compressor.linalg.products import Product, decompose
from compressor.linears.base import Blank, CompressedLinear, Dense
from compressor.linears.masks import pack_mask, unpack_mask


def pair_size(dense: Dense, rank: int, pivoted: bool, biased: bool) -> tuple[int, int, int]:
    """Count (bits, parameters, multiply-adds for a token) of a rank-r pair in the dtype of `dense`.

    Plain: r (in + out) numbers; pivoted: r (in + out − r) numbers and one bit for each input, in
    whole bytes (PIFA, arXiv 2501.19090).
    """
    height, width = dense.weight.shape
    multiply_adds = rank * (height + width - (rank if pivoted else 0))
    parameters = multiply_adds + (height if biased else 0)
    return (
        parameters * dense.dtype.itemsize * 8 + (8 * ((width + 7) // 8) if pivoted else 0),
        parameters,
        multiply_adds,
    )


def approximate_sum(
    pair: tuple[Tensor, Tensor], product: Product, metric: Metric, linear: str
) -> Product:
    """Approximate up · down + product by a product of the rank of the pair, float64.

    Args:
        pair: up (out, r) and down (r, in).
        metric: M (in, in); the approximation is the best one in tr(D M Dᵀ).
        linear: name for errors.

    Raises:
        NumericalError: the numbers are not finite.
    """
    up, down = pair
    total = Product(torch.cat([up, product.scale * product.up], 1), torch.cat([down, product.down]))
    return decompose(total, metric, linear).take(len(down))


class LowRank(CompressedLinear):
    """y = up · (weight · x) + bias; pivoted: y = up · (x[pivots] + weight · x[others]) + bias."""

    kind = "low_rank"
    sizes: ClassVar = {"rank": "rank", "pivoted": "is_pivoted", "bias": "has_bias"}
    can_absorb = True
    factor_names = ("weight", "up")

    weight: nn.Parameter
    up: nn.Parameter
    pivots: Tensor | None

    def __init__(
        self, weight: Tensor, up: Tensor, bias: Tensor | None, pivots: Tensor | None = None
    ):
        """Wrap stored tensors as they are (no copy, no cast).

        Args:
            weight: (r, in), or (r, in − r) with pivots.
            up: (out, r).
            bias: (out,) or None.
            pivots: packed mask, uint8.
        """
        rank, width = weight.shape
        super().__init__(width if pivots is None else width + rank, up.shape[0])
        self.rank = rank
        self.store(weight=weight, up=up, bias=bias, pivots=pivots)
        # input columns, pivots first; derived from `pivots` on first use
        self._order: Tensor | None = None

    @classmethod
    def of(
        cls, up: Tensor, down: Tensor, bias: Tensor | None, dtype: torch.dtype, pivoted: bool
    ) -> Self:
        """Store Ŵ = up · down, pivoted or not, cast to `dtype`; new tensors.

        Args:
            up: (out, r).
            down: (r, in).
            bias: (out,) or None.
        """
        pivots = None
        if pivoted:
            mask, coefficients = linalg.pivot_columns(down)
            up, down, pivots = up @ down[:, mask], coefficients, pack_mask(mask)
        up, down = (
            factor.to(dtype, memory_format=torch.contiguous_format, copy=True)
            for factor in (up, down)
        )
        return cls(down, up, None if bias is None else bias.to(dtype, copy=True), pivots)

    @classmethod
    def empty(cls, spec: Mapping[str, Any], blank: Blank) -> Self:
        rank, width, pivoted = spec["rank"], spec["in_features"], spec["pivoted"]
        return cls(
            blank.floats(rank, width - rank if pivoted else width),
            blank.floats(spec["out_features"], rank),
            blank.bias(spec),
            blank.bits(width) if pivoted else None,
        )

    @property
    def is_pivoted(self) -> bool:
        return self.pivots is not None

    def order(self) -> Tensor:
        """Return the input columns (in,), int64: pivots first, then the others, both ascending."""
        assert self.pivots is not None, "only a pivoted pair orders its inputs"
        if self._order is None or self._order.device != self.pivots.device:
            # An inference tensor could not be used by a training step later.
            with torch.inference_mode(False):
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

    def low_rank_part(self) -> tuple[Tensor, Tensor]:
        """Return up (out, r) and down (r, in), without autograd; of a pivoted pair what it stands
        for, the identity at its pivots.
        """
        up, weight = self.up.detach(), self.weight.detach()
        if self.pivots is None:
            return up, weight
        down = weight.new_empty(self.rank, self.in_features)
        down[:, self.order()] = torch.cat(
            [torch.eye(self.rank, dtype=weight.dtype, device=weight.device), weight], dim=1
        )
        return up, down

    def absorb(self, product: Product, metric: Metric, linear: str) -> dict[str, Tensor]:
        best = approximate_sum(self.low_rank_part(), product, metric, linear)
        return LowRank.of(best.up, best.down, None, torch.float64, self.is_pivoted).state_dict()

    def extend(self, up: Tensor, down: Tensor, dtype: torch.dtype) -> CompressedLinear:
        own_up, own_down = self.low_rank_part()
        up, down = torch.cat([own_up.double(), up], 1), torch.cat([own_down.double(), down])
        return LowRank.of(up, down, self.bias, dtype, self.is_pivoted)

    def extended_size(self, rank: int, itemsize: int) -> tuple[int, int]:
        shape = (self.out_features, self.in_features)
        dense = Dense(torch.empty(shape, device="meta"), None, self.up.dtype)
        return pair_size(dense, self.rank + rank, self.is_pivoted, self.has_bias)[:2]

    @property
    def largest_extension(self) -> int:
        return min(self.in_features, self.out_features) - 1 - self.rank

    def to_dense(self) -> Tensor:
        wide = torch.promote_types(self.up.dtype, torch.float32)
        up, weight = self.up.detach().to(wide), self.weight.detach().to(wide)
        if self.pivots is None:
            return up @ weight
        dense = up.new_empty(self.out_features, self.in_features)
        dense[:, self.order()] = torch.cat([up, up @ weight], dim=1)
        return dense
