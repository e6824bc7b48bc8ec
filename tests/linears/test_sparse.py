"""The sparse storage kind: examples by hand, sizes, names, and what is kept between passes."""

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import CheckpointError
from compressor.linears import KINDS, Adapted, Sparse, build_empty
from compressor.linears.masks import pack_mask, unpack_mask

SHAPES = [(24, 16), (16, 24), (17, 13), (8, 8), (5, 31)]  # (out, in): tall, wide, odd, square


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def made(
    shape: tuple[int, int], bias: bool = True, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Sparse:
    """Entries of a random weight above 0.3: rows with unequal numbers of nonzeros."""
    weight, offset = (
        random(*shape, seed=seed, dtype=dtype),
        random(shape[0], seed=seed + 1, dtype=dtype),
    )
    mask = random(*shape, seed=seed) > 0.3
    return Sparse(
        weight[mask], pack_mask(mask.flatten()), offset if bias else None, shape[1], shape[0]
    )


def adapted(
    shape: tuple[int, int], bias: bool = True, dtype: torch.dtype = torch.float64, rank: int = 3
) -> Adapted:
    up, down = (
        random(shape[0], rank, seed=7, dtype=dtype),
        random(rank, shape[1], seed=8, dtype=dtype),
    )
    return Adapted(made(shape, bias, dtype), up, down)


def test_by_hand():
    """Twelve entries in two bytes; the stored zero is inside the mask, the second output has no
    entry at all.
    """
    module = Sparse(
        torch.tensor([1.0, 2.0, 0.0, 3.0]),
        torch.tensor([0b10010000, 0b01010000], dtype=torch.uint8),
        None,
        4,
        3,
    )
    dense = torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 3.0]])
    dense[2, 1] = 0.0
    assert torch.equal(module.to_dense(), dense)
    assert torch.equal(module(torch.eye(4)), dense.T)
    sum_of_both = Adapted(
        module, up=torch.tensor([[1.0], [0.0], [2.0]]), down=torch.tensor([[0.0, 5.0, 0.0, 1.0]])
    )
    low_rank = torch.tensor([[0.0, 5.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.0, 10.0, 0.0, 2.0]])
    assert torch.equal(sum_of_both.to_dense(), dense + low_rank)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.float32, 4), (torch.bfloat16, 2)], ids=str)
def test_bits_are_the_bytes_written(shape, dtype, itemsize):
    (height, width), sparse, both = shape, made(shape, dtype=dtype), adapted(shape, dtype=dtype)
    nonzeros = int(unpack_mask(sparse.mask, height * width).sum())
    assert sparse.weight.numel() == nonzeros
    assert sparse.stored_parameters() == nonzeros + height
    assert sparse.bits() == 8 * (itemsize * (nonzeros + height) + -(-height * width // 8))
    assert both.stored_parameters() == sparse.stored_parameters() + 3 * (height + width)
    assert both.bits() == sparse.bits() + 8 * itemsize * 3 * (height + width)
    assert both.bits() == 8 * sum(tensor.nbytes for tensor in both.state_dict().values())


def test_stored_names():
    assert list(made((8, 8)).state_dict()) == ["weight", "bias", "mask"]
    assert set(adapted((8, 8)).state_dict()) == {"weight", "bias", "mask", "up", "down"}
    assert [name for name, _ in nn.ModuleDict({"q": adapted((8, 8))}).named_modules()] == ["", "q"]


def test_the_rebuilt_weight_is_kept_without_autograd_only():
    module = made((9, 12)).requires_grad_(True)
    module(random(3, 12))
    assert not hasattr(module.weight, "_memo")
    with torch.no_grad():
        module(random(3, 12))
        kept = module.weight._memo[1]
        module(random(3, 12))
    assert module.weight._memo[1] is kept
    assert set(module.state_dict()) == {"weight", "mask", "bias"}


def test_a_base_that_stores_an_up_itself_is_refused():
    with pytest.raises(ValueError, match="adapted base stores"):
        Adapted(adapted((9, 12)), random(9, 2), random(2, 12))


def test_registered_under_their_kinds():
    assert KINDS["sparse"] is Sparse and KINDS["adapted"] is Adapted
    with pytest.raises(CheckpointError, match="did you mean 'sparse'"):
        build_empty({"kind": "sparce"}, torch.float32)
