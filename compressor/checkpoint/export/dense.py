"""Write a compressed checkpoint as a dense one that plain transformers, and whatever else reads its
format, loads without this package.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from compressor.checkpoint.weights import stored_dtype, stored_tensors, write_weights
from compressor.checkpoint.write import compare_reload, write_companions, write_config
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
WIDTHS = (
    "intermediate_size",
    "ffn_dim",
    "n_inner",
)  # what configs call the width of feed-forward blocks
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
    Raises CheckpointError if `path` holds nothing compressed by this package, or the export does
    not reload bit for bit.
    """
    stock = compressed_skeleton(path)
    size = sum(tensor.nbytes for tensor in stored_tensors(stock).values())
    preflight(output, path, overwrite, size)
    model, tokenizer = load(path)
    dtype = stored_dtype(stored_tensors(model).values())
    compressed = sum(tensor.nbytes for tensor in stored_tensors(model).values())
    width = narrow(model, stock)
    names = [name for name, module in model.named_modules() if isinstance(module, CompressedLinear)]
    for name in progress(names, "multiply out"):
        model.set_submodule(
            name, dense_module(model.get_submodule(name), stock.get_submodule(name), dtype)
        )
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
        write_companions(staging.folder, model, tokenizer, path)
        with naming(staging.folder / "README.md"):
            (staging.folder / "README.md").write_text(README.format(size=kind), encoding="utf-8")
        compare_reload(staging.folder, model, progress)
        staging.commit()
    kind = kind.replace("*", "")
    return (
        f"{output}: dense export, quality-equal to {path}, {kind} ({written:,} bytes of weights; "
        f"compressed {compressed:,})"
    )


def narrow(model: PreTrainedModel, stock: PreTrainedModel) -> int | None:
    """Make feed-forward blocks that all keep equally many channels narrow linears of the
    architecture; return the width, else None.
    """
    config, members = model.config.get_text_config(), blocks(model)[1]
    found = [feed_forward(member) for member in members]
    shapes = {(part[1], part[2]) for part in found if part}
    if not all(found) or len(shapes) != 1:
        return None
    hidden, width = shapes.pop()
    named = [field for field in WIDTHS if hasattr(config, field)]
    field = next(
        (field for field in named if (getattr(config, field) or 4 * config.hidden_size) == hidden),
        None,
    )  # GPT-2's None is 4
    if field is None:
        return None
    for member, dense, (names, *_) in zip(members, blocks(stock)[1], found, strict=True):
        for name in names:
            module = member.get_submodule(name)
            member.set_submodule(
                name, linear_like(dense.get_submodule(name), module.matrix().detach(), module.bias)
            )
    setattr(config, field, width)
    return width


def feed_forward(member: nn.Module) -> tuple[list[str], int, int] | None:
    """Pruned linears of a decoder block that share their channels, the reader of these last; how
    many there were and are. None without.
    """
    pruned = {name: module for name, module in member.named_modules() if isinstance(module, Pruned)}
    for name, reader in pruned.items():
        if reader.columns is None or reader.rows is not None:
            continue
        kept, parent = reader.places("columns").tolist(), name.rpartition(".")[0]
        siblings = [
            other for other in pruned if other != name and other.rpartition(".")[0] == parent
        ]
        if siblings and all(
            channels_of(pruned[other], reader.in_features) == kept for other in siblings
        ):
            return [*siblings, name], reader.in_features, len(kept)
    return None


def channels_of(module: Pruned, width: int) -> list[int] | None:
    """Channels that a linear writes, where it is one of a feed-forward block (once, or twice for
    gate and up in one).
    """
    if module.rows is None or module.columns is not None or module.out_features % width:
        return None
    rows = torch.zeros(module.out_features, dtype=torch.bool)
    rows[module.places("rows").cpu()] = True
    parts = rows.view(-1, width)
    return parts[0].nonzero().flatten().tolist() if (parts == parts[0]).all() else None


def compressed_skeleton(path: Path) -> PreTrainedModel:
    """The dense architecture of a compressed checkpoint, on the meta device. Raises CheckpointError
    if it is not one of this package.
    """
    if read(path).quantization.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{path}: is not a checkpoint of this package, so there is nothing to export"
        )
    return skeleton(path)


def dense_module(compressed: CompressedLinear, stock: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Build what the architecture has in this place, nn.Linear or Conv1D (weight (in, out)), with Ŵ
    rounded to `dtype`.
    """
    return linear_like(stock, compressed.to_dense().to(dtype), compressed.dense_bias())


def linear_like(stock: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """nn.Linear or Conv1D, as `stock` is, of a weight (out, in)."""
    with torch.device("meta"):
        if isinstance(stock, Conv1D):
            module, weight = Conv1D(*weight.shape), weight.T  # (in, out)
        else:
            module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    module.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    module.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return module
