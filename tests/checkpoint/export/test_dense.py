# ruff: noqa: F401 - fixtures come from neighbouring files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import compress, contents, logits, store, without_plugin
from support.models import read_json, save_tiny
from support.sameness import assert_same_output
from transformers import AutoModelForCausalLM

from compressor.checkpoint.export.dense import export_dense
from compressor.checkpoint.verify import verify
from compressor.errors import CheckpointError, ConfigError
from compressor.linears import CompressedLinear
from compressor.models.load import load

TOLERANCE = {
    "float32": 1e-5,
    "bfloat16": 0.05,
}  # relative to the largest logit: products are rounded to the stored dtype


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("llama", "float32"), ("llama", "bfloat16"), ("gpt2", "float32"), ("mixtral", "float32")],
)
def test_plain_transformers_loads_the_export(tmp_path, kind, dtype, request):
    source = save_tiny(tmp_path / kind, kind, dtype=dtype)
    model = compress(load(source)[0])
    checkpoint = store(tmp_path / "checkpoint", model, source)
    line = export_dense(checkpoint, tmp_path / "dense")
    assert "quality-equal" in line
    assert "not smaller" in line
    assert verify(tmp_path / "dense") == []
    assert "not smaller" in (tmp_path / "dense" / "README.md").read_text()
    original, dense = (
        load_file(source / "model.safetensors"),
        load_file(tmp_path / "dense" / "model.safetensors"),
    )
    described = [
        {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        for tensors in (original, dense)
    ]
    assert (
        described[0] == described[1]
    )  # names too: experts are stored one by one, as everybody expects
    for name, module in model.named_modules():
        if isinstance(module, CompressedLinear):
            weight = module.to_dense().to(module.up.dtype)
            assert_same_output(dense[f"{name}.weight"], weight.T if kind == "gpt2" else weight)
    request.getfixturevalue("without_plugin")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    scale = logits(model).abs().max()
    assert (logits(plain) - logits(model)).abs().max() <= TOLERANCE[dtype] * scale


def test_export_in_shards_and_over_an_old_one(tmp_path, tiny_llama):
    checkpoint = store(tmp_path / "checkpoint", compress(load(tiny_llama)[0]), tiny_llama)
    export_dense(checkpoint, tmp_path / "dense")
    before = contents(tmp_path / "dense")
    with pytest.raises(ConfigError, match="--overwrite"):
        export_dense(checkpoint, tmp_path / "dense")
    assert contents(tmp_path / "dense") == before
    export_dense(checkpoint, tmp_path / "dense", overwrite=True, shard_size=20_000)
    assert not (tmp_path / "dense" / "model.safetensors").exists()
    assert verify(tmp_path / "dense") == []
    assert read_json(tmp_path / "dense" / "config.json")["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("output", ["checkpoint", "checkpoint/dense"])
def test_export_into_the_checkpoint_is_refused(tmp_path, tiny_llama, output):
    checkpoint = store(tmp_path / "checkpoint", compress(load(tiny_llama)[0]), tiny_llama)
    with pytest.raises(ConfigError, match="overlap"):
        export_dense(checkpoint, tmp_path / output, overwrite=True)


def test_dense_input_is_refused(tiny_llama, tmp_path):
    with pytest.raises(CheckpointError, match="nothing to export"):
        export_dense(Path(tiny_llama), tmp_path / "dense")
