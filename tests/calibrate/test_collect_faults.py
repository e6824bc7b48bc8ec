"""What stops a calibration pass: non-finite numbers, models and windows that gradients cannot come
from, linears without tokens.
"""

import pytest
import torch
from support.activations import FIELDS, GRAM, assert_same, everywhere, windows
from support.models import VOCABULARY, tiny_model

from compressor.calibrate.collect import collect
from compressor.errors import ConfigError, DataError, NumericalError
from compressor.models.linears import linears


@pytest.mark.parametrize("fields", [GRAM, frozenset({"sum"})], ids=["gram", "sum"])
def test_non_finite_activations_name_the_linear_and_the_windows(fields):
    model = tiny_model("llama")
    found, tokens = linears(model), windows().clamp(max=VOCABULARY - 2)
    with torch.no_grad():
        model.model.embed_tokens.weight[VOCABULARY - 1] = float("inf")
    tokens[4, 7] = VOCABULARY - 1
    with pytest.raises(
        NumericalError,
        match=r"model\.layers\.0\.self_attn\.q_proj: input activations .*windows 4 to 5",
    ):
        collect(model, found, tokens, everywhere(found, fields), batch_size=2)


def test_non_finite_activations_inside_a_block_name_the_first_linear_that_sees_them():
    model = tiny_model("llama")
    found = linears(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.down_proj: input"):
        collect(model, found, windows(), everywhere(found, GRAM))


def test_non_finite_gradients_are_refused():
    model = tiny_model("llama")
    found = linears(model)
    with torch.no_grad():
        model.lm_head.weight[5, 5] = float("inf")
    with pytest.raises(
        NumericalError, match=r"model\.layers\.1\.mlp\.down_proj: output gradients .*windows 0 to 5"
    ):
        collect(model, found, windows(), everywhere(found))


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_models_serve_grams_and_refuse_gradients(tmp_path, where):
    from accelerate import cpu_offload, disk_offload

    model = tiny_model("llama")
    found = linears(model)
    fields = frozenset({"gram", "sum", "abs_sum"})
    expected = collect(model, found, windows(), everywhere(found, fields))
    if where == "cpu":
        cpu_offload(model, execution_device="cpu")
    else:
        disk_offload(model, tmp_path, execution_device="cpu")
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    assert_same(collect(model, found, windows(), everywhere(found, fields)), expected)
    with pytest.raises(ConfigError, match=r"gradients.*offloaded"):
        collect(model, found, windows(), everywhere(found))


def route_to_half_the_positions(mlp):
    dense = mlp.forward
    mlp.forward = lambda x: torch.cat([dense(x[:, ::2]), torch.zeros_like(x[:, 1::2])], dim=1)


def test_routed_tokens_count_as_many_as_they_are_and_refuse_gradients():
    model = tiny_model("llama")
    found = linears(model)
    route_to_half_the_positions(model.model.layers[0].mlp)
    stats = collect(model, found, windows(), everywhere(found, GRAM))
    assert stats["model.layers.0.mlp.down_proj"].tokens == windows().numel() // 2
    assert stats["model.layers.1.mlp.down_proj"].tokens == windows().numel()
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.mlp\.\w+ sees routed tokens"):
        collect(model, found, windows(), everywhere(found))


def test_linears_without_a_token_or_without_a_gradient_have_sums_of_zero_and_say_why():
    model = tiny_model("llama")
    found = linears(model)
    model.model.layers[1].mlp.forward = lambda x: x
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    stats = collect(model, found, windows(), everywhere(found))
    never = stats["model.layers.1.mlp.gate_proj"]
    assert (
        never.silence == "no token reaches it"
        and never.gram.shape == (32, 32)
        and never.grad_gram.shape == (48, 48)
    )
    assert (never.tokens, never.grad_tokens) == (0, 0) and not any(
        getattr(never, field).any() for field in FIELDS
    )
    cut = stats["model.layers.0.self_attn.v_proj"]
    assert (
        cut.silence == "no gradient reaches it"
        and cut.tokens == windows().numel()
        and cut.gram.any()
    )
    assert cut.grad_gram.shape == (16, 16) and not cut.grad_gram.any()
    silent = {name for name, one in stats.items() if one.silence}
    assert silent == {name for name in found if "layers.1.mlp" in name} | {
        f"model.layers.0.self_attn.{key}_proj" for key in "qkv"
    }


def test_windows_too_short_for_gradients():
    model = tiny_model("llama")
    found = linears(model)
    with pytest.raises(DataError, match="windows of 1 tokens leave no position for gradients"):
        collect(model, found, windows(length=1), everywhere(found))
