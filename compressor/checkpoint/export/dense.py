"""Write a compressed checkpoint as a dense one that plain transformers, and whatever else reads its
format, loads without this package.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from compressor.checkpoint.weights import stored_dtype, stored_tensors, write_weights
from compressor.checkpoint.write import compare_reload, write_config, write_other_files
from compressor.errors import CheckpointError
from compressor.files.documents import naming
from compressor.files.model_folder import read
from compressor.files.staging import Staging, preflight
from compressor.hf import QUANT_METHOD
from compressor.linears import CompressedLinear, Pruned
from compressor.models.linears import blocks
from compressor.models.load import load, skeleton
from compressor.runtime.progress import Progress, silent

SHARD_SIZE = 5_000_000_000
# what configs call the width of feed-forward blocks
WIDTHS = ("intermediate_size", "ffn_dim", "n_inner")
README = """# Dense export

The dense form of a checkpoint compressed with `compressor`: quality-equal to it, {size}.
It loads with plain transformers. Sizes and scores that count are those of the compressed
checkpoint.
"""


def export_dense(
    path: Path,
    output: Path,
    overwrite: bool = False,
    shard_size: int = SHARD_SIZE,
    progress: Progress = silent,
) -> str:
    """Multiply out every compressed linear and write a stock checkpoint; return one line that says
    what it is.

    Feed-forward blocks that all keep equally many channels stay as narrow as they are: the config
    says so, and the files are smaller. The weights are rounded to the dtype of the checkpoint.

    Raises:
        CheckpointError: `path` holds nothing compressed by this package, or the export does not
            reload bit for bit.
    """
    stock = read_skeleton(path)
    size = sum(tensor.nbytes for tensor in stored_tensors(stock).values())
    preflight(output, path, overwrite, size)
    model, tokenizer = load(path)
    dtype = stored_dtype(stored_tensors(model).values())
    compressed = sum(tensor.nbytes for tensor in stored_tensors(model).values())
    width = narrow_feed_forward(model, stock)
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, CompressedLinear)
    }
    for name in progress(list(linears), "multiply out"):
        dense = build_dense(linears.pop(name), stock.get_submodule(name), dtype)
        model.set_submodule(name, dense)
    written = sum(tensor.nbytes for tensor in stored_tensors(model).values())
    kind = (
        "**not smaller** than the original model"
        if width is None
        else f"with feed-forward blocks of {width} channels"
    )
    with Staging(output, overwrite) as staging:
        write_config(staging.folder, model)
        # `stock`, unlike `model`, does not remember having been loaded from our names, so this
        # gives the architecture's own.
        write_weights(
            staging.folder,
            model,
            shard_size,
            revert_weight_conversion(stock, stored_tensors(model)),
            progress=progress,
        )
        write_other_files(staging.folder, model, tokenizer, path)
        with naming(staging.folder / "README.md"):
            (staging.folder / "README.md").write_text(README.format(size=kind), encoding="utf-8")
        compare_reload(staging.folder, model, progress)
        staging.commit()
    kind = kind.replace("*", "")
    return (
        f"{output}: dense export, quality-equal to {path}, {kind} ({written:,} bytes of weights; "
        f"compressed {compressed:,})"
    )


@dataclass(frozen=True)
class FeedForward:
    """Pruned linears of a decoder block that share their channels."""

    linears: dict[str, Pruned]  # by name within the block
    width: int  # channels of the dense block
    kept: int


def narrow_feed_forward(model: PreTrainedModel, stock: PreTrainedModel) -> int | None:
    """Make feed-forward blocks that all keep equally many channels narrow linears of the
    architecture; return the width, else None.
    """
    config, members = model.config.get_text_config(), blocks(model)[1]
    pruned = [part for member in members if (part := find_feed_forward(member))]
    shapes = {(part.width, part.kept) for part in pruned}
    if len(pruned) != len(members) or len(shapes) != 1:
        return None
    width, kept = shapes.pop()
    # GPT-2's None stands for four times the hidden size.
    widths = {
        field: getattr(config, field) or 4 * config.hidden_size
        for field in WIDTHS
        if hasattr(config, field)
    }
    named = [field for field in widths if widths[field] == width]
    if not named:
        return None
    for member, dense, part in zip(members, blocks(stock)[1], pruned, strict=True):
        for name, module in part.linears.items():
            like = dense.get_submodule(name)
            narrow = build_linear(like, module.matrix().detach(), module.bias)
            member.set_submodule(name, narrow)
    setattr(config, named[0], kept)
    return kept


def find_feed_forward(member: nn.Module) -> FeedForward | None:
    """Find the pruned linears of a decoder block that share their channels, if there are any."""
    pruned = {name: module for name, module in member.named_modules() if isinstance(module, Pruned)}
    for name, reader in pruned.items():
        if reader.columns is None or reader.rows is not None:
            continue
        kept, parent = reader.places("columns").tolist(), name.rpartition(".")[0]
        writers = {
            other: module
            for other, module in pruned.items()
            if other != name and other.rpartition(".")[0] == parent
        }
        if writers and all(
            written_channels(module, reader.in_features) == kept for module in writers.values()
        ):
            return FeedForward(writers | {name: reader}, reader.in_features, len(kept))
    return None


def written_channels(module: Pruned, width: int) -> list[int] | None:
    """List the channels that a linear writes, where it is one of a feed-forward block (once, or
    twice for gate and up in one).
    """
    if module.rows is None or module.columns is not None or module.out_features % width:
        return None
    rows = torch.zeros(module.out_features, dtype=torch.bool)
    rows[module.places("rows").cpu()] = True
    copies = rows.view(-1, width)
    return copies[0].nonzero().flatten().tolist() if (copies == copies[0]).all() else None


def read_skeleton(path: Path) -> PreTrainedModel:
    """Build the dense architecture of a compressed checkpoint, on the meta device.

    Raises:
        CheckpointError: the checkpoint is none of this package.
    """
    if read(path).quantization.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{path}: is not a checkpoint of this package, so there is nothing to export"
        )
    return skeleton(path)


def build_dense(compressed: CompressedLinear, stock: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Build what the architecture has in this place, nn.Linear or Conv1D (weight (in, out)), with Ŵ
    rounded to `dtype`.
    """
    return build_linear(stock, compressed.to_dense().to(dtype), compressed.dense_bias())


def build_linear(stock: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Build an nn.Linear or a Conv1D, as `stock` is, of a weight (out, in)."""
    module: nn.Linear | Conv1D
    with torch.device("meta"):
        if isinstance(stock, Conv1D):
            module, weight = Conv1D(*weight.shape), weight.T  # (in, out)
        else:
            module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    module.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    parameter = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    module.register_parameter("bias", parameter)
    return module
