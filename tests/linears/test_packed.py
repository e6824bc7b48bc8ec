"""The packed storage kind: exact codes, sizes, residuals, and the library that packs."""

import builtins

import pytest
import torch
from support.sameness import assert_same_output
from torch import Tensor

from compressor.errors import ConfigError
from compressor.linears import Adapted, Packed, build_empty
from compressor.linears.packed import library, pack, unpack, words

SHAPES = [
    ((24, 16), 8),
    ((16, 24), 24),
    ((5, 31), 31),
    ((6, 86), 43),
    ((8, 8), 1),
]  # (out, in), group
BITS = range(2, 9)


def integers(*shape: int, bits: int, seed: int = 0) -> Tensor:
    """Random codes, both extremes among them."""
    codes = torch.randint(
        -(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=torch.Generator().manual_seed(seed)
    )
    codes.view(-1)[0], codes.view(-1)[-1] = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return codes


def made(
    shape=(6, 86),
    group: int = 43,
    bits: int = 3,
    symmetric: bool = True,
    bias: bool = True,
    dtype=torch.float32,
) -> Packed:
    generator, groups = torch.Generator().manual_seed(3), shape[1] // group
    scales, offset = (
        torch.randn(*size, generator=generator).to(dtype)
        for size in ((shape[0], groups), (shape[0],))
    )
    zeros = None if symmetric else integers(shape[0], groups, bits=bits, seed=1)
    return Packed.of_codes(
        integers(*shape, bits=bits), scales, zeros, offset if bias else None, bits
    )


def expected(module: Packed, bits: int, group: int, symmetric: bool) -> Tensor:
    """Ŵ by definition, float64, from the codes that `made` drew."""
    height, width = module.out_features, module.in_features
    zeros = (
        torch.zeros(height, width // group)
        if symmetric
        else integers(height, width // group, bits=bits, seed=1)
    )
    codes = integers(height, width, bits=bits).double() - zeros.repeat_interleave(group, 1)
    return codes * module.scales.double().repeat_interleave(group, 1)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 31, 32, 129])
def test_every_code_comes_back_and_no_bit_is_wasted(bits, count):
    codes = integers(count, bits=bits)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == (words(count, bits),) == (
        -(-count * bits // 32),
    )
    assert torch.equal(unpack(packed, bits, (1, count))[0], codes.to(torch.int8))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("shape", "group"), SHAPES, ids=str)
def test_the_dense_form_is_the_definition_and_bits_are_the_bytes_written(
    shape, group, bits, symmetric
):
    module, (height, width) = made(shape, group, bits, symmetric, dtype=torch.bfloat16), shape
    assert torch.equal(
        module.to_dense().double(), expected(module, bits, group, symmetric)
    )  # 9 bits times 8 bits fit into float32
    scales = height * width // group
    codes = words(height * width, bits) + (0 if symmetric else words(scales, bits))
    assert (
        module.bits()
        == 32 * codes + 16 * (scales + height)
        == 8 * sum(t.nbytes for t in module.state_dict().values())
    )
    assert module.stored_parameters() == scales + height


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward_rounds_the_dense_form_once(dtype, symmetric, device):
    module = made(bits=8, symmetric=symmetric, dtype=dtype).to(device)
    inputs = torch.randn(3, 86, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    dense = module.to_dense()
    assert dense.dtype == torch.float32 and not dense.requires_grad
    assert_same_output(
        module(inputs), torch.nn.functional.linear(inputs, dense.to(dtype), module.bias)
    )
    assert module(inputs[0]).shape == (6,)


def test_by_hand():
    """Codes −2 … 1 of two bits and zero points −2 and 1: (1 + 2) · 0.5 = 1.5, (−2 − 1) · 2 = −6."""
    codes = torch.tensor([[1, -2, -2, 0]])
    module = Packed.of_codes(codes, torch.tensor([[0.5, 2.0]]), torch.tensor([[-2, 1]]), None, 2)
    assert module.to_dense().tolist() == [[1.5, 0.0, -6.0, -2.0]]
    assert module.weight.tolist() == [0b10_00_00_11] and module.zeros.tolist() == [
        0b11_00
    ]  # plus 2, the first in the lowest bits


def makers():
    low = {"up": torch.randn(6, 2), "down": torch.randn(2, 86)}
    integers = Adapted(
        made(symmetric=False), made((2, 6), 3, 4, True, False), made((2, 86), 43, 4, True, False)
    )
    return [
        made(),
        made(symmetric=False, bias=False, bits=4),
        Adapted(made(symmetric=False), **low),
        integers,
    ]


def test_a_residual_is_added_and_keeps_the_names_of_the_base():
    up, down = torch.randn(6, 2), torch.randn(2, 86)
    module = Adapted(made(symmetric=False), up, down)
    torch.testing.assert_close(module.to_dense(), made(symmetric=False).to_dense() + up @ down)
    assert set(module.state_dict()) == {"weight", "scales", "zeros", "bias", "up", "down"}


def test_a_residual_of_integers_is_counted_in_words_and_scales():
    module = makers()[3]
    base, up, down = (
        made(symmetric=False),
        made((2, 6), 3, 4, True, False),
        made((2, 86), 43, 4, True, False),
    )
    torch.testing.assert_close(
        module.to_dense(), base.to_dense() + up.to_dense().T @ down.to_dense()
    )
    assert set(module.state_dict()) == {
        "weight",
        "scales",
        "zeros",
        "bias",
        "up",
        "up_scales",
        "down",
        "down_scales",
    }
    assert module.bits() - base.bits() == 32 * (2 + 22 + 4 + 4)
    assert module.multiply_adds() == 6 * 86 + 2 * (6 + 86) and module.rank == 2
    up, down = module.pair()
    assert up.shape == (6, 2) and down.shape == (2, 86)
    assert_same_output(module.drop_low_rank().to_dense(), base.to_dense())
    assert module.drop_low_rank().bits() == base.bits()


def test_scales_learn():
    module = made(symmetric=False).requires_grad_(True)
    module(torch.ones(2, 86)).sum().backward()
    steps = (
        (module.to_dense() / module.scales.detach().repeat_interleave(43, 1))
        .unflatten(1, (-1, 43))
        .sum(2)
    )
    torch.testing.assert_close(module.scales.grad, 2 * steps)
    with torch.inference_mode():
        made()(torch.ones(2, 86))


@pytest.fixture
def anew():
    """The library is looked for again, before and after a test."""
    library.cache_clear()
    yield
    library.cache_clear()


def test_missing_library_names_the_command(monkeypatch, anew):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("compressed_tensors"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"run `pip install 'compressor\[quant\]'`"):
        made()


def test_a_release_that_pads_codes_is_refused(monkeypatch, anew):
    from compressed_tensors.compressors.pack_quantized import helpers

    monkeypatch.setattr(
        helpers,
        "pack_to_int32",
        lambda codes, bits: torch.zeros(1, -(-codes.numel() // (32 // bits)), dtype=torch.int32),
    )
    with pytest.raises(ConfigError, match="pads codes to whole words; run `pip install"):
        pack(torch.zeros(64), 4)


@pytest.mark.parametrize("change", [{"group": 5}, {"group": 0}, {"bits": 1}, {"bits": 9}], ids=str)
def test_a_spec_that_cannot_be_is_refused(change):
    with pytest.raises(ValueError, match=r"bits in groups of"):
        build_empty(made().spec() | change, torch.float32)
