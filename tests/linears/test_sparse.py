"""The sparse storage kind: algebra, sizes, spec round trip, what is kept between forward passes,
and reading it back with transformers.
"""

import copy
import json

import pytest
import torch
from accelerate import cpu_offload
from support.models import VOCABULARY, tiny_model
from support.modules import compress_in_place
from support.sameness import assert_same_output, assert_same_tensors
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

import compressor.hf  # noqa: F401 - registers the format with transformers
from compressor.errors import CheckpointError
from compressor.evaluation.perplexity import in_float32
from compressor.linears import KINDS, Adapted, Sparse, build_empty
from compressor.linears.masks import pack_mask, unpack_mask

SHAPES = [(24, 16), (16, 24), (17, 13), (8, 8), (5, 31)]  # (out, in): tall, wide, odd, square
DOUBLE = 1e-12  # relative, float64 rounding of a few dozen sums


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


MAKERS = pytest.mark.parametrize("make", [made, adapted], ids=["sparse", "adapted"])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@MAKERS
def test_forward_is_the_dense_product(make, shape, bias, device):
    module = make(shape, bias).to(device)
    inputs = random(2, 3, shape[1], seed=2).to(device)
    expected = inputs @ module.to_dense().T + (module.bias if bias else 0)
    assert module(inputs).shape == (2, 3, shape[0])
    torch.testing.assert_close(module(inputs), expected, rtol=DOUBLE, atol=DOUBLE)
    with torch.no_grad():
        torch.testing.assert_close(
            module(inputs[0, 0]), expected[0, 0], rtol=DOUBLE, atol=DOUBLE
        )  # one token, no batch


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


@MAKERS
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_spec_rebuilds_the_module_exactly(make, bias, dtype):
    module = make((17, 13), bias, dtype)
    rebuilt = build_empty(json.loads(json.dumps(module.spec())), dtype, "cpu")
    rebuilt.load_state_dict(module.state_dict(), strict=True)
    inputs = random(3, 13, dtype=dtype)
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


def test_stored_names():
    assert list(made((8, 8)).state_dict()) == ["weight", "bias", "mask"]
    assert set(adapted((8, 8)).state_dict()) == {"weight", "bias", "mask", "up", "down"}
    assert [name for name, _ in nn.ModuleDict({"q": adapted((8, 8))}).named_modules()] == ["", "q"]


@MAKERS
def test_weight_is_one_dimensional(make):
    """So no reader that expects (out, in), or (in, out) for Conv1D, can take it for a dense
    weight.
    """
    assert build_empty(make((5, 31)).spec(), torch.float32).weight.ndim == 1


@MAKERS
def test_casts_keep_the_mask_and_take_effect(make):
    module = make((17, 13), dtype=torch.float32)
    inputs = random(3, 13, dtype=torch.float32)
    with torch.no_grad():
        wide = module(inputs)
        mask = module.mask.clone()
        module.to(torch.bfloat16)
        assert module.weight.dtype == module.bias.dtype == torch.bfloat16 and torch.equal(
            module.mask, mask
        )
        assert module(inputs.bfloat16()).dtype == torch.bfloat16
        assert module.to_dense().dtype == torch.float32 and not module.to_dense().requires_grad
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


@MAKERS
def test_whatever_is_written_after_a_forward_pass_takes_effect(make):
    module, other = make((9, 12)), build_empty(make((9, 12)).spec(), torch.float64, "cpu")
    inputs = random(3, 12)

    def fresh() -> Tensor:
        return functional.linear(inputs, module.to_dense(), module.bias)

    with torch.no_grad():
        module(inputs)
        module.weight.mul_(2)
        torch.testing.assert_close(module(inputs), fresh(), rtol=DOUBLE, atol=DOUBLE)
        module.mask.copy_(pack_mask(unpack_mask(module.mask, 108).flip(0)))
        torch.testing.assert_close(module(inputs), fresh(), rtol=DOUBLE, atol=DOUBLE)
        for assign in (False, True):
            state = {name: tensor.clone() for name, tensor in make((9, 12)).state_dict().items()}
            state["weight"] = state["weight"] + (2 if assign else 1)
            module.load_state_dict(state, assign=assign)
            torch.testing.assert_close(module(inputs), fresh(), rtol=DOUBLE, atol=DOUBLE)
        module.weight = nn.Parameter(state["weight"] * 3)
        torch.testing.assert_close(module(inputs), fresh(), rtol=DOUBLE, atol=DOUBLE)
    other.load_state_dict(module.state_dict())
    assert_same_output(other(inputs), module(inputs))


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


