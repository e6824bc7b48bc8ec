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

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.errors import ConfigError
from compressor.linears.base import Blank, CompressedLinear
from compressor.linears.rebuilt import memoise

INSTALL = "pip install 'compressor[quant]'"


@cache
def library() -> Any:
    """Import the packing functions of compressed-tensors.

    Raises:
        ConfigError: it is missing, or pads codes to whole words, as releases before 0.20 did; the
            message names the command to install it.
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
    """Count the words of 32 bits that `count` codes of `bits` bits take."""
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
    """Count (bits of codes and zero points, scales) of a packed weight (height, width)."""
    scales = height * width // group
    return 32 * (words(height * width, bits) + (0 if symmetric else words(scales, bits))), scales


@dataclass(frozen=True)
class IntegerMatrix:
    """A matrix (height, width) of integer codes with their scales, as it is stored."""

    packed: Tensor  # codes of (height, width)
    scales: Tensor  # (height, groups)
    zeros: Tensor | None  # packed zero points of (height, groups)
    bits: int
    width: int

    def decode(self, dtype: torch.dtype) -> Tensor:
        """Compute scales · (codes − zeros) in `dtype`, with one rounding for each product;
        differentiable in the scales.
        """
        height, groups = self.scales.shape
        codes = unpack(self.packed, self.bits, (height, self.width))
        steps = codes.unflatten(1, (groups, -1)).to(dtype)
        if self.zeros is not None:
            steps = steps - unpack(self.zeros, self.bits, (height, groups))[..., None].to(dtype)
        return (steps * self.scales.to(dtype)[..., None]).flatten(1)

    def rebuild(self) -> Tensor:
        """Return what `decode` computes in the dtype of the scales, for multiplying; remembered
        between forward passes unless the scales learn.
        """

        def decode() -> Tensor:
            return self.decode(self.scales.dtype)

        if torch.is_grad_enabled() and self.scales.requires_grad:
            return decode()
        tensors = (self.scales, self.packed, self.zeros)
        return memoise([tensor for tensor in tensors if tensor is not None], decode)

    def spec(self, bias: bool) -> dict[str, Any]:
        """Return the spec of a `Packed` that holds this matrix."""
        height, groups = self.scales.shape
        sizes = {"kind": Packed.kind, "in_features": self.width, "out_features": height}
        return sizes | {
            "bits": self.bits,
            "group": self.width // groups,
            "symmetric": self.zeros is None,
            "bias": bias,
        }


class Packed(CompressedLinear):
    """y = (scales · (codes − zeros)) x + bias."""

    kind = "packed"

    scales: nn.Parameter
    zeros: Tensor | None

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

        Args:
            weight: packed codes of (out, in).
            scales: (out, in / group).
            zeros: packed zero points of (out, in / group), or None.
            bias: (out,) or None.
        """
        super().__init__(in_features, scales.shape[0])
        self.code_bits = bits
        self.store(weight=weight, scales=scales, zeros=zeros, bias=bias)

    @classmethod
    def of_codes(
        cls, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int
    ) -> Self:
        """Pack codes (out, in) and zeros (out, in / group), integer values of any dtype."""
        points = None if zeros is None else pack(zeros, bits)
        return cls(pack(codes, bits), scales, points, bias, codes.shape[1], bits)

    @classmethod
    def empty(cls, spec: Mapping[str, Any], blank: Blank) -> Self:
        width, height, bits = spec["in_features"], spec["out_features"], spec["bits"]
        if not (2 <= bits <= 8 and spec["group"] > 0 and width % spec["group"] == 0):
            raise ValueError(
                f"{bits} bits in groups of {spec['group']} do not make a row of {width} codes"
            )
        groups = width // spec["group"]
        return cls(
            blank.words(words(height * width, bits)),
            blank.floats(height, groups),
            None if spec["symmetric"] else blank.words(words(height * groups, bits)),
            blank.bias(spec),
            width,
            bits,
        )

    @property
    def integers(self) -> IntegerMatrix:
        return IntegerMatrix(self.weight, self.scales, self.zeros, self.code_bits, self.in_features)

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.in_features // self.scales.shape[1]

    def spec(self) -> dict[str, Any]:
        return self.integers.spec(self.has_bias)

    def codes(self) -> Tensor:
        """Unpack the codes (out, in), int8."""
        return unpack(self.weight, self.code_bits, (self.out_features, self.in_features))

    def zero_points(self) -> Tensor | None:
        """Unpack the zero points (out, in / group), int8, if there are any."""
        if self.zeros is None:
            return None
        height, groups = self.scales.shape
        return unpack(self.zeros, self.code_bits, (height, groups))

    def leading(self, count: int) -> Self:
        """Copy the first `count` outputs, without bias."""
        zeros, scales = self.zero_points(), self.scales.detach()[:count].clone()
        return type(self).of_codes(
            self.codes()[:count],
            scales,
            None if zeros is None else zeros[:count],
            None,
            self.code_bits,
        )

    def multiply_adds(self) -> int:
        return self.out_features * self.in_features

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.integers.rebuild(), self.bias)

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        return self.integers.decode(torch.promote_types(self.scales.dtype, torch.float32))
