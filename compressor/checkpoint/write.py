"""Our checkpoint folders: write one from a model in memory, prove that it reloads bit for bit,
verify one found on disk.
"""

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compressor.checkpoint.weights import (
    fetch,
    stored_dtype,
    stored_tensors,
    tied_names,
    write_weights,
)
from compressor.errors import CheckpointError
from compressor.files.documents import naming, some
from compressor.files.safetensors import inside
from compressor.hf import FORMAT_VERSION, QUANT_METHOD
from compressor.linears import CompressedLinear
from compressor.models.load import load
from compressor.runtime.progress import Progress, silent

# Files that go with a model and are copied as they are: rewriting a tokenizer or generation
# settings can change or refuse them.
GENERATION = ("generation_config.json",)
TOKENIZER = (
    "tokenizer*.json",
    "*.model",
    "*.tiktoken",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
)
LICENCE = ("LICENSE*", "NOTICE*", "USE_POLICY*")


def write_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    source_folder: Path | None,
    shard_size: int,
    progress: Progress = silent,
) -> None:
    """Write weights, config.json, generation settings and tokenizer into an existing empty folder.

    Tokenizer, generation settings and licence come from `source_folder` as they are; what it lacks
    is written from the objects.

    Args:
        shard_size: bytes of a file at most.

    Raises:
        CheckpointError: a file could not be written; the message names it.
    """
    write_config(folder, model)
    write_weights(folder, model, shard_size, progress=progress)
    write_other_files(folder, model, tokenizer, source_folder)


def write_config(
    folder: Path, model: PreTrainedModel, quantization: dict[str, Any] | None = None
) -> None:
    """Write config.json: the model's own, with the stored dtype, the specs of compressed linears,
    and ties only where they hold.

    quantization: what it says in place of those specs, for a layout that is not ours.
    """
    config = copy.deepcopy(model.config)
    config.dtype = stored_dtype(stored_tensors(model).values())
    config.architectures = [type(model).__name__]
    specs = {
        name: module.spec()
        for name, module in model.named_modules()
        if isinstance(module, CompressedLinear)
    }
    if quantization:
        config.quantization_config = quantization
    elif specs:
        config.quantization_config = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "linears": specs,
        }
    elif hasattr(config, "quantization_config"):
        del config.quantization_config
    if model.all_tied_weights_keys and not tied_names(model):
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    with naming(folder / "config.json"):
        config.save_pretrained(folder)


def write_other_files(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    source_folder: Path | None,
) -> None:
    """Copy generation settings, tokenizer and licence, or save them from the objects where there is
    no source for them.
    """
    if not copy_files(source_folder, folder, GENERATION) and model.can_generate():
        with naming(folder / GENERATION[0]):
            model.generation_config.save_pretrained(folder)
    vocabulary = () if tokenizer is None else tuple(tokenizer.vocab_files_names.values())
    if not copy_files(source_folder, folder, TOKENIZER + vocabulary) and tokenizer is not None:
        with naming(folder / "tokenizer.json"):
            tokenizer.save_pretrained(folder)
    copy_files(source_folder, folder, LICENCE)


def copy_files(source: Path | None, folder: Path, patterns: tuple[str, ...]) -> bool:
    """Copy the files that match, byte for byte with default permissions, and say whether there were
    any.
    """
    if source is None:
        return False
    names = {
        path.relative_to(source).as_posix() for pattern in patterns for path in source.glob(pattern)
    }
    for name in sorted(names):
        target = folder / name
        with naming(target):
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(inside(source, name), target)
    return bool(names)


def compare_reload(folder: Path, model: PreTrainedModel, progress: Progress = silent) -> None:
    """Load the folder as any user would and compare every tensor bit for bit.

    Raises:
        CheckpointError: some differ; the message names them.
    """
    reloaded, _ = load(folder)
    expected, read = stored_tensors(model), stored_tensors(reloaded)
    if expected.keys() != read.keys():
        raise CheckpointError(
            f"{folder}: reload gives other tensors than were written: "
            f"{some(expected.keys() ^ read.keys())}"
        )
    different = [
        name
        for name in progress(expected, "compare with what was written")
        if not has_same_bits(fetch(model, name, expected[name]), fetch(reloaded, name, read[name]))
    ]
    if different:
        raise CheckpointError(
            f"{folder}: reload differs from what was written in {some(different)}"
        )


def has_same_bits(one: Tensor, other: Tensor) -> bool:
    """Say whether dtype, shape and every bit agree; unlike `torch.equal`, NaN equals itself and 0
    differs from −0.
    """
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
