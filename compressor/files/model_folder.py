"""A model folder before it becomes a model: find it, read config.json and the tensor headers, and
refuse what is damaged or unsafe.

No torch and no allocation: sizes in config.json are checked before anything is built from them,
weights are mapped, never loaded.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from compressor.errors import CheckpointError, ConfigError
from compressor.files import manifest
from compressor.files.bundled import bundled_folder
from compressor.files.documents import read_json, some
from compressor.files.safetensors import TensorInfo, inside, read_tensors
from compressor.runtime.progress import Progress, silent

REFERENCE = "reference"
DOWNLOADED = [
    "*.safetensors",
    "*.json",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.tiktoken",
]  # never pickles, never code

# Largest accepted value of each size in config.json, by the names that architectures give it; far
# above any model there is.
LIMITS = {
    10_000: ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    100_000: (
        "num_attention_heads",
        "n_head",
        "n_heads",
        "num_heads",
        "num_key_value_heads",
        "num_kv_heads",
    ),
    2**24: (
        "hidden_size",
        "n_embd",
        "d_model",
        "intermediate_size",
        "n_inner",
        "ffn_dim",
        "head_dim",
        "vocab_size",
    ),
    2**30: ("max_position_embeddings", "n_positions"),
}
# Bits that are all set exactly in NaN and infinity, and the unsigned type to look at them.
EXPONENTS = {
    "F64": ("<u8", 0x7FF0000000000000),
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E5M2": ("u1", 0x7C),
    "F8_E4M3": ("u1", 0x7F),  # has no infinity; all bits set is NaN
}
BLOCK = 2**24  # numbers looked at together


@dataclass(frozen=True)
class ModelFolder:
    """What a folder holds, from its headers: nothing of it is in memory."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the weight files."""
        return tuple(sorted({tensor.file for tensor in self.tensors.values()}))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all stored tensors, file headers apart."""
        return sum(tensor.bytes for tensor in self.tensors.values())

    @property
    def quantization(self) -> dict[str, Any]:
        """The quantization_config of config.json, empty for a dense model."""
        return self.config.get("quantization_config") or {}


def resolve(name: str | Path, revision: str | None = None) -> Path:
    """Return the folder of a model: `reference`, a local folder, or a hub id (downloaded, or taken
    from the cache).

    A local folder never opens a socket. Raises ConfigError if there is no such model,
    CheckpointError if the hub cannot be reached.
    """
    if str(name) == REFERENCE:
        return bundled_folder(REFERENCE)
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ConfigError(
                f"{name}: is a local folder, which has no revision '{revision}'; leave "
                "model.revision out"
            )
        return path
    if path.is_symlink() or path.exists():
        raise ConfigError(f"{name}: is not a folder; give the folder that holds config.json")
    if path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
        raise ConfigError(f"{name}: there is no such folder")
    return download(str(name), revision)


def download(name: str, revision: str | None) -> Path:
    """Fetch safetensors, configuration and tokenizer of a hub model into the cache of
    huggingface_hub; return the folder.

    Raises ConfigError if the name or revision is wrong, CheckpointError naming the variables that
    matter if the hub is out of reach.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    missing = f"'{name}' is not a folder here"
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=DOWNLOADED,
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except HFValidationError:
        raise ConfigError(f"{missing} and not a name on the hub (organisation/model)") from None
    except RevisionNotFoundError:
        raise ConfigError(f"'{name}' has no revision '{revision}' on the hub") from None
    except RepositoryNotFoundError:
        raise ConfigError(
            f"{missing}, and the hub has no such model or keeps it private; set HF_TOKEN if you "
            "have access"
        ) from None
    except (OSError, HTTPError) as error:
        raise CheckpointError(
            f"{missing} and not in the local cache, and it could not be downloaded "
            f"({type(error).__name__}); check the network and "
            "HTTPS_PROXY, HF_HUB_OFFLINE (must not be 1), HF_TOKEN (for private models), or give "
            "a local folder"
        ) from error


def read(path: Path, progress: Progress = silent) -> ModelFolder:
    """Read a folder as `read_headers` does; if it has a manifest, compare every byte with it,
    documents such as README.md apart.

    Raises CheckpointError naming the files that changed.
    """
    folder = read_headers(path)
    entries = manifest.read(path) or {}
    files = {name: entry for name, entry in entries.items() if name not in manifest.DOCUMENTS}
    changed = manifest.problems(path, files, progress) if files else []
    if changed:
        raise CheckpointError("; ".join(changed[:3]) + "; the folder is damaged or was edited")
    return folder


