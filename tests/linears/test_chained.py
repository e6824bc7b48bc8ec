"""The chained storage kind: the product of two packed factors, its names and sizes."""

import pytest
import torch
from support.sameness import assert_same_output

from compressor.linears import Chained, Packed


def made(
    shape, group: int, bits: int, symmetric: bool, bias: bool = False, dtype=torch.float32
) -> Packed:
    generator, (height, width) = torch.Generator().manual_seed(3), shape
    scales, offset = (
        torch.randn(*size, generator=generator).to(dtype)
        for size in ((height, width // group), (height,))
    )
    codes, zeros = (
        torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), size, generator=generator)
        for size in (shape, (height, width // group))
    )
    return Packed.of_codes(
        codes, scales, None if symmetric else zeros, offset if bias else None, bits
    )


def chain(
    height: int = 6,
    width: int = 86,
    rank: int = 5,
    symmetric: bool = True,
    bias: bool = True,
    dtype=torch.float32,
) -> Chained:
    down = made((rank, width), width // 2, 3, symmetric, False, dtype)
    return Chained(down, made((height, rank), rank, 4, symmetric, bias, dtype))


KINDS = {"symmetric": {}, "asymmetric": {"symmetric": False, "bias": False}}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def module(request) -> Chained:
    return chain(**request.param)


def test_the_dense_form_is_the_product_and_bits_are_the_bytes_written(module):
    symmetric, bias = module.zeros is None, module.bias is not None
    down, up = made((5, 86), 43, 3, symmetric), made((6, 5), 5, 4, symmetric)
    assert_same_output(module.to_dense(), up.to_dense() @ down.to_dense())
    names = (
        ["weight", "scales", "up_codes", "up_scales"]
        + ["bias"] * bias
        + ["zeros", "up_zeros"] * (not symmetric)
    )
    assert sorted(module.state_dict()) == sorted(names) and module.weight.ndim == 1
    words = -(-5 * 86 * 3 // 32) + -(-6 * 5 * 4 // 32) + (0 if symmetric else 1 + 1)
    assert module.bits() == 32 * (words + 5 * 2 + 6 + 6 * bias) and module.multiply_adds() == 5 * (
        6 + 86
    )
