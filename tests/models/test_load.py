"""Loading: dtype, tokenizer, refusals in one line, and linears that accelerate keeps on disk."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import read_json, tiny_model
from support.modules import compress_in_place, logits, low_rank_like
from support.sameness import assert_same_output
from transformers.utils import logging as transformers_logging

from compressor.errors import CheckpointError
from compressor.models.install import installed
from compressor.models.linears import dense_of, linears
from compressor.models.load import load, skeleton


def test_load_keeps_the_stored_dtype_and_finds_the_tokenizer(tiny_llama, tmp_path):
    model, tokenizer = load(tiny_llama)
    assert tokenizer("w5 w7")["input_ids"] == [5, 7]
    assert (model.dtype, model.training) == (torch.float32, False)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert load(tmp_path)[0].dtype == torch.bfloat16
    assert load(tmp_path, dtype=torch.float32)[0].dtype == torch.float32


def test_loading_prints_nothing_and_leaves_the_settings_of_transformers(tiny_llama, capfd):
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    linears(load(tiny_llama)[0])
    assert capfd.readouterr() == ("", "")
    assert (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    ) == before


def rewritten(source, folder, change, **config) -> object:
    """A copy of a model folder with other tensors and config entries."""
    folder.mkdir()
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(read_json(source / "config.json") | config))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), r"missing model\.norm\.weight$"),
        (
            lambda tensors: tensors.update({"model.extra.weight": torch.zeros(2)}),
            r"unexpected model\.extra\.weight$",
        ),
        (
            lambda tensors: tensors.update({"lm_head.weight": torch.zeros(9, 9)}),
            r"lm_head\.weight is \[9, 9\], not \[96, 32\]$",
        ),
        (
            lambda tensors: [
                tensors.pop(name) for name in list(tensors) if ".0." in name or ".1.mlp" in name
            ],
            r"missing .* and 2 more$",
        ),
    ],
    ids=["missing", "unexpected", "wrong shape", "many"],
)
def test_tensors_that_do_not_fit_are_refused_by_name(change, message, tiny_llama, tmp_path, capfd):
    with pytest.raises(CheckpointError, match=message) as caught:
        load(rewritten(tiny_llama, tmp_path / "damaged", change))
    assert str(caught.value).count("\n") == 0
    assert str(caught.value).count(", ") <= 9
    assert capfd.readouterr() == ("", "")  # not the table of transformers


def test_a_tensor_missing_from_a_compressed_folder_is_refused(tmp_path):
    model = tiny_model("llama")
    name = "model.layers.0.self_attn.q_proj"
    compress_in_place(model, {name: low_rank_like(model.get_submodule(name), 5, True)})
    model.save_pretrained(tmp_path / "good")
    folder = rewritten(
        tmp_path / "good", tmp_path / "bad", lambda tensors: tensors.pop(f"{name}.pivots")
    )
    with pytest.raises(
        CheckpointError, match=r"missing model\.layers\.0\.self_attn\.q_proj\.pivots$"
    ):
        load(folder)


def test_what_transformers_refuses_is_one_line(tiny_llama, tmp_path):
    folder = rewritten(
        tiny_llama, tmp_path / "bad", lambda tensors: None, hidden_act="no_such_function"
    )
    with pytest.raises(
        CheckpointError, match="bad: cannot be loaded: KeyError: 'no_such_function'"
    ):
        load(folder)
    with pytest.raises(
        CheckpointError, match="bad: cannot be loaded: KeyError: 'no_such_function'"
    ):
        skeleton(folder)


@pytest.fixture
def offloaded(tiny_llama):
    """The tiny Llama with its embedding and second block on disk."""
    placement = {
        "model.embed_tokens": "disk",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
    }
    return load(tiny_llama, device_map=placement | {"model.norm": "cpu", "lm_head": "cpu"})[0]


def test_offloaded_linears_are_found_and_read(offloaded, tiny_llama):
    plain = load(tiny_llama)[0]
    assert offloaded.model.layers[1].mlp.up_proj.weight.is_meta
    found, expected = linears(offloaded), linears(plain)
    assert [(info.name, info.feeds, info.role) for info in found.values()] == [
        (i.name, i.feeds, i.role) for i in expected.values()
    ]
    for name, info in found.items():
        assert torch.equal(
            dense_of(info, torch.float32).weight, dense_of(expected[name], torch.float32).weight
        )
    assert offloaded.model.layers[1].mlp.up_proj.weight.is_meta


def test_offloaded_linears_are_replaced_and_restored(offloaded, tiny_llama):
    plain, name = load(tiny_llama)[0], "model.layers.1.mlp.up_proj"
    module = low_rank_like(plain.get_submodule(name), 5, True)
    before = logits(offloaded)
    with installed(offloaded, {name: module}), installed(plain, {name: module}):
        assert_same_output(logits(offloaded), logits(plain))
    assert torch.equal(logits(offloaded), before)
