"""The chained storage kind: the product of two packed factors, names, sizes, spec round trip, and
reading it back with transformers.
"""

import copy
import json

import pytest
import torch
from support.models import tiny_model
from support.modules import compress_in_place, loaded
from support.sameness import assert_same_output, assert_same_tensors

import compressor.hf  # noqa: F401 - registers the format with transformers
from compressor.evaluation.perplexity import in_float32
from compressor.linears import Adapted, Chained, Packed, build_empty


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


def test_spec_rebuilds_the_module_exactly(module):
    for made_of in (module, Adapted(copy.deepcopy(module), torch.randn(6, 2), torch.randn(2, 86))):
        rebuilt = build_empty(json.loads(json.dumps(made_of.spec())), torch.float32, "cpu")
        rebuilt.load_state_dict(made_of.state_dict(), strict=True)
        inputs = torch.randn(3, 86)
        assert_same_output(rebuilt(inputs), made_of(inputs))
        assert_same_output(rebuilt.to_dense(), made_of.to_dense())
        assert rebuilt.spec() == made_of.spec()


def test_whatever_is_written_or_cast_after_a_forward_pass_takes_effect(module):
    inputs = torch.randn(3, 86)

    def check():
        expected = inputs @ module.to_dense().T + (0 if module.bias is None else module.bias)
        torch.testing.assert_close(module(inputs), expected, rtol=1e-4, atol=1e-4)

    with torch.no_grad():
        check()
        for name in ("scales", "up_scales"):
            getattr(module, name).mul_(2)
            check()
        for name in ("weight", "up_codes"):
            getattr(module, name).copy_(getattr(module, name).flip(0))
            check()
        module.to(torch.bfloat16)
        with in_float32(module):
            check()


def test_scales_of_both_factors_learn(module):
    module.requires_grad_(True)
    module(torch.ones(2, 86)).square().sum().backward()
    assert module.scales.grad.abs().sum() > 0 and module.up_scales.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("kind", "name"),
    [("llama", "model.layers.0.mlp.up_proj"), ("gpt2", "transformer.h.0.attn.c_attn")],
)
def test_reads_back_through_from_pretrained(kind, name, tmp_path):
    model = tiny_model(kind).to(torch.bfloat16)
    dense = model.get_submodule(name)
    height, width = (
        (dense.nf, dense.nx) if kind == "gpt2" else (dense.out_features, dense.in_features)
    )
    module = chain(height, width, 7, kind == "llama", dense.bias is not None, torch.bfloat16)
    compress_in_place(model, {name: module})
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert_same_tensors(again.state_dict(), model.state_dict())
    inputs = torch.ones(3, width, dtype=torch.bfloat16)
    assert_same_output(again.get_submodule(name)(inputs), module(inputs))
