"""Contract of storage kinds: what every kind does, whatever it stores."""

import copy
import json
from itertools import product

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import save
from support.models import tiny_model
from support.modules import compress_in_place, loaded, logits, low_rank
from support.sameness import assert_same_output, assert_same_tensors
from torch import Tensor
from torch.nn import functional

import compressor.hf  # noqa: F401 - registers the format with transformers
from compressor.evaluation.perplexity import in_float32
from compressor.linalg import Metric
from compressor.linalg.products import Product
from compressor.linears import (
    KINDS,
    Adapted,
    Chained,
    CompressedLinear,
    Dictionary,
    Packed,
    Pruned,
    Sparse,
    Wrapped,
    build_empty,
)
from compressor.linears.masks import pack_mask

HEIGHT, WIDTH = 9, 12  # of outputs and inputs; no whole bytes of mask in either, nor in both
DOUBLE = 1e-12  # relative, float64 rounding of a few dozen sums
ROUNDED = 2e-2  # of the largest entry, one rounding to bfloat16 of each of a few dozen products


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def low_rank_of(height, width, bias, pivoted=False):
    return low_rank(random(height, width), bias, 4, pivoted)


def sparse(height, width, bias):
    mask = random(height, width, seed=2) > 0.3
    return Sparse(random(height, width)[mask], pack_mask(mask.flatten()), bias, width, height)


