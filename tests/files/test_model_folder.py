import os
import shutil
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.folders import WEIGHTS, edit_json, edit_tensors
from support.models import tiny_config

from compressor.errors import CheckpointError, ConfigError
from compressor.files import model_folder as folder_module
from compressor.files.model_folder import (
    check_finite,
    check_sizes,
    content_digest,
    non_finite,
    read,
    refuse_quantised,
    resolve,
)

SMALL = 5_000_000  # bytes of Python memory that reading headers of a tiny model may take


def test_reads_sizes_and_places_of_every_tensor(llama):
    folder = read(llama)
    tensors = load_file(llama / WEIGHTS)
    assert folder.tensors.keys() == tensors.keys()
    assert folder.files == (WEIGHTS,)
    assert folder.weight_bytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, info, data in folder_module.raw_bytes(folder):
        assert info.shape == tuple(tensors[name].shape)
        assert data.tobytes() == tensors[name].numpy().tobytes()


@pytest.mark.parametrize(
    "kind",
    ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "mixtral", "gpt2", "opt", "gpt_neox"],
)
def test_sizes_of_every_architecture_are_accepted(kind):
    check_sizes(Path("config.json"), tiny_config(kind).to_dict())


def test_content_digest_ignores_sharding_and_sees_every_bit(tiny_llama, sharded):
    assert content_digest(read(sharded)) == content_digest(read(tiny_llama))
    shard = max(sharded.glob("model-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert content_digest(read(sharded)) != content_digest(read(tiny_llama))


def test_f14_integer_weight(llama):
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(
        llama / WEIGHTS,
        lambda tensors: tensors.update({name: torch.zeros(48, 32, dtype=torch.int32)}),
    )
    with pytest.raises(CheckpointError, match=rf"not floating point: {name}"):
        read(llama)


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "shard-00000-model-00001-of-00001.safetensors"]
)
def test_files_that_would_change_what_is_loaded_are_refused(llama, name):
    (llama / name).write_text("{}")
    with pytest.raises(CheckpointError, match=r"merge it into them|remove it"):
        read(llama)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", "32"),
        ("num_hidden_layers", 2.0),
        ("num_hidden_layers", True),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 0),
        ("num_key_value_heads", 3),
        ("hidden_size", "32"),
        ("intermediate_size", [48, -1]),
        ("vocab_size", 10**12),
        ("max_position_embeddings", 10**12),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_f17_sizes_out_of_bounds(llama, field, value, nested):
    edit_json(
        llama / "config.json",
        **({"text_config": {"num_attention_heads": 4, field: value}} if nested else {field: value}),
    )
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=rf"config\.json: {field} is"):
            read(llama)
        assert tracemalloc.get_traced_memory()[1] < SMALL
    finally:
        tracemalloc.stop()


def test_f17_heads_that_do_not_divide(llama, tiny_gpt2, tmp_path):
    edit_json(llama / "config.json", num_attention_heads=6, head_dim=None)
    with pytest.raises(
        CheckpointError, match="attention heads is 6, which does not divide the hidden size 32"
    ):
        read(llama)
    gpt2 = Path(shutil.copytree(tiny_gpt2, tmp_path / "gpt2"))
    edit_json(gpt2 / "config.json", n_head=5)
    with pytest.raises(CheckpointError, match="attention heads is 5"):
        read(gpt2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lama"}, "model_type is 'lama'"),
        ({"model_type": None}, "model_type is None"),
        ({"model_type": ["llama"]}, "model_type is"),
        ({"model_type": "t5"}, "not a causal language model"),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "trust_remote_code is False"),
        ({"transformers_weights": "other.safetensors"}, "'transformers_weights' is"),
        ({"attn_implementation": "org/kernel"}, "'attn_implementation' is"),
    ],
)
def test_f18_code_or_files_from_elsewhere(llama, changes, message, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("prompted"))
    edit_json(llama / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        read(llama)


WITH_INFINITY = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(dtype, float(value)) for dtype in WITH_INFINITY for value in ("nan", "inf", "-inf")]
    + [(torch.float8_e4m3fn, float("nan"))],
)
def test_f20_non_finite_weight(llama, dtype, value, monkeypatch):
    monkeypatch.setattr(folder_module, "BLOCK", 100)  # several blocks, the last one short
    name = "model.layers.1.mlp.down_proj.weight"

    def edit(tensors):
        weight = torch.full((32, 48), torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
        tensors[name] = weight.clone()
        tensors["model.norm.weight"] = weight[0].clone()

    edit_tensors(llama / WEIGHTS, edit)
    assert non_finite(read(llama)) == []

    def spoil(tensors):
        flat = tensors[name].double().flatten()
        flat[-1] = value
        tensors[name] = flat.view(32, 48).to(dtype)

    edit_tensors(llama / WEIGHTS, spoil)
    with pytest.raises(CheckpointError, match=rf"NaN or infinity in {name};"):
        check_finite(read(llama))


def test_quantised_models_are_refused_on_request(llama):
    refuse_quantised(read(llama))
    edit_json(llama / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(CheckpointError, match=r"already quantised or compressed \(gptq\)"):
        refuse_quantised(read(llama))
    edit_json(llama / "config.json", quantization_config="gptq")
    with pytest.raises(CheckpointError, match="quantization_config is not a JSON object"):
        read(llama)


def test_resolve_local_names(llama, monkeypatch):
    assert resolve(llama) == llama
    assert (resolve("reference") / "config.json").is_file()
    monkeypatch.chdir(llama.parent)
    assert resolve("llama") == Path("llama")
    with pytest.raises(ConfigError, match="is not a folder"):
        resolve(llama / "config.json")
    with pytest.raises(ConfigError, match="revision 'v2'"):
        resolve(llama, "v2")
    for name in ("/no/where", "./no", "a/b/c", "~/no-such-folder"):
        with pytest.raises(ConfigError, match="no such folder"):
            resolve(name)
    with pytest.raises(ConfigError, match="not a name on the hub"):
        resolve("no such model")


@pytest.mark.parametrize(
    "variables",
    [
        {"HF_HUB_OFFLINE": "1"},
        {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"},
    ],
)
def test_f36_no_network(variables, tmp_path):
    code = (
        "from compressor.files.model_folder import resolve\nfrom compressor.errors import "
        "CheckpointError\n"
        "try: resolve('organisation/model')\nexcept CheckpointError as error: print(error)"
    )
    environment = {key: value for key, value in os.environ.items() if "PROXY" not in key.upper()}
    environment |= {
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(Path(folder_module.__file__).parents[2]),
    } | variables
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert len(result.stdout.splitlines()) == 1, result.stderr
    for word in ("organisation/model", "HF_HUB_OFFLINE", "HF_TOKEN", "HTTPS_PROXY"):
        assert word in result.stdout


def test_f36_local_inputs_open_no_socket(llama, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    folder = read(resolve(llama))
    check_finite(folder)
    assert content_digest(folder)
