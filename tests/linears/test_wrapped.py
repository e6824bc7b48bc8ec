"""The wrapped storage kind: 2:4 positions, block-diagonal wrappers, sizes, spec round trip, reading
with transformers.
"""

import json

import pytest
import torch
from support.models import tiny_model
from support.modules import compress_in_place, loaded, logits
from support.sameness import assert_same_output

import compressor.hf  # noqa: F401  registers the format
from compressor.linears import Adapted, Wrapped, build_empty
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


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_spec_rebuilds_the_module_exactly(shape, dtype):
    module = made(shape, dtype=dtype)[0]
    rebuilt = build_empty(json.loads(json.dumps(module.spec())), dtype, "cpu")
    rebuilt.load_state_dict(module.state_dict(), strict=True)
    x = random(3, shape[1], dtype=dtype)
    assert_same_output(rebuilt(x), module(x))
    assert rebuilt.spec() == module.spec()
    meta = build_empty(module.spec(), dtype)
    assert meta.spec() == module.spec() and meta.bits() == module.bits()


def test_sizes_that_do_not_fit_are_refused():
    spec = made(SHAPES[0])[0].spec()
    for changes in ({"left": 4}, {"right": 3}, {"in_features": 6, "right": 6}, {"left": 0}):
        with pytest.raises(ValueError, match="do not make 6 outputs"):
            build_empty(spec | changes, torch.float32, "cpu")


def test_gradients_reach_every_stored_number():
    module = made((6, 8, 3, 4))[0].requires_grad_(True)
    names = ["weight", "left", "right"]
    x = random(2, 8)

    def forward(*tensors):
        return torch.func.functional_call(module, dict(zip(names, tensors, strict=True)), (x,))

    assert torch.autograd.gradcheck(
        forward, [getattr(module, name).detach().requires_grad_(True) for name in names]
    )


def test_a_change_after_a_forward_pass_takes_effect():
    one, other = (
        made((6, 8, 3, 4), dtype=torch.float32)[0],
        made((6, 8, 3, 4), dtype=torch.float32)[0],
    )
    x = random(2, 8, dtype=torch.float32)
    with torch.no_grad():
        one(x)
        other.weight *= 2
        one.load_state_dict(other.state_dict())
        assert_same_output(one(x), other(x))


@torch.no_grad()
def test_it_takes_a_residual():
    module, (left, core, right) = made((6, 8, 3, 4))
    adapted = Adapted(module, random(6, 2, seed=6), random(2, 8, seed=7))
    torch.testing.assert_close(
        adapted.to_dense(), left @ core @ right + random(6, 2, seed=6) @ random(2, 8, seed=7)
    )
    rebuilt = build_empty(adapted.spec(), torch.float64, "cpu")
    rebuilt.load_state_dict(adapted.state_dict(), strict=True)
    assert_same_output(rebuilt.to_dense(), adapted.to_dense())


def test_reads_back_through_from_pretrained(tmp_path):
    model = tiny_model("llama")
    compress_in_place(
        model,
        {"model.layers.1.mlp.up_proj": made((48, 32, 6, 8), bias=False, dtype=torch.float32)[0]},
    )
    model.save_pretrained(tmp_path)
    assert_same_output(logits(loaded(tmp_path)), logits(model))
