"""The dictionary storage kind: algebra, sizes, spec round trip, what is kept between forward
passes, and reading it with transformers.
"""

import copy
import json

import pytest
import torch
from support.models import VOCABULARY, tiny_model
from support.modules import compress_in_place
from support.sameness import assert_same_output
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

import compressor.hf  # noqa: F401 - registers the format with transformers
from compressor.evaluation.perplexity import in_float32
from compressor.linears import KINDS, Dictionary, build_empty
from compressor.linears.masks import pack_mask, unpack_mask

SHAPES = [(24, 16), (16, 24), (17, 12), (8, 8), (5, 32)]  # (out, in): tall, wide, odd, square
DOUBLE = 1e-12  # relative, float64 rounding of a few dozen sums


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def made(
    shape,
    blocks: int = 1,
    bias: bool = True,
    atoms: int = 3,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Dictionary:
    """Random atoms (`atoms` for each block) and random codes above 0.3: outputs with unequal
    numbers of nonzeros.
    """
    height, width = shape
    codes, offset = (
        random(height, blocks * atoms, seed=seed, dtype=dtype),
        random(height, seed=seed + 1, dtype=dtype),
    )
    dictionary, mask = (
        random(blocks * atoms, width // blocks, seed=seed + 2, dtype=dtype),
        random(*codes.shape, seed=seed) > 0.3,
    )
    return Dictionary(
        codes[mask], dictionary, pack_mask(mask.flatten()), offset if bias else None, height, blocks
    )


BLOCKS = pytest.mark.parametrize("blocks", [1, 4], ids=["whole", "blocks"])
FEW_OR_MANY = pytest.mark.parametrize("atoms", [2, 14], ids=["pair", "dense"])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@BLOCKS
@FEW_OR_MANY
def test_forward_is_the_dense_product(shape, blocks, atoms, bias, device):
    module = made(shape, blocks, bias, atoms).to(device)
    inputs = random(2, 3, shape[1], seed=5).to(device)
    expected = inputs @ module.to_dense().T + (module.bias if bias else 0)
    assert module(inputs).shape == (2, 3, shape[0])
    torch.testing.assert_close(module(inputs), expected, rtol=DOUBLE, atol=DOUBLE)
    with torch.no_grad():
        torch.testing.assert_close(module(inputs), expected, rtol=DOUBLE, atol=DOUBLE)
        torch.testing.assert_close(
            module(inputs[0, 0]), expected[0, 0], rtol=DOUBLE, atol=DOUBLE
        )  # one token, no batch


def test_by_hand():
    """Three atoms, two outputs in one byte of mask: output 0 is 2 × atom 0, output 1 is atom 1 − 3
    × atom 2.
    """
    module = Dictionary(
        weight=torch.tensor([2.0, 1.0, -3.0]),
        atoms=torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]),
        mask=torch.tensor([0b10001100], dtype=torch.uint8),
        bias=torch.tensor([0.5, 0.0]),
        out_features=2,
    )
    dense = torch.tensor([[2.0, 0.0, 4.0, 0.0], [-3.0, -2.0, -3.0, -3.0]])
    assert torch.equal(module.to_dense(), dense)
    assert torch.equal(module(torch.eye(4)), dense.T + module.bias)
    assert (module.in_features, module.out_features) == (4, 2)


def test_blocks_by_hand():
    """Two slices of two inputs with one atom each: the second atom sees inputs 2 and 3 only."""
    atoms = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    module = Dictionary(
        torch.tensor([1.0, 10.0]),
        atoms,
        torch.tensor([0b11000000], dtype=torch.uint8),
        None,
        1,
        blocks=2,
    )
    assert module.to_dense().tolist() == [[1.0, 2.0, 30.0, 40.0]]
    assert module(torch.ones(4)).tolist() == [73.0]


