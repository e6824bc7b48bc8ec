"""Packed: integer codes of a few bits, with a scale (and a zero point, if asymmetric) for each
group of inputs of each output.

Ŵ = scales · (codes − zeros), where codes and zeros are integers from −2^(b−1) to 2^(b−1) − 1. Codes
are packed by the functions of the compressed-tensors library (extra `quant`), densely across word
boundaries: b bits each for every b from 2 to 8, three included.

Glossary
    weight  (⌈out · in · b / 32⌉,) int32: the codes, row-major, so that the codes of an output are
            contiguous
    scales  (out, in / group)
    zeros   (⌈out · in / group · b / 32⌉,) int32: the zero points, row-major; absent if symmetric

Execution: Ŵ is rebuilt, rounded to the dtype of the scales, and multiplied as a dense matrix.
Without autograd on the scales it is rebuilt once and kept, which costs the memory of the dense
weight beside the stored tensors. Integers save bytes on disk and in transfer; kernels that multiply
packed codes are those of the engines that read the export (`export --format compressed-tensors`).
"""

from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.errors import ConfigError
from compressor.linears.base import CompressedLinear
from compressor.linears.rebuilt import kept

INSTALL = "pip install 'compressor[quant]'"


@cache
def library() -> Any:
    """The packing functions of compressed-tensors.

    Raises ConfigError, naming the command to install it, if it is missing or pads codes to whole
    words, as releases before 0.20 did.
    """
    try:
        from compressed_tensors.compressors.pack_quantized import helpers
    except ImportError:
        raise ConfigError(
            "integer codes need the packing functions of compressed-tensors 0.20 or later; run "
            f"`{INSTALL}`"
        ) from None
    if helpers.pack_to_int32(torch.zeros(1, 32, dtype=torch.int8), 3).shape[1] != 3:
        raise ConfigError(
            f"this release of compressed-tensors pads codes to whole words; run `{INSTALL}` to "
            "upgrade it"
        )
    return helpers


def words(count: int, bits: int) -> int:
    """Words of 32 bits that `count` codes of `bits` bits take."""
    return -(-count * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (any shape), integers from −2^(bits−1) to 2^(bits−1) − 1, row-major into int32
    (words,).
    """
    return library().pack_to_int32(codes.to(torch.int8).reshape(1, -1), bits)[0]


def unpack(packed: Tensor, bits: int, shape: tuple[int, int]) -> Tensor:
    """Undo `pack`: codes of `shape`, int8."""
    count = torch.Size(shape).numel()
    return library().unpack_from_int32(packed[None], bits, torch.Size((1, count))).view(shape)


def packed_size(height: int, width: int, bits: int, group: int, symmetric: bool) -> tuple[int, int]:
    """(bits of codes and zero points, number of scales) of a packed weight (height, width)."""
    scales = height * width // group
    return 32 * (words(height * width, bits) + (0 if symmetric else words(scales, bits))), scales


def decode(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, width: int, dtype: torch.dtype
) -> Tensor:
    """Ŵ (out, width) from stored tensors, computed in `dtype` with one rounding for each product;
    differentiable in the scales.

    packed: codes of (out, width); scales: (out, groups); zeros: packed zero points of (out,
    groups), or None.
    """
    height, groups = scales.shape
    steps = unpack(packed, bits, (height, width)).unflatten(1, (groups, -1)).to(dtype)
    if zeros is not None:
        steps = steps - unpack(zeros, bits, (height, groups))[..., None].to(dtype)
    return (steps * scales.to(dtype)[..., None]).flatten(1)


def executed(packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, width: int) -> Tensor:
    """What `decode` makes in the dtype of the scales, for multiplying; kept between forward passes
    unless the scales learn.
    """

    def rebuild() -> Tensor:
        return decode(packed, scales, zeros, bits, width, scales.dtype)

    learning = torch.is_grad_enabled() and scales.requires_grad
    return (
        rebuild()
        if learning
        else kept([tensor for tensor in (scales, packed, zeros) if tensor is not None], rebuild)
    )


class Packed(CompressedLinear):
    """y = (scales · (codes − zeros)) x + bias."""

    kind = "packed"

    def __init__(
        self,
        weight: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bias: Tensor | None,
        in_features: int,
        bits: int,
    ):
        """Wrap stored tensors as they are (no copy, no cast).

        weight: packed codes of (out, in); scales: (out, in / group); zeros: packed zero points of
        (out, in / group), or None; bias: (out,) or None.
        """
        super().__init__(in_features, scales.shape[0])
        self.code_bits = bits
        self.register_buffer("weight", weight)
        self.scales = nn.Parameter(scales, requires_grad=scales.requires_grad)
        self.register_buffer("zeros", zeros)
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias, requires_grad=bias.requires_grad)
        )

    @classmethod
    def of_codes(
        cls, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int
    ) -> Self:
        """Pack codes (out, in) and zeros (out, in / group), integer values of any dtype."""
        return cls(
            pack(codes, bits),
            scales,
            None if zeros is None else pack(zeros, bits),
            bias,
            codes.shape[1],
            bits,
        )

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.in_features // self.scales.shape[1]

    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bits": self.code_bits,
            "group": self.group,
            "symmetric": self.zeros is None,
            "bias": self.bias is not None,
        }

    @classmethod
    def empty(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> Self:
        width, height, bits = spec["in_features"], spec["out_features"], spec["bits"]
        if not (2 <= bits <= 8 and spec["group"] > 0 and width % spec["group"] == 0):
            raise ValueError(
                f"{bits} bits in groups of {spec['group']} do not make a row of {width} codes"
            )
        groups, integers = width // spec["group"], {"dtype": torch.int32, "device": device}
        return cls(
            weight=torch.empty(words(height * width, bits), **integers),
            scales=torch.empty(height, groups, dtype=dtype, device=device),
            zeros=None
            if spec["symmetric"]
            else torch.empty(words(height * groups, bits), **integers),
            bias=torch.empty(height, dtype=dtype, device=device) if spec["bias"] else None,
            in_features=width,
            bits=bits,
        )

    def codes(self) -> Tensor:
        """Codes (out, in), int8."""
        return unpack(self.weight, self.code_bits, (self.out_features, self.in_features))

    def zero_points(self) -> Tensor | None:
        """Zero points (out, in / group), int8, or None."""
        return (
            None
            if self.zeros is None
            else unpack(self.zeros, self.code_bits, tuple(self.scales.shape))
        )

    def leading(self, count: int) -> Self:
        """The first `count` outputs alone, without bias; new tensors."""
        zeros = None if self.zeros is None else self.zero_points()[:count]
        return type(self).of_codes(
            self.codes()[:count], self.scales.detach()[:count].clone(), zeros, None, self.code_bits
        )

    def multiply_adds(self) -> int:
        return self.out_features * self.in_features

    def forward(self, input: Tensor) -> Tensor:
        dense = executed(self.weight, self.scales, self.zeros, self.code_bits, self.in_features)
        return functional.linear(input, dense, self.bias)

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        wide = torch.promote_types(self.scales.dtype, torch.float32)
        return decode(self.weight, self.scales, self.zeros, self.code_bits, self.in_features, wide)