@MAKERS
def test_training_after_inference_mode(make):
    module = make((9, 12))
    with torch.inference_mode():
        module(random(3, 12))
    module.requires_grad_(False)
    inputs = random(3, 12).requires_grad_(True)
    module(inputs).sum().backward()
    torch.testing.assert_close(
        inputs.grad, module.to_dense().sum(0).expand(3, 12), rtol=DOUBLE, atol=DOUBLE
    )


def test_modules_made_in_inference_mode_work():
    with torch.inference_mode():
        module = made((9, 12))
        torch.testing.assert_close(
            module(torch.eye(12, dtype=torch.float64)) - module.bias, module.to_dense().T
        )


@MAKERS
def test_gradients_reach_input_and_values(make):
    module = make((6, 5))
    names = [name for name, _ in module.named_parameters()]
    tensors = [random(4, 5, seed=3), *(tensor.data for tensor in module.parameters())]

    def forward(inputs, *values):
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), inputs)

    assert torch.autograd.gradcheck(forward, [tensor.requires_grad_(True) for tensor in tensors])


@MAKERS
def test_a_copy_is_independent(make):
    module = make((9, 12))
    twin, inputs = copy.deepcopy(module), random(3, 12)
    with torch.no_grad():
        before = module(inputs)
        twin.weight.zero_()
        assert torch.equal(module(inputs), before)
        assert not torch.equal(twin(inputs), before)


@MAKERS
def test_offloaded_modules_keep_no_kept_weight(make):
    module, inputs = make((9, 12)), random(3, 12)
    with torch.no_grad():
        expected = module(inputs)
        cpu_offload(module, execution_device=torch.device("cpu"))
        torch.testing.assert_close(module(inputs), expected, rtol=DOUBLE, atol=DOUBLE)
    assert module.weight.device.type == "meta" and not hasattr(module.weight, "_memo")


def test_a_base_that_stores_an_up_itself_is_refused():
    with pytest.raises(ValueError, match="adapted base stores"):
        Adapted(adapted((9, 12)), random(9, 2), random(2, 12))


def test_registered_under_their_kinds():
    assert KINDS["sparse"] is Sparse and KINDS["adapted"] is Adapted
    with pytest.raises(CheckpointError, match="did you mean 'sparse'"):
        build_empty({"kind": "sparce"}, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_reads_back_through_from_pretrained(kind, dtype, tmp_path):
    model = tiny_model(kind).to(dtype)
    names = {
        "llama": ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"),
        "gpt2": ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"),
    }[kind]
    modules = {}
    for name, make in zip(names, (made, adapted), strict=True):
        dense = model.get_submodule(name)
        shape = (dense.nf, dense.nx) if kind == "gpt2" else (dense.out_features, dense.in_features)
        modules[name] = make(shape, dense.bias is not None, dtype)
    compress_in_place(model, modules)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert [type(again.get_submodule(name)) for name in names] == [Sparse, Adapted]
    assert_same_tensors(again.state_dict(), model.state_dict())
    for name, module in modules.items():
        inputs = random(3, module.in_features, dtype=dtype)
        assert_same_output(again.get_submodule(name)(inputs), module(inputs))
    tokens = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    assert again(input_ids=tokens).logits.isfinite().all()
