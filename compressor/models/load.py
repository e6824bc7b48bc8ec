"""Models as this package sees them: load, find the decoder blocks and their linears, read a dense
weight, swap modules.

Everything is found by structure and by watching which tensor reaches which linear; no model name
appears.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from compressor.errors import CheckpointError
from compressor.files.model_folder import read, read_headers, resolve
from compressor.models.linears import LISTED
from compressor.models.quiet import quiet_transformers

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load(
    name: str | Path, device: str = "cpu", device_map: Any = None, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a model, dense or compressed, and its tokenizer if the folder has one. Code in the
    folder never runs.

    name: as in `folder.resolve`; dtype None keeps the stored one. Raises CheckpointError for a
    damaged folder and for tensors that are missing, unexpected or of another shape, by name.
    """
    folder = read(resolve(name)).path
    model = from_pretrained(folder, device, device_map, dtype)
    tokenizer = None
    if any((folder / file).exists() for file in TOKENIZER_FILES):
        with quiet_transformers(), _refusing(folder):
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
    return model, tokenizer


def from_pretrained(
    folder: Path, device: str = "cpu", device_map: Any = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Load a folder as transformers does, an adapter beside the model included. Raises
    CheckpointError for tensors that do not fit.
    """
    placement = (
        device_map
        if device_map is not None
        else None
        if torch.device(device).type == "cpu"
        else {"": device}
    )
    with quiet_transformers(), _refusing(folder):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto" if dtype is None else dtype,
            device_map=placement,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            # they are listed in `info`, and refused here with their names
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    model, info = loaded
    wrong = [f"missing {key}" for key in sorted(info["missing_keys"])]
    wrong += [f"unexpected {key}" for key in sorted(info["unexpected_keys"])]
    wrong += [
        f"{key} is {list(stored)}, not {list(shape)}"
        for key, stored, shape in sorted(info["mismatched_keys"])
    ]
    if wrong:
        more = f" and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        raise CheckpointError(
            f"{folder}: tensors do not fit the model of config.json: "
            f"{', '.join(wrong[:LISTED])}{more}"
        )
    return model


def skeleton(folder: Path) -> PreTrainedModel:
    """The dense architecture that config.json describes, on the meta device: no weights are read
    and none allocated.

    Raises CheckpointError for a damaged folder.
    """
    folder = read_headers(folder).path
    with quiet_transformers(), _refusing(folder), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        # Fused experts run through kernels that refuse float32 on the meta device, except the plain
        # loop.
        return AutoModelForCausalLM.from_config(
            config, trust_remote_code=False, experts_implementation="eager"
        ).eval()


@contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    """Turn what transformers and safetensors raise about a folder into one line that names it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        line = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), "no message"
        )
        raise CheckpointError(
            f"{folder}: cannot be loaded: {type(error).__name__}: {line}"
        ) from error
