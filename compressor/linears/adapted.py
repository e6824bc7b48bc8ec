"""Adapted: another storage kind plus a low-rank part, Ŵ = base + up · down, whose factors may be
integers.

References: sparse + low rank is OATS (arXiv 2409.13652) and 3BASiL (arXiv 2603.01376); a low-rank
part over a quantised base is LoftQ's, SLiM's (arXiv 2410.09615) and EoRA's (arXiv 2410.21271);
integer factors beside it are LQER's (arXiv 2402.02446).

Glossary
    weight, mask, …        the tensors of the base, under the names they have without the low-rank
                           part
    down                   (r, in), or its codes packed as in `packed`
    up                     (out, r), or the packed codes of its transpose (r, out): a scale then
                           serves outputs, of which there are many
    down_scales, up_scales (r, in / group) and (r, out / group) of factors stored as integers
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.linalg import Metric
from compressor.linalg.products import Product
from compressor.linears.base import Blank, CompressedLinear, build_empty
from compressor.linears.low_rank import approximate_sum
from compressor.linears.packed import IntegerMatrix, Packed


class Adapted(CompressedLinear):
    """y = base(x) + up · (down · x); the bias is the base's."""

    kind = "adapted"
    sizes: ClassVar = {"rank": "rank", "base": "base_spec"}

    up: Tensor
    down: Tensor
    up_scales: nn.Parameter
    down_scales: nn.Parameter

    def __init__(self, base: CompressedLinear, up: Tensor | Packed, down: Tensor | Packed):
        """Wrap a base and the low-rank part as they are (no copy, no cast).

        The base becomes a view of this module: it is not a submodule, so its tensors keep their
        stored names, and it shares this module's tables of parameters and buffers, so what is cast,
        moved or replaced in one is so in the other.

        Args:
            up: (out, r); or packed as its transpose (r, out), symmetric and without bias.
            down: (r, in); or packed, symmetric and without bias.

        Raises:
            ValueError: the base already stores an `up` or a `down`.
        """
        factors: dict[str, Tensor] = {}
        for name, factor in (("up", up), ("down", down)):
            if isinstance(factor, Packed):
                factors |= {name: factor.weight, f"{name}_scales": factor.scales}
            else:
                factors[name] = factor
        if taken := factors.keys() & {*base._parameters, *base._buffers}:
            raise ValueError(
                f"a {base.kind} base stores '{min(taken)}' itself and cannot be adapted"
            )
        super().__init__(base.in_features, base.out_features)
        object.__setattr__(self, "_base", base)
        self._parameters, self._buffers = base._parameters, base._buffers
        self._non_persistent_buffers_set = base._non_persistent_buffers_set
        self.factor_names = tuple(factors)
        self.factor_bits = down.code_bits if isinstance(down, Packed) else None
        self.can_absorb = self.factor_bits is None
        self.store(**factors)

    @property
    def base(self) -> CompressedLinear:
        return self.__dict__["_base"]

    @property
    def rank(self) -> int:
        return (self.down if self.factor_bits is None else self.down_scales).shape[0]

    @property
    def base_spec(self) -> dict[str, Any]:
        return self.base.spec()

    def spec(self) -> dict[str, Any]:
        if self.factor_bits is None:
            return super().spec()
        integers = {name: self.integers(name).spec(bias=False) for name in ("down", "up")}
        return super().spec() | integers

    @classmethod
    def empty(cls, spec: Mapping[str, Any], blank: Blank) -> Self:
        base = build_empty(spec["base"], blank.dtype, blank.device)
        if "down" in spec:
            return cls(base, Packed.empty(spec["up"], blank), Packed.empty(spec["down"], blank))
        up = blank.floats(base.out_features, spec["rank"])
        return cls(base, up, blank.floats(spec["rank"], base.in_features))

    def integers(self, name: str) -> IntegerMatrix:
        """Return a factor stored as integers: `down`, or `up`, which is its transpose (r, out)."""
        assert self.factor_bits is not None, "the factors are floating tensors"
        width = self.out_features if name == "up" else self.in_features
        scales = getattr(self, f"{name}_scales")
        return IntegerMatrix(getattr(self, name), scales, None, self.factor_bits, width)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return up (out, r) and down (r, in) as they are multiplied, in the stored dtype."""
        if self.factor_bits is None:
            return self.up, self.down
        return self.integers("up").rebuild().T, self.integers("down").rebuild()

    def drop_low_rank(self) -> CompressedLinear:
        """Take the low-rank part away and return the base. This module is of no use any more: the
        two have one table of parameters.
        """
        for name in self.factor_names:
            self._parameters.pop(name, None)
            self._buffers.pop(name, None)
        return self.base

    def forward(self, input: Tensor) -> Tensor:
        up, down = self.pair()
        return self.base(input) + functional.linear(functional.linear(input, down), up)

    def multiply_adds(self) -> int:
        return self.base.multiply_adds() + self.rank * (self.in_features + self.out_features)

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        if self.factor_bits is None:
            wide = torch.promote_types(self.up.dtype, torch.float32)
            return self.base.to_dense() + self.up.to(wide) @ self.down.to(wide)
        wide = torch.promote_types(self.up_scales.dtype, torch.float32)
        up, down = (self.integers(name).decode(wide) for name in ("up", "down"))
        return self.base.to_dense() + up.T @ down

    @property
    def has_movable_support(self) -> bool:  # type: ignore[override]  # as the base has
        return self.base.has_movable_support

    @property
    def lender(self) -> str | None:  # type: ignore[override]  # what the base borrows
        return self.base.lender

    @property
    def lent(self) -> CompressedLinear | Tensor | None:  # type: ignore[override]
        return self.base.lent

    def bind(self, model: nn.Module) -> None:
        self.base.bind(model)

    def borrow(self, source: CompressedLinear | Tensor) -> None:
        self.base.borrow(source)

    def low_rank_part(self) -> tuple[Tensor, Tensor]:
        up, down = self.pair()
        return up.detach(), down.detach()

    def absorb(self, product: Product, metric: Metric, linear: str) -> dict[str, Tensor]:
        if not self.can_absorb:
            return super().absorb(product, metric, linear)
        best = approximate_sum(self.low_rank_part(), product, metric, linear)
        return {"up": best.up, "down": best.down}

    def extend(self, up: Tensor, down: Tensor, dtype: torch.dtype) -> CompressedLinear:
        own_up, own_down = self.low_rank_part()
        up, down = torch.cat([own_up.double(), up], 1), torch.cat([own_down.double(), down])
        return deepcopy(self).drop_low_rank().extend(up, down, dtype)
