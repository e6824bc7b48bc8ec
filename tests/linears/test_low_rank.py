"""The low-rank storage kind: algebra, sizes, spec round trip, and the shapes that make readers
without the plugin stop.
"""

import json

import pytest
import torch
from support.modules import low_rank
from support.sameness import assert_same_output

from compressor.linears import KINDS, LowRank, build_empty
from compressor.linears.masks import pack_mask, unpack_mask

SHAPES = [(24, 16), (16, 24), (17, 13), (8, 8), (5, 31)]  # (out, in): tall, wide, odd, square
DOUBLE = 1e-12  # relative, float64 rounding of a few dozen sums


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


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("pivoted", [False, True], ids=["plain", "pivoted"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_is_the_dense_product(shape, pivoted, bias, device):
    module = made(shape, pivoted, bias).to(device)
    inputs = random(2, 3, shape[1], seed=2).to(device)
    expected = inputs @ module.to_dense().T + (module.bias if bias else 0)
    assert module(inputs).shape == (2, 3, shape[0])
    torch.testing.assert_close(module(inputs), expected, rtol=DOUBLE, atol=DOUBLE)
    torch.testing.assert_close(
        module(inputs[0, 0]), expected[0, 0], rtol=DOUBLE, atol=DOUBLE
    )  # one token, no batch


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spec_rebuilds_the_module_exactly(pivoted, dtype):
    module = made((17, 13), pivoted, dtype=torch.float32).to(dtype)
    rebuilt = build_empty(json.loads(json.dumps(module.spec())), dtype, "cpu")
    rebuilt.load_state_dict(module.state_dict(), strict=True)
    inputs = random(3, 13, dtype=torch.float32).to(dtype)
    assert_same_output(rebuilt(inputs), module(inputs))
    assert rebuilt.spec() == module.spec()
    assert {
        name: (tensor.dtype, tensor.shape) for name, tensor in rebuilt.state_dict().items()
    } == {name: (tensor.dtype, tensor.shape) for name, tensor in module.state_dict().items()}
    assert all(
        tensor.device.type == "meta"
        for tensor in build_empty(module.spec(), dtype).state_dict().values()
    )


@pytest.mark.parametrize("pivoted", [False, True], ids=["plain", "pivoted"])
def test_a_cast_keeps_the_pivots(pivoted):
    module = made((17, 13), pivoted, dtype=torch.float32).to(torch.bfloat16)
    assert module.weight.dtype == module.up.dtype == module.bias.dtype == torch.bfloat16
    assert (module.pivots.dtype == torch.uint8) if pivoted else (module.pivots is None)
    assert module.to_dense().dtype == torch.float32
    assert not module.to_dense().requires_grad


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


def test_gradients_reach_input_and_factors():
    module = made((6, 5), True, rank=2)
    tensors = [random(4, 5, seed=3), module.weight.data, module.up.data, module.bias.data]

    def forward(inputs, weight, up, bias):
        return torch.func.functional_call(
            module, {"weight": weight, "up": up, "bias": bias}, inputs
        )

    assert torch.autograd.gradcheck(forward, [tensor.requires_grad_(True) for tensor in tensors])


def test_loading_other_pivots_after_use_takes_effect():
    first, second = made((9, 12), True), low_rank(random(9, 12, seed=5), random(9, seed=6), 4, True)
    assert not torch.equal(first.pivots, second.pivots)
    inputs = random(3, 12)
    first(inputs)
    first.load_state_dict(second.state_dict())
    assert_same_output(first(inputs), second(inputs))


def test_training_after_inference_mode():
    module = made((9, 12), True)
    with torch.inference_mode():
        module(random(3, 12))
    inputs = random(3, 12).requires_grad_(True)
    module(inputs).sum().backward()
    torch.testing.assert_close(
        inputs.grad, module.to_dense().sum(0).expand(3, 12), rtol=DOUBLE, atol=DOUBLE
    )


def test_registered_under_its_kind():
    assert KINDS["low_rank"] is LowRank