def dictionary(height, width, bias, atoms=3, blocks=1):
    codes = random(height, blocks * atoms)
    mask = random(*codes.shape, seed=2) > 0.3
    learned = random(blocks * atoms, width // blocks, seed=3)
    return Dictionary(codes[mask], learned, pack_mask(mask.flatten()), bias, height, blocks)


def packed(height, width, bias, symmetric=True, group=4, bits=3):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (height, width), generator=generator)
    scales, zeros = random(height, width // group), codes[:, : width // group]
    return Packed.of_codes(codes, scales, None if symmetric else zeros, bias, bits)


def chained(height, width, bias, symmetric=True):
    down = packed(4, width, None, symmetric)
    return Chained(down, packed(height, 4, bias, symmetric, group=2, bits=4))


def pruned(height, width, bias, rows=True, columns=True):
    kept_rows = torch.arange(height) % 3 > 0 if rows else None
    kept_columns = torch.arange(width) % 4 > 0 if columns else None
    return Pruned.of(random(height, width), bias, kept_rows, kept_columns, torch.float64)


def wrapped(height, width, bias):
    mask = (torch.arange(width) % 4 < 2).repeat(height, 1)
    left, right = random(height // 3, 3, 3, seed=2), random(width // 4, 4, 4, seed=3)
    if height % 3:
        left = random(height // 2, 2, 2, seed=2)
    return Wrapped.of(random(height, width), mask, left, right, bias, torch.float64)


def adapted(height, width, bias, base=sparse):
    return Adapted(base(height, width, bias), random(height, 2, seed=4), random(2, width, seed=5))


def adapted_by_integers(height, width, bias):
    up, down = packed(2, height, None, group=height), packed(2, width, None)
    return Adapted(packed(height, width, bias, symmetric=False), up, down)


MAKERS = {
    "low rank": low_rank_of,
    "pivoted": lambda *size: low_rank_of(*size, pivoted=True),
    "sparse": sparse,
    "dictionary as a pair": dictionary,
    "dictionary as a matrix": lambda *size: dictionary(*size, atoms=14),
    "dictionary in blocks": lambda *size: dictionary(*size, blocks=4),
    "packed": packed,
    "packed, asymmetric": lambda *size: packed(*size, symmetric=False),
    "chained": chained,
    "chained, asymmetric": lambda *size: chained(*size, symmetric=False),
    "pruned": pruned,
    "pruned rows": lambda *size: pruned(*size, columns=False),
    "pruned columns": lambda *size: pruned(*size, rows=False),
    "wrapped": wrapped,
    "adapted sparse": adapted,
    "adapted dictionary": lambda *size: adapted(*size, base=dictionary),
    "adapted packed": lambda *size: adapted(*size, base=packed),
    "adapted by integers": adapted_by_integers,
}
CASES = [
    pytest.param((maker, bias), id=f"{name}{'' if bias else ', no bias'}")
    for (name, maker), bias in product(MAKERS.items(), (True, False))
]


def make(maker, bias=True, height=HEIGHT, width=WIDTH, dtype=torch.float64) -> CompressedLinear:
    module = maker(height, width, random(height, seed=1) if bias else None)
    return module.requires_grad_(False).to(dtype)


@pytest.fixture(params=CASES)
def module(request) -> CompressedLinear:
    """One storage of every kind, with and without a bias, float64."""
    return make(*request.param)


@pytest.fixture(params=MAKERS.values(), ids=MAKERS)
def biased(request) -> CompressedLinear:
    """One storage of every kind, float64."""
    return make(request.param)


def dense_output(module: CompressedLinear, inputs: Tensor) -> Tensor:
    return functional.linear(inputs, module.to_dense().to(inputs), module.dense_bias())


def assert_runs_as_it_is_stored(module: CompressedLinear) -> None:
    inputs = random(3, WIDTH, seed=6)
    expected = dense_output(module, inputs)
    torch.testing.assert_close(module(inputs), expected, rtol=DOUBLE, atol=DOUBLE)


def test_every_registered_kind_is_under_contract():
    assert {make(maker).kind for maker in MAKERS.values()} == KINDS.keys()
    assert all(type(make(maker)) is KINDS[make(maker).kind] for maker in MAKERS.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_its_spec_and_its_tensors_rebuild_it_exactly(module, dtype):
    module = module.to(dtype)
    rebuilt = build_empty(json.loads(json.dumps(module.spec())), dtype, "cpu")
    rebuilt.load_state_dict(module.state_dict(), strict=True)
    assert_same_tensors(rebuilt.state_dict(), module.state_dict())
    assert rebuilt.spec() == module.spec()
    inputs = random(3, WIDTH, seed=6).to(dtype)
    assert_same_output(rebuilt(inputs), module(inputs))
    assert_same_output(rebuilt.to_dense(), module.to_dense())


def test_an_empty_module_takes_no_memory_and_has_its_sizes(module):
    empty = build_empty(module.spec(), torch.float64)
    assert empty.bits() == module.bits() and empty.multiply_adds() == module.multiply_adds()
    for name, tensor in module.state_dict().items():
        blank = empty.state_dict()[name]
        assert (blank.shape, blank.dtype) == (tensor.shape, tensor.dtype)
        assert blank.device.type == "meta"


def test_forward_is_the_product_with_the_dense_weight(module, device):
    module, inputs = module.to(device), random(2, 3, WIDTH, seed=6).to(device)
    expected = dense_output(module, inputs)
    close = {"rtol": DOUBLE, "atol": DOUBLE}
    torch.testing.assert_close(module(inputs), expected, **close)
    with torch.no_grad():
        torch.testing.assert_close(module(inputs), expected, **close)
        torch.testing.assert_close(module(inputs[0, 0]), expected[0, 0], **close)
    torch.testing.assert_close(module.requires_grad_(True)(inputs), expected, **close)


def test_bits_are_the_bytes_written(module):
    data = save({name: tensor.contiguous() for name, tensor in module.state_dict().items()})
    header = 8 + int.from_bytes(data[:8], "little")
    assert module.bits() == 8 * (len(data) - header)
    assert module.stored_parameters() == sum(parameter.numel() for parameter in module.parameters())


def test_the_weight_never_has_the_dense_shape(module):
    assert tuple(module.weight.shape) not in {(HEIGHT, WIDTH), (WIDTH, HEIGHT)}


def test_the_dense_weight_is_wide_and_free_of_autograd(biased):
    biased.requires_grad_(True)
    assert biased.to_dense().dtype == torch.float64
    assert biased.to(torch.bfloat16).to_dense().dtype == torch.float32
    assert not biased.to_dense().requires_grad


def test_a_cast_keeps_integers_and_takes_effect(biased):
    inputs = random(3, WIDTH, seed=6).float()
    with torch.no_grad():
        biased.float()(inputs)
        integers = {
            name: tensor.clone()
            for name, tensor in biased.state_dict().items()
            if not tensor.is_floating_point()
        }
        biased.to(torch.bfloat16)
        state = biased.state_dict()
        assert_same_tensors({name: state[name] for name in integers}, integers)
        assert {tensor.dtype for tensor in biased.parameters()} == {torch.bfloat16}
        narrow = biased(inputs.bfloat16())
        expected = dense_output(biased.float(), inputs)
        assert narrow.dtype == torch.bfloat16
        assert (narrow.float() - expected).abs().max() <= ROUNDED * expected.abs().max()
        biased.to(torch.bfloat16)
        with in_float32(biased):
            assert_same_output(biased(inputs), expected)


def test_a_write_after_a_forward_pass_takes_effect(biased):
    inputs = random(3, WIDTH, seed=6)
    with torch.no_grad():
        biased(inputs)
        for parameter in biased.parameters():
            parameter.mul_(2)
            assert_runs_as_it_is_stored(biased)
            parameter.data = parameter.data * 3
            assert_runs_as_it_is_stored(biased)
        for assign in (False, True):
            state = {
                name: tensor + 1 if tensor.is_floating_point() else tensor.clone()
                for name, tensor in biased.state_dict().items()
            }
            biased.load_state_dict(state, assign=assign)
            assert_runs_as_it_is_stored(biased)
            assert_same_tensors(biased.state_dict(), state)


def test_a_copy_is_independent(biased):
    twin, inputs = copy.deepcopy(biased), random(3, WIDTH, seed=6)
    with torch.no_grad():
        before = biased(inputs)
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(biased(inputs), before)
        assert not twin(inputs).any()


def test_it_passes_gradients_after_inference_mode(biased):
    with torch.inference_mode():
        biased(random(3, WIDTH))
    inputs = random(3, WIDTH, seed=6).requires_grad_(True)
    biased(inputs).sum().backward()
    expected = biased.to_dense().sum(0).expand(3, WIDTH)
    torch.testing.assert_close(inputs.grad, expected, rtol=DOUBLE, atol=DOUBLE)


def test_a_module_built_in_inference_mode_runs():
    for maker in MAKERS.values():
        with torch.inference_mode():
            assert_runs_as_it_is_stored(make(maker))


def test_gradients_reach_inputs_and_every_parameter(biased):
    names = [name for name, _ in biased.named_parameters()]
    tensors = [random(2, WIDTH, seed=6), *(tensor.data for tensor in biased.parameters())]

    def forward(inputs, *values):
        return torch.func.functional_call(biased, dict(zip(names, values, strict=True)), inputs)

    biased.requires_grad_(True)
    assert torch.autograd.gradcheck(forward, [tensor.requires_grad_(True) for tensor in tensors])


def test_an_offloaded_module_runs_and_keeps_nothing_in_memory(biased):
    inputs = random(3, WIDTH, seed=6)
    with torch.no_grad():
        expected = biased(inputs)
        cpu_offload(biased, execution_device=torch.device("cpu"), offload_buffers=True)
        assert_same_output(biased(inputs), expected)
    assert all(tensor.device.type == "meta" for tensor in biased.state_dict().values())
    assert not any(hasattr(tensor, "_memo") for tensor in biased.parameters())


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    ("architecture", "name"),
    [("llama", "model.layers.1.mlp.down_proj"), ("gpt2", "transformer.h.0.mlp.c_proj")],
)
def test_from_pretrained_reads_it_back(architecture, name, maker, tmp_path):
    model = tiny_model(architecture).to(torch.bfloat16)
    dense = model.get_submodule(name)
    size = (dense.nf, dense.nx) if architecture == "gpt2" else dense.weight.shape
    module = make(maker, dense.bias is not None, *size, torch.bfloat16)
    compress_in_place(model, {name: module})
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert type(again.get_submodule(name)) is type(module)
    assert_same_tensors(again.state_dict(), model.state_dict())
    assert_same_output(logits(again), logits(model))


def test_the_support_has_one_place_for_each_stored_entry(biased):
    base = biased.base
    support = base.support()
    if support is None:
        assert not biased.has_movable_support
        return
    assert support.dtype == torch.bool and int(support.sum()) == base.weight.numel()
    if biased.has_movable_support:
        moved = support.flip(0)
        with torch.no_grad():
            biased(random(3, WIDTH))
            biased.mask.copy_(pack_mask(moved.flatten()))
            assert torch.equal(base.support(), moved)
            assert_runs_as_it_is_stored(biased)


def test_an_extension_adds_its_product_and_has_the_size_that_was_announced(module):
    up, down = random(HEIGHT, 2, seed=7), random(2, WIDTH, seed=8)
    before, state = module.to_dense(), copy.deepcopy(module.state_dict())
    assert module.largest_extension >= 2
    extended = module.extend(up, down, torch.float64)
    torch.testing.assert_close(extended.to_dense(), before + up @ down, rtol=1e-9, atol=1e-9)
    if not (isinstance(module, Adapted) and module.factor_bits):  # whose factors become floats
        expected = (extended.bits(), extended.stored_parameters())
        assert module.extended_size(2, 8) == expected
    assert_same_tensors(module.state_dict(), state)
    own, both = module.low_rank_part(), extended.low_rank_part()
    assert both[0].shape[1] == both[1].shape[0] == 2 + (0 if own is None else own[0].shape[1])


def test_a_product_is_absorbed_in_the_sizes_that_were_stored(biased):
    support = biased.support()
    height, width = (HEIGHT, WIDTH) if support is None else support.shape
    added = Product(random(height, 1, seed=7), random(1, width, seed=8), 0.1)
    if not biased.can_absorb:
        with pytest.raises(TypeError, match=rf"q: storage of kind '{biased.kind}' takes no"):
            biased.absorb(added, Metric(), "q")
        return
    before, spec = biased.to_dense(), biased.spec()
    tensors = biased.absorb(added, Metric(), "q")
    weight = biased.weight.clone()
    biased.load_state_dict(biased.state_dict() | tensors)
    assert biased.spec() == spec
    if support is None:
        lost = before + added.scale * added.up @ added.down - biased.to_dense()
        assert lost.norm() < 0.1 * added.up.norm() * added.down.norm()
    else:
        expected = weight + 0.1 * (added.up @ added.down)[support]
        torch.testing.assert_close(biased.weight.data, expected, rtol=DOUBLE, atol=DOUBLE)


def test_all_floating_tensors_learn_or_those_of_the_low_rank_part(biased):
    assert biased.trainable("compressed").keys() == dict(biased.named_parameters()).keys()
    factors = biased.trainable("low_rank")
    assert factors.keys() == set(biased.factor_names) & dict(biased.named_parameters()).keys()
    assert bool(factors) == (biased.kind in {"low_rank", "chained", "adapted"})


def test_only_what_names_a_lender_borrows(biased):
    assert biased.lender is None and biased.lent is None
    biased.bind(torch.nn.Module())
    if not isinstance(biased.base, Dictionary):
        with pytest.raises(TypeError, match="borrows nothing"):
            biased.borrow(random(2, 2))