def read_headers(path: Path) -> ModelFolder:
    """Read config.json and all tensor headers. Raises CheckpointError naming file, field or tensor
    for whatever is damaged or unsafe.
    """
    if (path / "adapter_config.json").exists():
        raise CheckpointError(
            f"{path}: holds a PEFT adapter, which transformers would apply to the weights; merge "
            "it into them first"
        )
    config = read_json(inside(path, "config.json"))
    check_type(path / "config.json", config)
    check_sizes(path / "config.json", config)
    if not isinstance(config.get("quantization_config"), dict | None):
        raise CheckpointError(f"{path / 'config.json'}: quantization_config is not a JSON object")
    if isinstance(config.get("text_config"), dict):
        check_sizes(path / "config.json", config["text_config"])
    folder = ModelFolder(path, config, read_tensors(path))
    if not folder.quantization:
        wrong = [
            name
            for name, info in folder.tensors.items()
            if name.endswith(".weight") and not info.dtype.startswith(("F", "BF"))
        ]
        if wrong:
            raise CheckpointError(f"{path}: weights that are not floating point: {some(wrong)}")
    return folder


def check_type(path: Path, config: dict[str, Any]) -> None:
    """Raise CheckpointError unless transformers' own code can build the model: known causal type,
    no code or files from elsewhere.
    """
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.get("model_type")
    if "auto_map" in config:
        raise CheckpointError(
            f"{path}: 'auto_map' asks to run code from the model folder, which is never done "
            "(trust_remote_code is False); "
            f"if transformers itself knows '{kind}', remove the entry"
        )
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING_NAMES:
        raise CheckpointError(
            f"{path}: model_type is {kind!r}, which transformers {__version__} does not know"
        )
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise CheckpointError(f"{path}: model_type '{kind}' is not a causal language model")
    for key in (
        "transformers_weights",
        "attn_implementation",
        "_attn_implementation",
        "experts_implementation",
    ):
        value = config.get(key)
        if value is not None and (key == "transformers_weights" or "/" in str(value)):
            raise CheckpointError(
                f"{path}: '{key}' is {value!r}, which would load something that was not checked; "
                "remove the entry"
            )


def check_sizes(path: Path, config: dict[str, Any]) -> None:
    """Raise CheckpointError naming the field unless every size is a whole number within bounds and
    heads divide what they split.
    """
    for limit, fields in LIMITS.items():
        for field in fields:
            value = config.get(field)
            for size in value if isinstance(value, list) else [] if value is None else [value]:
                if type(size) is not int or not 1 <= size <= limit:
                    raise CheckpointError(
                        f"{path}: {field} is {size!r}; expected a whole number from 1 to {limit}"
                    )
    heads, groups, width = (
        config.get(key) for key in ("num_attention_heads", "num_key_value_heads", "hidden_size")
    )
    if not isinstance(heads, int):
        heads, width = config.get("n_head"), config.get("n_embd")
    if not isinstance(heads, int):
        return
    if isinstance(groups, int) and heads % groups:
        raise CheckpointError(
            f"{path}: num_key_value_heads is {groups}, which does not divide the {heads} "
            "attention heads"
        )
    if isinstance(width, int) and config.get("head_dim") is None and width % heads:
        raise CheckpointError(
            f"{path}: the number of attention heads is {heads}, which does not divide the hidden "
            f"size {width}"
        )


def refuse_quantised(folder: ModelFolder) -> None:
    """Raise CheckpointError if the weights are quantised or compressed already: only dense models
    can be compressed.
    """
    if folder.quantization:
        method = folder.quantization.get("quant_method", "an unnamed method")
        raise CheckpointError(
            f"{folder.path}: is already quantised or compressed ({method}); give the dense original"
        )


def raw_bytes(folder: ModelFolder) -> Iterator[tuple[str, TensorInfo, numpy.ndarray]]:
    """Yield every tensor in order of name with its bytes, mapped from the file: (bytes,) uint8."""
    for name, info in sorted(folder.tensors.items()):
        if info.bytes:
            yield (
                name,
                info,
                numpy.memmap(folder.path / info.file, numpy.uint8, "r", info.start, info.bytes),
            )
        else:
            yield name, info, numpy.empty(0, numpy.uint8)


def non_finite(folder: ModelFolder, progress: Progress = silent) -> list[str]:
    """Names of the floating tensors that hold NaN or infinity."""
    found = []
    for name, info, data in progress(raw_bytes(folder), "check weights", len(folder.tensors)):
        if info.dtype not in EXPONENTS:
            continue
        kind, mask = EXPONENTS[info.dtype]
        numbers = data.view(kind)
        blocks = (numbers[start : start + BLOCK] for start in range(0, numbers.size, BLOCK))
        if any((block & mask == mask).any() for block in blocks):
            found.append(name)
    return found


def check_finite(folder: ModelFolder, progress: Progress = silent) -> None:
    """Raise CheckpointError naming the tensors that hold NaN or infinity."""
    found = non_finite(folder, progress)
    if found:
        raise CheckpointError(
            f"{folder.path}: NaN or infinity in {some(found)}; these weights cannot be compressed"
        )


def content_digest(folder: ModelFolder) -> str:
    """sha256 (hex) of configuration and weights: the same however the weights are spread over
    files.
    """
    total = hashlib.sha256(json.dumps(folder.config, sort_keys=True).encode())
    for name, info, data in raw_bytes(folder):
        total.update(json.dumps([name, info.dtype, info.shape]).encode())
        total.update(data.data)
    return total.hexdigest()
