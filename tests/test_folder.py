import json
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from conftest import read_json, tiny_config, tiny_model
from safetensors.torch import load_file, save_file

from compressor import folder as folder_module
from compressor import shards
from compressor.errors import CheckpointError, ConfigError
from compressor.folder import check_finite, check_sizes, content_digest, non_finite, read, refuse_quantised, resolve

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SMALL = 5_000_000  # bytes of Python memory that reading headers of a tiny model may take


@pytest.fixture
def llama(tiny_llama, tmp_path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "llama"))


@pytest.fixture
def sharded(llama) -> Path:
    """The same model in several shards."""
    (llama / WEIGHTS).unlink()
    tiny_model("llama").save_pretrained(llama, max_shard_size="20KB")
    return llama


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(read_json(path) | changes))


def edit_tensors(path: Path, edit) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def repoint(folder: Path, target: str) -> None:
    """Let the first tensor of the index point to another file."""
    weight_map = read_json(folder / INDEX)["weight_map"]
    edit_json(folder / INDEX, weight_map=weight_map | {min(weight_map): target})


def test_reads_sizes_and_places_of_every_tensor(llama):
    folder = read(llama)
    tensors = load_file(llama / WEIGHTS)
    assert folder.tensors.keys() == tensors.keys()
    assert folder.files == (WEIGHTS,)
    assert folder.weight_bytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, info, data in folder_module.raw_bytes(folder):
        assert info.shape == tuple(tensors[name].shape)
        assert data.tobytes() == tensors[name].numpy().tobytes()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "mixtral", "gpt2", "opt", "gpt_neox"])
def test_sizes_of_every_architecture_are_accepted(kind):
    check_sizes(Path("config.json"), tiny_config(kind).to_dict())