def test_the_pair_runs_where_it_takes_fewer_multiply_adds():
    """24 × 16 = 384 multiply-adds dense; k atoms take 40 k, in two blocks 32 for each atom."""
    assert made((24, 16), atoms=9).runs_as_pair() and not made((24, 16), atoms=10).runs_as_pair()
    assert (
        made((24, 16), 2, atoms=5).runs_as_pair() and not made((24, 16), 2, atoms=6).runs_as_pair()
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@BLOCKS
@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.float32, 4), (torch.bfloat16, 2)], ids=str)
def test_bits_are_the_bytes_written(shape, blocks, dtype, itemsize):
    (height, width), module = shape, made(shape, blocks, dtype=dtype)
    nonzeros = int(unpack_mask(module.mask, height * 3 * blocks).sum())
    assert module.weight.numel() == nonzeros
    assert module.stored_parameters() == nonzeros + 3 * width + height
    assert module.bits() == 8 * (
        itemsize * (nonzeros + 3 * width + height) + -(-height * 3 * blocks // 8)
    )
    assert module.bits() == 8 * sum(tensor.nbytes for tensor in module.state_dict().values())


@BLOCKS
@FEW_OR_MANY
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_spec_rebuilds_the_module_exactly(blocks, atoms, bias, dtype):
    module = made((17, 12), blocks, bias, atoms, dtype)
    rebuilt = build_empty(json.loads(json.dumps(module.spec())), dtype, "cpu")
    rebuilt.load_state_dict(module.state_dict(), strict=True)
    inputs = random(3, 12, dtype=dtype)
    assert_same_output(rebuilt(inputs), module(inputs))
    assert_same_output(rebuilt.to_dense(), module.to_dense())
    assert rebuilt.spec() == module.spec()
    assert {
        name: (tensor.dtype, tensor.shape) for name, tensor in rebuilt.state_dict().items()
    } == {name: (tensor.dtype, tensor.shape) for name, tensor in module.state_dict().items()}
    assert all(
        tensor.device.type == "meta"
        for tensor in build_empty(module.spec(), dtype).state_dict().values()
    )


def test_stored_names_and_kind():
    assert set(made((8, 8)).state_dict()) == {"weight", "atoms", "mask", "bias"}
    assert made((8, 8)).weight.ndim == 1  # no reader can take it for a dense weight
    assert KINDS["dictionary"] is Dictionary


@FEW_OR_MANY
def test_casts_keep_the_mask_and_take_effect(atoms):
    module = made((17, 12), atoms=atoms, dtype=torch.float32)
    inputs = random(3, 12, dtype=torch.float32)
    with torch.no_grad():
        wide, mask = module(inputs), module.mask.clone()
        module.to(torch.bfloat16)
        assert (
            module.weight.dtype == module.atoms.dtype == module.bias.dtype == torch.bfloat16
            and torch.equal(module.mask, mask)
        )
        assert module(inputs.bfloat16()).dtype == torch.bfloat16
        assert module.to_dense().dtype == torch.float32
        with in_float32(module):
            narrow = module(inputs)
        assert narrow.dtype == torch.float32 and not torch.equal(narrow, wide)
        torch.testing.assert_close(
            narrow, inputs @ module.to_dense().T + module.bias.float(), rtol=1e-5, atol=1e-5
        )
        assert (
            module.weight.dtype == torch.bfloat16
            and module(inputs.bfloat16()).dtype == torch.bfloat16
        )


@BLOCKS
@FEW_OR_MANY
def test_whatever_is_written_after_a_forward_pass_takes_effect(blocks, atoms):
    module, inputs = made((9, 12), blocks, atoms=atoms), random(3, 12)

    def check() -> None:
        expected = functional.linear(inputs, module.to_dense(), module.bias)
        torch.testing.assert_close(module(inputs), expected, rtol=DOUBLE, atol=DOUBLE)

    with torch.no_grad():
        module(inputs)
        module.weight.mul_(2)
        check()
        module.atoms.mul_(3)
        check()
        module.mask.copy_(pack_mask(unpack_mask(module.mask, 9 * blocks * atoms).flip(0)))
        check()
        for assign in (False, True):
            state = {
                name: tensor + (tensor.ndim > 0 and tensor.is_floating_point())
                for name, tensor in module.state_dict().items()
            }
            module.load_state_dict(state, assign=assign)
            check()
        module.atoms = nn.Parameter(module.atoms * 3)
        check()
        module.weight.data = module.weight.data * 3
        check()
        module.float().double()
        check()
    copied = copy.deepcopy(module)
    with torch.no_grad():
        copied.weight.zero_()
        check()
        assert torch.equal(copied(inputs), module.bias.expand(3, 9))


@FEW_OR_MANY
def test_repeated_passes_rebuild_nothing(atoms, monkeypatch):
    module, inputs = made((9, 12), atoms=atoms), random(3, 12)
    with torch.no_grad():
        first = module(inputs)
        monkeypatch.setattr(Dictionary, "codes", None)
        assert torch.equal(module(inputs), first)


@FEW_OR_MANY
def test_training_after_inference_mode(atoms):
    module = made((9, 12), atoms=atoms)
    with torch.inference_mode():
        module(random(3, 12))
    inputs = random(3, 12).requires_grad_(True)
    module(inputs).sum().backward()
    torch.testing.assert_close(
        inputs.grad, module.to_dense().sum(0).expand(3, 12), rtol=DOUBLE, atol=DOUBLE
    )
    with torch.inference_mode():
        made_there = made((9, 12), atoms=atoms)
        expected = functional.linear(inputs, made_there.to_dense(), made_there.bias)
        torch.testing.assert_close(made_there(inputs), expected, rtol=DOUBLE, atol=DOUBLE)


@BLOCKS
def test_gradients_reach_input_and_stored_tensors(blocks):
    module, names = made((6, 8), blocks).requires_grad_(True), ("weight", "atoms", "bias")
    module(random(4, 8)).sum().backward()
    assert all(getattr(module, name).grad.abs().sum() > 0 for name in names)
    tensors = [random(4, 8, seed=3), *(getattr(module, name).data for name in names)]

    def forward(inputs, weight, atoms, bias):
        return torch.func.functional_call(
            module, {"weight": weight, "atoms": atoms, "bias": bias}, inputs
        )

    assert torch.autograd.gradcheck(forward, [tensor.requires_grad_(True) for tensor in tensors])


def test_the_dense_weight_is_free_of_autograd():
    assert not made((6, 8)).to_dense().requires_grad


def test_frozen_tensors_pass_gradients_to_the_input():
    module = made((9, 12)).requires_grad_(False)
    inputs = random(3, 12).requires_grad_(True)
    module(inputs).sum().backward()
    torch.testing.assert_close(
        inputs.grad, module.to_dense().sum(0).expand(3, 12), rtol=DOUBLE, atol=DOUBLE
    )


@BLOCKS
def test_transformers_reads_it_back(blocks, tmp_path):
    model = tiny_model("llama")
    modules = {}
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        linear = model.get_submodule(name)
        modules[name] = made(
            (linear.out_features, linear.in_features), blocks, bias=False, dtype=torch.float32
        )
    compress_in_place(model, modules)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_same_output(again(tokens).logits, model(tokens).logits)
    for name, module in modules.items():
        assert isinstance(again.get_submodule(name), Dictionary)
        assert_same_output(again.get_submodule(name).to_dense(), module.to_dense())
