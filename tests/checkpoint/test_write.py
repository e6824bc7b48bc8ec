import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import RANK, compress, contents, logits, store
from support.models import read_json, save_tiny, tiny_tokenizer
from support.sameness import assert_same_output, assert_same_tensors
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from compressor.checkpoint.verify import verify
from compressor.checkpoint.weights import tied_names
from compressor.checkpoint.write import compare_reload
from compressor.errors import CheckpointError
from compressor.files import manifest
from compressor.files.model_folder import read, refuse_quantised
from compressor.linears import CompressedLinear, LowRank
from compressor.models.load import load


def edit_tensors(folder: Path, name: str, edit) -> None:
    """Change the shard that holds `name`, and give index and manifest what they then should say."""
    info = read(folder).tensors[name]
    tensors = load_file(folder / info.file)
    edit(tensors)
    save_file(tensors, folder / info.file, metadata={"format": "pt"})
    weight_map = {}
    for path in folder.glob("*.safetensors"):
        weight_map |= dict.fromkeys(load_file(path), path.name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (folder / "manifest.json").write_text(manifest.build(folder))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reload_stores_the_same_and_computes_the_same(tmp_path, kind, dtype):
    source = save_tiny(tmp_path / kind, kind, dtype=dtype)
    model = compress(load(source)[0])
    output = store(tmp_path / "out", model, source)
    reloaded = AutoModelForCausalLM.from_pretrained(output)
    assert_same_output(logits(reloaded), logits(model))
    assert verify(output) == []
    assert read_json(output / "config.json")["dtype"] == dtype
    stored = {
        info.dtype for name, info in read(output).tensors.items() if not name.endswith("pivots")
    }
    assert stored == {{"float32": "F32", "bfloat16": "BF16"}[dtype]}


def test_files_written(written, tiny_llama):
    names = contents(written).keys()
    shards = {name for name in names if name.endswith(".safetensors")}
    assert len(shards) == 4
    assert names - shards == {
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (written / name).read_bytes() == (tiny_llama / name).read_bytes()


def test_same_inputs_give_the_same_bytes(written, tiny_llama, tmp_path):
    again = store(tmp_path / "again", compress(load(tiny_llama)[0]), tiny_llama, 20_000)
    assert contents(again) == contents(written)


def test_saving_a_loaded_checkpoint_again_gives_the_same_bytes(written, tmp_path):
    again = store(tmp_path / "again", load(written)[0], written, 20_000)
    assert contents(again) == contents(written)


def test_permissions_follow_the_umask(tiny_llama, tmp_path):
    former = os.umask(0o027)
    try:
        output = store(tmp_path / "out", load(tiny_llama)[0], tiny_llama, 20_000)
    finally:
        os.umask(former)
    assert {oct(path.stat().st_mode & 0o777) for path in output.iterdir()} == {oct(0o640)}


def test_without_source_the_objects_are_saved(tiny_llama, tmp_path):
    output = store(tmp_path / "out", load(tiny_llama)[0], None, tokenizer=tiny_tokenizer())
    assert AutoTokenizer.from_pretrained(output).encode("w5 w6") == [5, 6]
    assert (output / "generation_config.json").exists()


def test_companions_are_copied_but_no_code_and_nothing_from_outside(tiny_llama, tmp_path):
    source = Path(shutil.copytree(tiny_llama, tmp_path / "source"))
    (source / "additional_chat_templates").mkdir()
    wanted = {
        "chat_template.jinja": "{{ a }}",
        "additional_chat_templates/tool.jinja": "{{ b }}",
        "LICENSE.txt": "free",
    }
    wanted["generation_config.json"] = (
        '{"do_sample": false, "temperature": 0.5}'  # which transformers would not write
    )
    refused = {
        "tokenizer_code.py": "boom",
        "pytorch_model.bin": "boom",
        "model.safetensors.index.json.bak": "old",
        "README.md": "theirs",
    }
    for name, text in (wanted | refused).items():
        (source / name).write_text(text)
    output = store(tmp_path / "out", load(tiny_llama)[0], source)
    assert {name: (output / name).read_text() for name in wanted} == wanted
    assert not any((output / name).exists() for name in refused)
    (tmp_path / "secret").write_text("secret")
    (source / "vocab.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="leads out"):
        store(tmp_path / "out2", load(tiny_llama)[0], source)


def test_model_and_its_config_are_not_changed(tiny_llama, tmp_path):
    model = compress(load(tiny_llama)[0])
    before, tensors = (
        model.config.to_dict(),
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
    )
    store(tmp_path / "out", model, tiny_llama)
    assert model.config.to_dict() == before
    assert_same_tensors(model.state_dict(), tensors)


def test_compare_reload_sees_one_bit(damaged):
    model, _ = load(damaged)
    compare_reload(damaged, model)
    with torch.no_grad():
        model.model.norm.weight[3] = -0.0
    edit_tensors(
        damaged,
        "model.norm.weight",
        lambda tensors: tensors["model.norm.weight"].__setitem__(3, 0.0),
    )
    with pytest.raises(
        CheckpointError, match=r"differs from what was written in model\.norm\.weight$"
    ):
        compare_reload(damaged, model)


UP = "model.layers.0.self_attn.q_proj.up"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(UP), f"{UP} is missing"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "extra belongs to nothing"),
        (
            lambda tensors: tensors.update({UP: torch.zeros(RANK, 32)}),
            rf"{UP} is F32 \[5, 32\], expected F32 \[32, 5\]",
        ),
        (
            lambda tensors: tensors.update({UP: torch.zeros(32, RANK).half()}),
            rf"{UP} is F16 \[32, 5\], expected F32",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_specs_are_named(damaged, edit, message):
    edit_tensors(damaged, UP, edit)
    (problem,) = verify(damaged)
    assert re.search(message, problem)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "missing model.norm.weight"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "unexpected extra"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(31)}),
            r"model.norm.weight is \[31\], not \[32\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_a_dense_model_are_named(tiny_llama, tmp_path, edit, message):
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "llama"))
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load(read(folder).path)


