"""Adapted: another storage kind plus a low-rank part, Ŵ = base + up · down.

References: sparse + low rank is OATS (arXiv 2409.13652) and 3BASiL (arXiv 2603.01376); a low-rank part over a quantised base is LoftQ's,
SLiM's (arXiv 2410.09615) and EoRA's (arXiv 2410.21271).

Glossary
    weight, mask, …  the tensors of the base, under the names they have without the low-rank part
    down             (r, in)
    up               (out, r)
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.linears.base import CompressedLinear


class Adapted(CompressedLinear):
    """y = base(x) + up · (down · x); the bias is the base's."""

    kind = "adapted"

    def __init__(self, base: CompressedLinear, up: Tensor, down: Tensor):
        """Wrap a base and the low-rank part as they are (no copy, no cast). up: (out, r); down: (r, in).

        The base becomes a view of this module: it is not a submodule, so its tensors keep their stored names, and it shares this
        module's tables of parameters and buffers, so what is cast, moved or replaced in one is so in the other.
        Raises ValueError if the base already stores an `up` or a `down`.
        """
        if taken := {"up", "down"} & {*base._parameters, *base._buffers}:
            raise ValueError(f"a {base.kind} base stores '{taken.pop()}' itself and cannot be adapted")
        super().__init__(base.in_features, base.out_features)
        object.__setattr__(self, "base", base)
        self._parameters, self._buffers = base._parameters, base._buffers
        self._non_persistent_buffers_set = base._non_persistent_buffers_set
        if "bias" not in self._parameters:
            self.register_parameter("bias", None)
        self.up = nn.Parameter(up, requires_grad=up.requires_grad)
        self.down = nn.Parameter(down, requires_grad=down.requires_grad)

    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.down.shape[0],
            "base": self.base.spec(),
        }

    @classmethod
    def empty(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> Self:
        from compressor.linears import build_empty  # the table of kinds holds this one

        base = build_empty(spec["base"], dtype, device)
        rank, floating = spec["rank"], {"dtype": dtype, "device": device}
        return cls(base, torch.empty(base.out_features, rank, **floating), torch.empty(rank, base.in_features, **floating))

    def bind(self, model: nn.Module) -> None:
        self.base.bind(model)

    def alone(self) -> CompressedLinear:
        """The base with no low-rank part. This module is of no use any more: the two have one table of parameters."""
        del self._parameters["up"], self._parameters["down"]
        return self.base

    def forward(self, input: Tensor) -> Tensor:
        return self.base(input) + functional.linear(functional.linear(input, self.down), self.up)

    def multiply_adds(self) -> int:
        return self.base.multiply_adds() + self.up.numel() + self.down.numel()

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        wide = torch.promote_types(self.up.dtype, torch.float32)
        return self.base.to_dense() + self.up.to(wide) @ self.down.to(wide)
