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

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.linears.base import CompressedLinear
from compressor.linears.packed import Packed, decode, executed


class Adapted(CompressedLinear):
    """y = base(x) + up · (down · x); the bias is the base's."""

    kind = "adapted"

    def __init__(self, base: CompressedLinear, up: Tensor | Packed, down: Tensor | Packed):
        """Wrap a base and the low-rank part as they are (no copy, no cast).

        up: (out, r) and down: (r, in); or both packed, symmetric and without bias, up as its
        transpose (r, out).

        The base becomes a view of this module: it is not a submodule, so its tensors keep their
        stored names, and it shares this module's tables of parameters and buffers, so what is cast,
        moved or replaced in one is so in the other. Raises ValueError if the base already stores an
        `up` or a `down`.
        """
        bits = down.code_bits if isinstance(down, Packed) else None
        names = ("up", "down") if bits is None else ("up", "down", "up_scales", "down_scales")
        if taken := {*names} & {*base._parameters, *base._buffers}:
            raise ValueError(
                f"a {base.kind} base stores '{sorted(taken)[0]}' itself and cannot be adapted"
            )
        super().__init__(base.in_features, base.out_features)
        object.__setattr__(self, "base", base)
        self._parameters, self._buffers = base._parameters, base._buffers
        self._non_persistent_buffers_set = base._non_persistent_buffers_set
        if "bias" not in self._parameters:
            self.register_parameter("bias", None)
        self.names, self.factor_bits = names, bits
        for name, factor in (("up", up), ("down", down)):
            if isinstance(factor, Packed):
                self.register_buffer(name, factor.weight)
                self.register_parameter(f"{name}_scales", factor.scales)
            else:
                self.register_parameter(
                    name, nn.Parameter(factor, requires_grad=factor.requires_grad)
                )

    @property
    def rank(self) -> int:
        return (self.down if self.factor_bits is None else self.down_scales).shape[0]

    def spec(self) -> dict[str, Any]:
        sizes = {
            "kind": self.kind,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
        }
        return (
            sizes
            | {"base": self.base.spec()}
            | (
                {}
                if self.factor_bits is None
                else {"down": self.packed("down"), "up": self.packed("up")}
            )
        )

    def packed(self, name: str) -> dict[str, Any]:
        """Spec of a factor stored as integers."""
        width, groups = self.side(name), getattr(self, f"{name}_scales").shape[1]
        sizes = {"kind": Packed.kind, "in_features": width, "out_features": self.rank}
        return sizes | {
            "bits": self.factor_bits,
            "group": width // groups,
            "symmetric": True,
            "bias": False,
        }

    def side(self, name: str) -> int:
        return self.out_features if name == "up" else self.in_features

    @classmethod
    def empty(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> Self:
        from compressor.linears import build_empty  # the table of kinds holds this one

        base = build_empty(spec["base"], dtype, device)
        if "down" in spec:
            return cls(
                base,
                Packed.empty(spec["up"], dtype, device),
                Packed.empty(spec["down"], dtype, device),
            )
        rank, floating = spec["rank"], {"dtype": dtype, "device": device}
        return cls(
            base,
            torch.empty(base.out_features, rank, **floating),
            torch.empty(rank, base.in_features, **floating),
        )

    def bind(self, model: nn.Module) -> None:
        self.base.bind(model)

    def alone(self) -> CompressedLinear:
        """The base with no low-rank part. This module is of no use any more: the two have one table
        of parameters.
        """
        for name in self.names:
            self._parameters.pop(name, None)
            self._buffers.pop(name, None)
        return self.base

    def stored(self, name: str) -> tuple[Any, ...]:
        """Arguments of `decode` and `executed` for a factor stored as integers."""
        return (
            getattr(self, name),
            getattr(self, f"{name}_scales"),
            None,
            self.factor_bits,
            self.side(name),
        )

    def pair(self) -> tuple[Tensor, Tensor]:
        """up (out, r) and down (r, in) as they are multiplied, in the stored dtype."""
        if self.factor_bits is None:
            return self.up, self.down
        return executed(*self.stored("up")).T, executed(*self.stored("down"))

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
        return self.base.to_dense() + decode(*self.stored("up"), wide).T @ decode(
            *self.stored("down"), wide
        )
