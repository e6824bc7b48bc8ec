"""The checkpoint format read by plain transformers: hand-made low-rank modules in tiny models,
against everything that loads them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models import read_json, tiny_model
from support.modules import (
    TARGETS,
    compress_in_place,
    compressed,
    loaded,
    logits,
    low_rank_like,
    save_compressed,
    tokens,
)
from support.sameness import assert_same_output, assert_same_tensors
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import AutoHfQuantizer

import compressor.hf
from compressor.errors import CheckpointError
from compressor.linears import LowRank

ROOT = Path(__file__).parent.parent
KINDS = list(TARGETS)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Per architecture: a compressed folder with tokenizer, and the logits of the model in memory.
    Read only.
    """
    made = {}
    for kind in KINDS:
        folder = save_compressed(tmp_path_factory.mktemp("compressed") / kind, kind)
        made[kind] = (folder, logits(compressed(kind)))
    return made


FRESH = """
import importlib, json, sys, torch
from transformers import AutoModelForCausalLM
from transformers.quantizers import AutoQuantizationConfig

def attempt(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"

folders, results = sys.argv[1:], {}
for folder in folders:
    spec = json.load(open(f"{folder}/config.json"))["quantization_config"]
    load = lambda: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    results[folder] = [attempt(load), attempt(lambda: AutoQuantizationConfig.from_dict(spec))]
import compressor.hf
importlib.reload(compressor.hf)
for folder in folders:
    tokens = torch.load(f"{folder}/tokens.pt")
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)(input_ids=tokens, use_cache=False).logits
    torch.save(logits, f"{folder}/found.pt")
print(json.dumps(results))
"""


def test_fresh_process_refuses_without_the_import_and_agrees_with_it(tmp_path):
    folders = {}
    for kind in KINDS:
        for pivoted in (False, True):
            model, folder = tiny_model(kind), tmp_path / f"{kind}-{pivoted}"
            name = next(iter(TARGETS[kind]))
            compress_in_place(model, {name: low_rank_like(model.get_submodule(name), 5, pivoted)})
            model.save_pretrained(folder)
            torch.save(tokens(), folder / "tokens.pt")
            torch.save(logits(model), folder / "logits.pt")
            folders[str(folder)] = name
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", FRESH, *folders]
    run = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    for folder, (plain, lm_eval) in json.loads(run.stdout).items():
        assert plain.startswith("RuntimeError") and "ignore_mismatched_sizes" in plain
        assert lm_eval.startswith("ValueError: Unknown quantization type, got compressor")
        assert_same_output(*(torch.load(f"{folder}/{name}.pt") for name in ("found", "logits")))
        assert "MISMATCH" in run.stderr and "weight" in run.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_listed_modules_are_rebuilt_and_trainable(kind, checkpoints):
    folder, expected = checkpoints[kind]
    model = loaded(folder)
    assert_same_output(logits(model), expected)
    kinds = {
        name: module.pivots is not None
        for name, module in model.named_modules()
        if isinstance(module, LowRank)
    }
    assert kinds == {name: pivoted for name, (_, pivoted) in TARGETS[kind].items()}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.hf_quantizer.is_serializable() and model.hf_quantizer.is_trainable


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_override_casts_factors_and_keeps_pivots(kind, dtype, checkpoints):
    folder, _ = checkpoints[kind]
    reference, model = stored(folder), loaded(folder, dtype=dtype)
    state = model.state_dict()
    for name, tensor in reference.items():
        assert torch.equal(state[name], tensor if name.endswith(".pivots") else tensor.to(dtype)), (
            name
        )
    assert {tensor.dtype for name, tensor in state.items() if name.endswith(".pivots")} == {
        torch.uint8
    }
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_device_map_auto(kind, checkpoints, tmp_path):
    folder, expected = checkpoints[kind]
    assert_same_output(logits(loaded(folder, device_map="auto").cpu()), expected)
    model = loaded(folder, device_map="auto", max_memory={"cpu": 60_000}, offload_folder=tmp_path)
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert_same_output(logits(model), expected)