def test_content_digest_ignores_sharding_and_sees_every_bit(tiny_llama, sharded):
    assert content_digest(read(sharded)) == content_digest(read(tiny_llama))
    shard = max(sharded.glob("model-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert content_digest(read(sharded)) != content_digest(read(tiny_llama))


@pytest.mark.parametrize("damage", ["truncated", "empty", "huge header", "no header"])
def test_f12_truncated_shard(sharded, damage):
    shard = min(sharded.glob("model-*.safetensors"))
    data = shard.read_bytes()
    content = {"truncated": data[:-1], "empty": b"", "huge header": struct.pack("<Q", 2**62) + data[8:], "no header": data[:20]}
    shard.write_bytes(content[damage])
    with pytest.raises(CheckpointError, match=shard.name):
        read(sharded)


def test_f14_missing_and_extra_tensors_are_named_up_to_ten(sharded):
    shard = max(sharded.glob("model-*.safetensors"), key=lambda path: len(shards.read_header(path)))
    name = min(load_file(shard))
    edit_tensors(shard, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=rf"{shard.name}: missing {name};"):
        read(sharded)
    edit_tensors(shard, lambda tensors: tensors.update({f"extra{i:02}": torch.zeros(1) for i in range(12)}, **{name: torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"not in the index: extra00, .*extra09 and 2 more"):
        read(sharded)


def test_f14_integer_weight(llama):
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(llama / WEIGHTS, lambda tensors: tensors.update({name: torch.zeros(48, 32, dtype=torch.int32)}))
    with pytest.raises(CheckpointError, match=rf"not floating point: {name}"):
        read(llama)


@pytest.mark.parametrize(
    "target", ["../outside.safetensors", "/outside.safetensors", "sub/outside.safetensors", "..", "model.bin", "a\0.safetensors", 7, None]
)
def test_f15_index_entry_that_is_no_plain_shard_name(sharded, target, monkeypatch):
    shutil.copy(min(sharded.glob("model-*.safetensors")), sharded.parent / "outside.safetensors")
    opened = []
    monkeypatch.setattr(shards, "read_header", lambda path: opened.append(path) or {})
    repoint(sharded, target)
    with pytest.raises(CheckpointError, match=r"index\.json: .* points to"):
        read(sharded)
    assert opened == []


def test_f15_missing_shard(sharded):
    shard = min(sharded.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard.name}: the file is missing"):
        read(sharded)


@pytest.mark.parametrize("name", ["shard", INDEX, "config.json"])
def test_f15_link_that_leads_out(sharded, name, monkeypatch):
    path = min(sharded.glob("model-*.safetensors")) if name == "shard" else sharded / name
    shutil.move(path, sharded.parent / "outside")
    path.symlink_to(sharded.parent / "outside")
    opened = []
    original = shards.read_header
    monkeypatch.setattr(shards, "read_header", lambda path: opened.append(path) or original(path))
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        read(sharded)
    assert path not in opened


def test_f15_special_file_is_not_opened(llama, monkeypatch):
    (llama / WEIGHTS).unlink()
    os.mkfifo(llama / WEIGHTS)
    monkeypatch.setattr(shards, "read_header", lambda path: pytest.fail("opened, which would wait for ever"))
    with pytest.raises(CheckpointError, match="expected a regular file"):
        read(llama)


def test_links_of_the_hub_cache_are_followed(llama, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "main", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in llama.iterdir():
        shutil.copy(path, blobs / f"sha-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/sha-{path.name}")
    assert read(snapshot).weight_bytes == read(llama).weight_bytes


def test_f15_same_tensor_twice(sharded):
    first, *_, last = sorted(sharded.glob("model-*.safetensors"))
    name = min(load_file(first))
    text = (sharded / INDEX).read_text()
    (sharded / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{name}": "{last.name}",'))
    with pytest.raises(CheckpointError, match=f"given twice: {name}"):
        read(sharded)
    (sharded / INDEX).write_text(text)
    edit_tensors(last, lambda tensors: tensors.update({name: torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=f"{last.name}: not in the index: {name}"):
        read(sharded)


def test_two_sets_of_weights_are_refused(sharded, tiny_llama):
    shutil.copy(tiny_llama / WEIGHTS, sharded / WEIGHTS)
    with pytest.raises(CheckpointError, match="remove the set that is out of date"):
        read(sharded)


@pytest.mark.parametrize("name", ["adapter_config.json", "shard-00000-model-00001-of-00001.safetensors"])
def test_files_that_would_change_what_is_loaded_are_refused(llama, name):
    (llama / name).write_text("{}")
    with pytest.raises(CheckpointError, match=r"merge it into them|remove it"):
        read(llama)


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_f16_cut_short(sharded, name):
    path = sharded / name
    path.write_text(path.read_text()[:-20])
    with pytest.raises(CheckpointError, match=rf"{name}:\d+:\d+: .*cut short"):
        read(sharded)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff{}", "byte 0 is not UTF-8"), (b"[]", "expected a JSON object"), (b"[" * 10**5, "too deeply|line|cut short")],
)
def test_f16_config_that_is_no_json_object(llama, content, message):
    (llama / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
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
    edit_json(llama / "config.json", **({"text_config": {"num_attention_heads": 4, field: value}} if nested else {field: value}))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=rf"config\.json: {field} is"):
            read(llama)
        assert tracemalloc.get_traced_memory()[1] < SMALL
    finally:
        tracemalloc.stop()


def test_f17_heads_that_do_not_divide(llama, tiny_gpt2, tmp_path):
    edit_json(llama / "config.json", num_attention_heads=6, head_dim=None)
    with pytest.raises(CheckpointError, match="attention heads is 6, which does not divide the hidden size 32"):
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


class Bomb:
    """Creates a file when unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("content", ["benign", "malicious"])
def test_f19_pickle(llama, content):
    from compressor.model import load

    marker = llama.parent / "ran"
    data = {"benign": {"weight": [0.0]}, "malicious": Bomb(marker)}[content]
    (llama / "pytorch_model.bin").write_bytes(pickle.dumps(data))
    load(read(llama).path)  # safetensors beside it are used
    (llama / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        read(llama)
    with pytest.raises(CheckpointError):
        load(llama)
    assert not marker.exists()


def test_folder_without_weights(llama):
    (llama / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=f"no {WEIGHTS} and no {INDEX}"):
        read(llama)


WITH_INFINITY = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(dtype, float(value)) for dtype in WITH_INFINITY for value in ("nan", "inf", "-inf")] + [(torch.float8_e4m3fn, float("nan"))],
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


@pytest.mark.parametrize("variables", [{"HF_HUB_OFFLINE": "1"}, {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}])
def test_f36_no_network(variables, tmp_path):
    code = (
        "from compressor.folder import resolve\nfrom compressor.errors import CheckpointError\n"
        "try: resolve('organisation/model')\nexcept CheckpointError as error: print(error)"
    )
    environment = {key: value for key, value in os.environ.items() if "PROXY" not in key.upper()}
    environment |= {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(Path(folder_module.__file__).parents[1])} | variables
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
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
