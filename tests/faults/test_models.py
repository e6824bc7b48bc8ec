"""Faults of the model folder that is read: damaged files, files from elsewhere, code, sizes that
cannot be, odd but good models.
"""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.folders import INDEX, WEIGHTS, Bomb, edit_json, edit_tensors, repoint
from support.models import VOCABULARY, save_tiny
from support.shell import bytes_of, compress, refused, run

import compressor
from compressor.files import safetensors
from compressor.pipeline import job

pytestmark = pytest.mark.faults
MEMORY = 20_000_000  # bytes that Python may allocate while it refuses a size


@pytest.fixture
def no(text_file, tmp_path):
    """Insist that a folder is refused by `compress` and by `plan`, with exit 1 and these words, and
    that nothing is written.
    """

    def check(model: Path, *words: object) -> None:
        refused(run(*compress(model, tmp_path / "never", text_file)), 1, *words)
        refused(run("plan", model), 1, *words)
        assert not (tmp_path / "never").exists()

    return check


def flipped(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_f12_broken_weight_files(sharded, no):
    """A safetensors file is cut short, empty, or has a header of 2^62 bytes: refused, the file
    named.
    """
    shard = min(sharded.glob("model-*.safetensors"))
    data = shard.read_bytes()
    for content in (data[:-1], data[:20], b"", struct.pack("<Q", 2**62) + data[8:]):
        shard.write_bytes(content)
        no(sharded, shard.name)


def test_f13_bit_flip(copy, tmp_path):
    """A bit of a stored weight has flipped: `verify` fails and names the file, and every verb that
    reads weights refuses it.
    """
    before = bytes_of(copy)
    flipped(copy / WEIGHTS, -1)
    result = run("verify", copy)
    assert result.exit_code == 1 and f"{WEIGHTS}: its bytes differ" in result.stdout
    for command in (("evaluate", copy), ("export", copy, tmp_path / "dense")):
        refused(run(*command), 1, WEIGHTS, "damaged or was edited")
    flipped(copy / WEIGHTS, -1)
    assert bytes_of(copy) == before and run("verify", copy).exit_code == 0


def test_f14_tensors_that_do_not_fit(model, sharded, no, text_file, tmp_path):
    """Tensors are missing, extra, of another shape or no floating numbers: refused with up to ten
    of their names.
    """
    shard = max(
        sharded.glob("model-*.safetensors"), key=lambda path: len(safetensors.read_header(path))
    )
    names = sorted(safetensors.read_header(shard))
    good = shard.read_bytes()
    edit_tensors(shard, lambda tensors: tensors.pop(names[0]))
    no(sharded, f"missing {names[0]}")
    edit_tensors(
        shard,
        lambda tensors: tensors.update(
            {f"extra{i:02}": torch.zeros(1) for i in range(12)} | {names[0]: torch.zeros(1)}
        ),
    )
    no(sharded, "extra00", "extra09 and 2 more")
    shard.write_bytes(good)
    edit_tensors(shard, lambda tensors: tensors.update({names[0]: torch.zeros(3, 3)}))
    refused(
        run(*compress(sharded, tmp_path / "never", text_file)), 1, f"{names[0]} is [3, 3], not ["
    )
    edit_tensors(
        shard, lambda tensors: tensors.update({names[0]: torch.zeros(3, 3, dtype=torch.int32)})
    )
    no(sharded, "not floating point", names[0])


def test_f15_index_that_leads_elsewhere(sharded, no, monkeypatch):
    """The index names a missing file, ../x, an absolute path, a link out or a tensor twice:
    refused, nothing outside is opened.
    """
    outside = Path(
        shutil.copy(
            min(sharded.glob("model-*.safetensors")), sharded.parent / "outside.safetensors"
        )
    )
    opened, original = [], safetensors.read_header
    monkeypatch.setattr(
        safetensors, "read_header", lambda path: opened.append(path.resolve()) or original(path)
    )
    good = (sharded / INDEX).read_text()
    for target in (
        "../outside.safetensors",
        str(outside),
        "sub/x.safetensors",
        "a\0.safetensors",
        7,
    ):
        repoint(sharded, target)
        no(sharded, INDEX, "points to")
    repoint(sharded, "missing.safetensors")
    no(sharded, "missing.safetensors: the file is missing")
    (sharded / "link.safetensors").symlink_to(outside)
    repoint(sharded, "link.safetensors")
    no(sharded, "leads out of the folder")
    first = min(json.loads(good)["weight_map"])
    (sharded / INDEX).write_text(
        good.replace('"weight_map": {', f'"weight_map": {{"{first}": "x.safetensors",')
    )
    no(sharded, f"given twice: {first}")
    assert outside not in opened


def test_f16_files_cut_short(sharded, no):
    """config.json or the index is cut short: refused with file and position."""
    for name in (INDEX, "config.json"):
        path = sharded / name
        good = path.read_text()
        for length in (0, 1, len(good) // 2, len(good) - 20):
            path.write_text(good[:length])
            no(sharded, f"{name}:", "cut short")
        path.write_text(good)


def test_f17_sizes_that_cannot_be(model, no, text_file):
    """Layers −1, 0, 10^9 or "32", heads 0 or not dividing, a vocabulary of 10^12: refused with the
    field, before memory is taken.
    """
    cases = [("num_hidden_layers", value) for value in (-1, 0, 10**9, "32")]
    cases += [
        ("num_attention_heads", 0),
        ("num_key_value_heads", 3),
        ("vocab_size", 10**12),
        ("hidden_size", 2.5),
    ]
    good = (model / "config.json").read_text()
    tracemalloc.start()
    try:
        for field, value in cases:
            edit_json(model / "config.json", **{field: value})
            no(model, f"config.json: {field} is {value!r}")
            (model / "config.json").write_text(good)
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


def test_f18_unknown_types_and_code(model, no, monkeypatch):
    """The model type is unknown, or config.json asks for code of its own: refused, nobody is asked,
    nothing runs.
    """
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("prompted"))
    (model / "evil.py").write_text(f"open({str(model / 'ran')!r}, 'w')")
    edit_json(model / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    no(model, "auto_map", "trust_remote_code is False")
    edit_json(model / "config.json", auto_map=None, model_type="lama")
    text = (
        (model / "config.json")
        .read_text()
        .replace('"auto_map": null, ', "")
        .replace(', "auto_map": null', "")
    )
    (model / "config.json").write_text(text)
    no(model, "model_type is 'lama'")
    assert not (model / "ran").exists()


def test_f19_pickles(model, no):
    """The weights are a pickle, benign or not: refused, and nothing in it runs."""
    marker = model.parent / "ran"
    (model / WEIGHTS).unlink()
    for content in ({"weight": [0.0]}, Bomb(marker)):
        (model / "pytorch_model.bin").write_bytes(pickle.dumps(content))
        no(model, "pytorch_model.bin", "can run code")
    assert not marker.exists()


def test_f20_weights_that_are_not_finite(model, text_file, tmp_path, monkeypatch):
    """A weight holds NaN or infinity: refused before calibration, the tensor named."""
    monkeypatch.setattr(job, "start", lambda *_: pytest.fail("calibration began"))
    name = "model.layers.1.mlp.down_proj.weight"
    for value in ("nan", "inf", "-inf"):
        edit_tensors(
            model / WEIGHTS,
            lambda tensors, value=value: tensors[name].view(-1)[5].fill_(float(value)),
        )
        refused(
            run(*compress(model, tmp_path / "never", text_file)), 1, f"NaN or infinity in {name}"
        )
    assert run("verify", model).exit_code == 1


def test_f28_models_of_odd_build(tmp_path):
    """Tied embeddings, biases, a single layer, odd widths: the checkpoint reloads with equal
    tensors and the tie is kept.
    """
    windows = torch.randint(3, VOCABULARY, (12, 32), generator=torch.Generator().manual_seed(0))
    save_file(
        {"windows": windows}, tmp_path / "tokens.safetensors"
    )  # whatever tokenizer transformers takes for these kinds
    text = f"{tmp_path / 'tokens.safetensors'}:windows"
    odd = {"tie_word_embeddings": True, "intermediate_size": 43, "num_hidden_layers": 1}
    for kind, changes in {
        "qwen2": odd,
        "qwen3": odd,
        "gpt2": {"n_layer": 1, "n_inner": 41},
    }.items():
        source = save_tiny(tmp_path / kind, kind, **changes)
        output = tmp_path / f"{kind}-out"
        assert (
            run(*compress(source, output, text, allocation__keep=0.7)).exit_code == 0
        )  # it compares every bit after a reload
        assert run("verify", output).exit_code == 0
        model, _ = compressor.load(output)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert "lm_head.weight" not in safetensors.read_tensors(output)


def test_f35_opened_without_the_plugin(checkpoint):
    """Plain transformers opens a compressed checkpoint without `import compressor.hf`: a loud
    error, never random layers.
    """
    code = (
        "from transformers import AutoModelForCausalLM as M; "
        f"print(M.from_pretrained({str(checkpoint)!r}))"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=checkpoint,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "Error" in done.stderr.splitlines()[-1]
    assert done.stdout == ""
