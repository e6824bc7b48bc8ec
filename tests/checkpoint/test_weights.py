import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import WHOLE, compress, contents, store
from support.models import read_json, save_tiny
from torch import nn
from transformers import AutoModelForCausalLM

from compressor.checkpoint.weights import stored_tensors, write_weights
from compressor.errors import CheckpointError
from compressor.files.model_folder import read
from compressor.files.safetensors import read_header
from compressor.models.load import load


def test_shards_stay_within_their_size_and_hold_what_the_index_says(tiny_llama, tmp_path):
    model, _ = load(tiny_llama)
    for size in (20_000, 30_000, (tiny_llama / "model.safetensors").stat().st_size - 1, 100_000):
        folder = tmp_path / str(size)
        folder.mkdir()
        write_weights(folder, model, size)
        files = sorted(folder.glob("*.safetensors"))
        assert all(file.stat().st_size <= size for file in files)
        assert (folder / "model.safetensors.index.json").exists() == (len(files) > 1)
        found = {}
        for file in files:
            found |= load_file(file)
        assert found.keys() == stored_tensors(model).keys()
        assert all(
            torch.equal(tensor, found[name]) for name, tensor in stored_tensors(model).items()
        )
    lone = tmp_path / "lone"
    lone.mkdir()
    write_weights(lone, model, 1)  # nothing fits: one tensor a file
    assert len(list(lone.glob("*.safetensors"))) == len(stored_tensors(model))


def test_tensors_of_every_dtype_and_shape_are_read_by_safetensors(tmp_path, tiny_llama):
    dtypes = (
        torch.float64,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.int64,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
    tensors = {f"t{number}": torch.arange(7).to(dtype) for number, dtype in enumerate(dtypes)}
    tensors |= {
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "transposed": torch.arange(6.0).view(2, 3).T,
    }
    write_weights(tmp_path, load(tiny_llama)[0], WHOLE, tensors)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].double(), tensor.double())
    header = read_header(tmp_path / "model.safetensors")
    assert all(
        header[name].start % tensor.element_size() == 0 for name, tensor in tensors.items()
    )  # aligned
    with pytest.raises(CheckpointError, match="complex64 cannot be stored"):
        write_weights(
            tmp_path, load(tiny_llama)[0], WHOLE, {"c": torch.zeros(1, dtype=torch.complex64)}
        )


def test_offloaded_model_gives_the_same_bytes(tiny_llama, tmp_path):
    model = compress(load(tiny_llama)[0])
    plain = store(tmp_path / "plain", model, tiny_llama)
    places = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "disk",
        "lm_head": "cpu",
    }
    places |= {"model.rotary_emb": "cpu"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        plain, device_map=places, offload_folder=tmp_path / "offload"
    )
    assert any(tensor.is_meta for tensor in stored_tensors(offloaded).values())
    assert contents(store(tmp_path / "out", offloaded, tiny_llama)) == contents(plain)


def test_head_untied_by_hand_is_stored(tmp_path):
    model, _ = load(save_tiny(tmp_path / "tied", "llama", tie_word_embeddings=True))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    output = store(tmp_path / "out", model, None)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= read(output).tensors.keys()
    assert read_json(output / "config.json")["tie_word_embeddings"] is False