def test_non_finite_tensor_is_named(damaged):
    edit_tensors(damaged, UP, lambda tensors: tensors[UP].__setitem__((0, 0), float("nan")))
    assert verify(damaged) == [f"{damaged}: {UP} holds NaN or infinity"]


def test_tied_embeddings_are_stored_once_and_stay_tied(tmp_path):
    source = save_tiny(tmp_path / "tied", "llama", tie_word_embeddings=True)
    model = compress(load(source)[0])
    output = store(tmp_path / "out", model, source)
    assert "lm_head.weight" not in read(output).tensors
    reloaded, _ = load(output)
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert_same_tensors(reloaded.state_dict(), model.state_dict())
    assert_same_output(logits(reloaded), logits(model))
    assert verify(output) == []


def test_compressed_head_of_tied_embeddings_is_untied(tmp_path):
    source = save_tiny(tmp_path / "tied", "llama", tie_word_embeddings=True)
    model = compress(load(source)[0], names=("lm_head",))
    output = store(tmp_path / "out", model, source)
    assert tied_names(model) == {}
    assert read_json(output / "config.json")["tie_word_embeddings"] is False
    reloaded, _ = load(output)
    assert isinstance(reloaded.lm_head, LowRank)
    assert_same_tensors(reloaded.state_dict(), model.state_dict())
    assert_same_output(logits(reloaded), logits(model))
    assert verify(output) == []


def test_other_ties_are_stored_twice_once_a_tied_linear_is_compressed(tmp_path):
    source = save_tiny(tmp_path / "tied", "llama", tie_word_embeddings=True)
    model, _ = load(source)
    first, second = (f"model.layers.{block}.mlp.up_proj" for block in (0, 1))
    model.get_submodule(second).weight = model.get_submodule(first).weight
    model.all_tied_weights_keys[f"{second}.weight"] = f"{first}.weight"
    assert tied_names(model) == {
        "lm_head.weight": "model.embed_tokens.weight",
        f"{second}.weight": f"{first}.weight",
    }
    model = compress(model, every=1000, names=("lm_head",))
    output = store(tmp_path / "out", model, source)
    assert {f"{first}.weight", f"{second}.weight"} <= read(output).tensors.keys()
    assert verify(output) == []


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2", {}),
        ("llama", {"num_hidden_layers": 1, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"intermediate_size": 37, "vocab_size": 41, "hidden_size": 36, "head_dim": 10}),
        ("gpt2", {"n_layer": 1}),
    ],
)
def test_biases_one_layer_and_odd_widths_survive(tmp_path, kind, changes):
    source = save_tiny(tmp_path / kind, kind, **changes)
    model = compress(load(source)[0])
    output = store(tmp_path / "out", model, source)
    assert_same_output(logits(load(output)[0]), logits(model))
    assert verify(output) == []


def test_plain_transformers_stops_loudly(written, without_plugin):
    with pytest.raises(RuntimeError, match=r"mismatch|size"):
        AutoModelForCausalLM.from_pretrained(written)


def test_compressed_checkpoint_is_refused_as_an_input(written):
    with pytest.raises(CheckpointError, match=r"already quantised or compressed \(compressor\)"):
        refuse_quantised(read(written))


def test_specs_describe_the_compressed_linears_and_nothing_else(written):
    model, _ = load(written)
    specs = {
        name: module.spec()
        for name, module in model.named_modules()
        if isinstance(module, CompressedLinear)
    }
    quantization = read_json(written / "config.json")["quantization_config"]
    assert quantization == {"quant_method": "compressor", "format_version": 1, "linears": specs}
    assert len(specs) == 7


def test_dense_model_is_written_without_quantization_config(tiny_gpt2, tmp_path, without_plugin):
    output = store(tmp_path / "out", load(tiny_gpt2)[0], tiny_gpt2)
    assert "quantization_config" not in read_json(output / "config.json")
    assert isinstance(
        AutoModelForCausalLM.from_pretrained(output).transformer.h[0].mlp.c_fc, Conv1D
    )
    assert verify(output) == []
