"""The wrapped storage kind: 2:4 positions, block-diagonal wrappers, and sizes."""

import pytest
import torch

from compressor.linears import Wrapped, build_empty
from compressor.linears.wrapped import pack_positions, unpack_positions

SHAPES = [
    (6, 8, 3, 4),
    (10, 12, 2, 6),
    (9, 4, 9, 1),
    (5, 20, 1, 20),
]  # outputs, inputs, blocks of outputs and of inputs


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def made(shape, bias: bool = True, dtype: torch.dtype = torch.float64):
    """A module, and the factors that it stores as matrices: A, S, B."""
    height, width, b, c = shape
    core = random(height, width, seed=1, dtype=dtype)
    mask = torch.zeros(height * width // 4, 4, dtype=torch.bool)
    pairs = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]).repeat(len(mask), 1)[
        : len(mask)
    ]
    mask.scatter_(1, pairs, True)
    mask = mask.view(height, width)
    left, right = (
        random(height // b, b, b, seed=2, dtype=dtype),
        random(width // c, c, c, seed=3, dtype=dtype),
    )
    module = Wrapped.of(
        core, mask, left, right, random(height, seed=4, dtype=dtype) if bias else None, dtype
    )
    return module, (torch.block_diag(*left), core * mask, torch.block_diag(*right))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@torch.no_grad()
def test_it_is_the_product_of_its_factors(shape, bias):
    module, (left, core, right) = made(shape, bias)
    torch.testing.assert_close(module.to_dense(), left @ core @ right)
    x = random(2, 3, shape[1], seed=5)
    torch.testing.assert_close(
        module(x), x @ (left @ core @ right).T + (module.bias if bias else 0)
    )
    assert module(x[0, 0]).shape == (shape[0],)
    assert torch.equal(module.core(), core)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_of_every_four_are_stored_with_two_bits_each(shape):
    module, (_, core, _) = made(shape, dtype=torch.bfloat16)
    places = module.places()
    assert (
        (places[..., 0] < places[..., 1]).all()
        and places.max() < 4
        and places.shape == (shape[0], shape[1] // 4, 2)
    )
    assert ((module.core().view(-1, 4) != 0).sum(1) == 2).all() and torch.equal(module.core(), core)
    assert torch.equal(module.support(), core != 0)
    height, width, b, c = shape
    assert module.bits() == 16 * (height * width // 2 + height * b + width * c + height) + 8 * -(
        -height * width // 8
    )
    assert module.stored_parameters() == height * width // 2 + height * b + width * c + height
    assert (
        module.multiply_adds() == height * width + height * b + width * c
        and module.weight.ndim == 1
    )


def test_positions_by_hand():
    packed = pack_positions(torch.tensor([0, 1, 2, 3, 1]))
    assert packed.tolist() == [0b00011011, 0b01000000]
    assert unpack_positions(packed, 5).tolist() == [0, 1, 2, 3, 1]


def test_sizes_that_do_not_fit_are_refused():
    spec = made(SHAPES[0])[0].spec()
    for changes in ({"left": 4}, {"right": 3}, {"in_features": 6, "right": 6}, {"left": 0}):
        with pytest.raises(ValueError, match="do not make 6 outputs"):
            build_empty(spec | changes, torch.float32, "cpu")
