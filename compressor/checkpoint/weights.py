"""Tensors of a model as safetensors shards, written one tensor at a time: no second copy of the
model, same model, same bytes.

safetensors' own writer is not used because it holds a whole shard, replaces links and leaves files
readable by their owner only.
"""

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter

from compressor.errors import CheckpointError
from compressor.files.documents import naming
from compressor.files.safetensors import INDEX, SINGLE
from compressor.runtime.progress import Progress, silent

log = logging.getLogger(__name__)

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
METADATA = {"format": "pt"}
# bytes of a file beside tensors and their header entries: length field, metadata, padding
FRAME = 64


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """List the parameters that are tied now, each with the one it repeats; less than declared if a
    tied linear was replaced.
    """
    state = model.state_dict(keep_vars=True)
    declared = {
        name: source
        for name, source in model.all_tied_weights_keys.items()
        if name in state and source in state
    }
    return {name: source for name, source in declared.items() if state[name] is state[source]}


def tied_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """List the parameters that a checkpoint holds under another name, as meta tensors."""
    state = model.state_dict()
    return {name: torch.empty_like(state[name], device="meta") for name in tied_names(model)}


def warn_of_untying(model: PreTrainedModel, linears: Iterable[str]) -> None:
    """Log which linears share their weight with another module: compressing them adds to the
    files.
    """
    ties = tied_names(model)
    for name in linears:
        if source := ties.get(f"{name}.weight"):
            log.warning(
                "%s shares its weight with %s, which stays dense: compressed, it is stored beside "
                "it, and the files grow by what it takes; leave it out of the targets to keep "
                "them tied",
                name,
                source,
            )


def stored_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """List the state dict entries that a checkpoint holds, in model order: tied parameters once.
    Offloaded ones are on meta; see `fetch`.
    """
    dropped = tied_names(model).keys() | set(model._keys_to_ignore_on_save or ())
    return {name: tensor for name, tensor in model.state_dict().items() if name not in dropped}


def fetch(model: PreTrainedModel | None, name: str, tensor: Tensor) -> Tensor:
    """Return an entry of `stored_tensors` on the CPU, from the offload folder if that is where it
    is.
    """
    if tensor.is_meta and model is not None:
        tensor = load_offloaded_parameter(model, name)
    return tensor.detach().cpu()


def header_entry(tensor: Tensor, start: int) -> dict[str, Any]:
    """Describe a tensor that starts `start` bytes into the data of its file.

    Raises:
        CheckpointError: its dtype has no name in the format.
    """
    if tensor.dtype not in DTYPES:
        raise CheckpointError(f"tensors of {tensor.dtype} cannot be stored")
    return {
        "dtype": DTYPES[tensor.dtype],
        "shape": list(tensor.shape),
        "data_offsets": [start, start + tensor.nbytes],
    }


def encode_json(data: dict[str, Any]) -> bytes:
    """Encode a header, without spaces."""
    return json.dumps(data, separators=(",", ":")).encode()


def split_into_shards(tensors: dict[str, Tensor], shard_size: int) -> list[dict[str, Tensor]]:
    """Group tensors, in order, into files of at most `shard_size` bytes, header included; a larger
    tensor gets a file of its own.
    """
    groups: list[dict[str, Tensor]] = [{}]
    size = FRAME
    for name, tensor in tensors.items():
        cost = tensor.nbytes + len(encode_json({name: header_entry(tensor, 10**15)}))
        if groups[-1] and size + cost > shard_size:
            groups.append({})
            size = FRAME
        groups[-1][name] = tensor
        size += cost
    return groups


def write_shard(
    path: Path,
    tensors: dict[str, Tensor],
    model: PreTrainedModel | None = None,
    progress: Progress = silent,
) -> None:
    """Write one safetensors file; `model` is where offloaded tensors come from.

    Raises:
        CheckpointError: the disk is full; the message names the file.
    """
    # Wide types first keeps every tensor aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, dict[str, Any]] = {"__metadata__": METADATA}
    start = 0
    for name in names:
        header[name] = header_entry(tensors[name], start)
        start += tensors[name].nbytes
    text = encode_json(header)
    text += b" " * (-len(text) % 8)
    with naming(path), path.open("xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in progress(names, f"write {path.name}"):
            stream.write(
                fetch(model, name, tensors[name]).reshape(-1).view(torch.uint8).numpy().data
            )
        stream.flush()
        os.fsync(stream.fileno())


def write_weights(
    folder: Path,
    model: PreTrainedModel,
    shard_size: int,
    tensors: dict[str, Tensor] | None = None,
    index: bool = False,
    progress: Progress = silent,
) -> None:
    """Write the stored tensors of a model (or `tensors` in their place), with an index if they take
    more than one file or if wanted.
    """
    tensors = stored_tensors(model) if tensors is None else tensors
    groups = split_into_shards(tensors, shard_size)
    if len(groups) == 1 and not index:
        write_shard(folder / SINGLE, tensors, model, progress)
        return
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = (
            SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        )
        write_shard(folder / file, group, model, progress)
        weight_map |= dict.fromkeys(group, file)
    metadata = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    with naming(folder / INDEX):
        text = json.dumps(
            {"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True
        )
        (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def stored_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return the floating type that most of the bytes have."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])