@pytest.mark.parametrize("buffers", [False, True], ids=["parameters", "parameters and buffers"])
@pytest.mark.parametrize("kind", KINDS)
def test_disk_offload(kind, buffers, checkpoints, tmp_path):
    folder, expected = checkpoints[kind]
    placement = {
        "llama": {
            "model.embed_tokens": "cpu",
            "model.rotary_emb": "cpu",
            "model.layers": "disk",
            "model.norm": "cpu",
            "lm_head": "cpu",
        },
        "gpt2": {
            "transformer.wte": "cpu",
            "transformer.wpe": "cpu",
            "transformer.h": "disk",
            "transformer.ln_f": "cpu",
            "lm_head": "cpu",
        },
    }[kind]
    model = loaded(folder, device_map=placement, offload_folder=tmp_path, offload_buffers=buffers)
    assert all(model.get_submodule(name).weight.is_meta for name in TARGETS[kind])
    for _ in range(2):  # tensors come and go with every pass
        assert_same_output(logits(model), expected)
    model.save_pretrained(tmp_path / "again")
    assert_same_tensors(stored(tmp_path / "again"), stored(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_several_shards(kind, tmp_path):
    model = compressed(kind)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_same_output(logits(loaded(tmp_path)), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_saving_again_gives_identical_files(kind, checkpoints, tmp_path):
    folder, _ = checkpoints[kind]
    loaded(folder).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()
    assert read_json(tmp_path / "config.json") == read_json(folder / "config.json")


@pytest.mark.parametrize("kind", KINDS)
def test_tied_head_is_stored_once_and_stays_tied(kind, tmp_path):
    model = compressed(kind, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in stored(tmp_path)
    again = loaded(tmp_path)
    again.tie_weights()
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert_same_output(logits(again), logits(model))


@pytest.mark.parametrize("pivoted", [False, True])
def test_compressed_head_of_an_untied_model(pivoted, tmp_path):
    model = tiny_model("llama", tie_word_embeddings=False)
    compress_in_place(model, {"lm_head": low_rank_like(model.lm_head, 9, pivoted)})
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    again.tie_weights()  # lm-eval calls this on every model
    assert isinstance(again.lm_head, LowRank)
    assert_same_output(logits(again), logits(model))


def test_compressed_head_that_the_config_ties_is_refused(tmp_path):
    model = tiny_model("llama", tie_word_embeddings=False)
    compress_in_place(model, {"lm_head": low_rank_like(model.lm_head, 9, False)})
    model.config.tie_word_embeddings = True
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"lm_head: .*tie_word_embeddings false"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_generate_with_cache_continues_as_in_memory(kind, checkpoints):
    folder, _ = checkpoints[kind]
    prompt, settings = tokens(1, 1, 4), {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    steps = [
        torch.cat(model.generate(prompt, **settings).logits)
        for model in (loaded(folder), compressed(kind))
    ]
    assert_same_output(*steps)


def edited(config: dict, **changes) -> dict:
    return config | {"quantization_config": config["quantization_config"] | changes}


def damaged(config: dict, name: str | None = None, **changes) -> dict:
    """Change the spec of the first compressed linear, or rename it."""
    linears = dict(config["quantization_config"]["linears"])
    first = next(iter(linears))
    spec = linears.pop(first) | changes
    return edited(config, linears={name or first: spec} | linears)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda config: edited(config, format_version=2),
            "format version 2, this package reads up to 1: upgrade compressor",
        ),
        (lambda config: edited(config, format_version="1"), "format_version must be an integer"),
        (lambda config: edited(config, format_version=0), "format_version must be an integer"),
        (
            lambda config: edited(config, linears=["lm_head"]),
            "linears must map module names to specs",
        ),
        (lambda config: edited(config, dequantise=True), "unknown fields: dequantise"),
        (
            lambda config: damaged(config, kind="dictionary_of_dreams"),
            "storage kind 'dictionary_of_dreams' is unknown",
        ),
        (
            lambda config: damaged(config, name="model.layers.0.self_attn.x_proj"),
            "x_proj: .* no such module",
        ),
        (
            lambda config: damaged(config, name="model.embed_tokens"),
            "model.embed_tokens: .* Embedding, not a linear",
        ),
        (lambda config: damaged(config, in_features=31), r"q_proj: \(out, in\) of the spec"),
        (lambda config: damaged(config, rank=-1), "q_proj: damaged spec"),
        (lambda config: damaged(config, rank="5"), "q_proj: damaged spec"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_descriptions_are_refused(change, message, checkpoints):
    folder, _ = checkpoints["llama"]
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = change(read_json(folder / "config.json"))["quantization_config"]
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(folder, config=config)


def test_a_spec_may_add_a_bias_but_not_lose_one(checkpoints):
    config = AutoConfig.from_pretrained(checkpoints["gpt2"][0])
    config.quantization_config = damaged(
        {"quantization_config": config.quantization_config}, bias=False
    )["quantization_config"]
    with pytest.raises(CheckpointError, match="lacks the bias that the model has"):
        AutoModelForCausalLM.from_pretrained(checkpoints["gpt2"][0], config=config)


def test_a_spec_without_a_size_is_refused(checkpoints):
    config = AutoConfig.from_pretrained(checkpoints["llama"][0])
    del next(iter(config.quantization_config["linears"].values()))["rank"]
    with pytest.raises(CheckpointError, match=r"damaged spec .*KeyError 'rank'"):
        AutoModelForCausalLM.from_pretrained(checkpoints["llama"][0], config=config)


def test_registering_twice_changes_nothing():
    before = AutoHfQuantizer.from_config(
        {"quant_method": "compressor", "format_version": 1, "linears": {}}
    )
    compressor.hf.register()
    after = AutoHfQuantizer.from_config(
        {"quant_method": "compressor", "format_version": 1, "linears": {}}
    )
    assert type(before) is type(after) and type(after).__name__ == "CompressorQuantizer"


def test_dense_checkpoints_cannot_be_compressed_while_loading(tiny_llama):
    config = compressor.hf.CompressorConfig(linears={}, format_version=1)
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=config)
