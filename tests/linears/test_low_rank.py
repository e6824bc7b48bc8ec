"""The low-rank storage kind: pivots, sizes, masks, and the shapes that make readers without the
plugin stop.
"""

import pytest
import torch
from support.modules import low_rank
from support.sameness import assert_same_output

from compressor.linears import LowRank, build_empty
from compressor.linears.masks import pack_mask, unpack_mask

SHAPES = [(24, 16), (16, 24), (17, 13), (8, 8), (5, 31)]  # (out, in): tall, wide, odd, square


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def made(
    shape: tuple[int, int],
    pivoted: bool,
    bias: bool = True,
    rank: int = 4,
    dtype: torch.dtype = torch.float64,
) -> LowRank:
    return low_rank(
        random(*shape, dtype=dtype),
        random(shape[0], seed=1, dtype=dtype) if bias else None,
        rank,
        pivoted,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pivoting_loses_nothing(shape):
    torch.testing.assert_close(
        made(shape, True).to_dense(), made(shape, False).to_dense(), rtol=1e-9, atol=1e-9
    )


def test_pivoted_pair_by_hand():
    """Columns 1 and 3 of Ŵ are pivots; columns 0 and 2 are 2 × pivot 0 and pivot 0 + 3 × pivot
    1.
    """
    module = LowRank(
        weight=torch.tensor([[2.0, 1.0], [0.0, 3.0]]),
        up=torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 7.0]]),
        bias=torch.tensor([0.5, 0.0, 0.0]),
        pivots=torch.tensor([0b01010000], dtype=torch.uint8),
    )
    dense = torch.tensor([[2.0, 1.0, 1.0, 0.0], [0.0, 0.0, 3.0, 1.0], [10.0, 5.0, 26.0, 7.0]])
    assert torch.equal(module.to_dense(), dense)
    assert torch.equal(module(torch.eye(4)), dense.T + module.bias)
    assert (module.in_features, module.out_features, module.rank) == (4, 3, 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes_follow_the_formulas(shape):
    (height, width), rank = shape, 3
    for dtype, itemsize in ((torch.float32, 4), (torch.bfloat16, 2)):
        plain = made(shape, False, rank=rank, dtype=torch.float32).to(dtype)
        pivoted = made(shape, True, rank=rank, dtype=torch.float32).to(dtype)
        assert plain.stored_parameters() == rank * (height + width) + height
        assert plain.bits() == 8 * itemsize * plain.stored_parameters()
        assert pivoted.stored_parameters() == rank * (height + width - rank) + height
        assert pivoted.bits() == 8 * itemsize * pivoted.stored_parameters() + 8 * -(-width // 8)


@pytest.mark.parametrize("pivoted", [False, True], ids=["plain", "pivoted"])
def test_weight_never_has_the_dense_shape(pivoted):
    """Over all small sizes: a reader that expects (out, in), or (in, out) for Conv1D, meets another
    shape.
    """
    for height in range(2, 9):
        for width in range(2, 9):
            for rank in range(1, min(height, width)):
                spec = {
                    "kind": "low_rank",
                    "out_features": height,
                    "in_features": width,
                    "rank": rank,
                    "pivoted": pivoted,
                    "bias": False,
                }
                assert tuple(build_empty(spec, torch.float32).weight.shape) not in {
                    (height, width),
                    (width, height),
                }


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 171])
def test_masks_pack_without_loss(length):
    mask = random(length) > 0
    packed = pack_mask(mask)
    assert (packed.dtype, packed.numel()) == (torch.uint8, -(-length // 8))
    assert torch.equal(unpack_mask(packed, length), mask)


def test_masks_pack_most_significant_bit_first():
    mask = torch.tensor([True, False, False, False, False, False, True, True, False, True])
    assert pack_mask(mask).tolist() == [0b10000011, 0b01000000]


def test_loading_other_pivots_after_use_takes_effect():
    first, second = made((9, 12), True), low_rank(random(9, 12, seed=5), random(9, seed=6), 4, True)
    assert not torch.equal(first.pivots, second.pivots)
    inputs = random(3, 12)
    first(inputs)
    first.load_state_dict(second.state_dict())
    assert_same_output(first(inputs), second(inputs))
