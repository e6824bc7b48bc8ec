"""Write a compressed checkpoint as a dense one that plain transformers, and whatever else reads its format, loads without this package."""

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from compressor.checkpoint import compare_reload, write_companions, write_config
from compressor.errors import CheckpointError
from compressor.folder import read
from compressor.hf import QUANT_METHOD
from compressor.linears import CompressedLinear
from compressor.model import load, skeleton
from compressor.staging import Staging, naming, preflight
from compressor.weights import stored_dtype, stored_tensors, write_weights

SHARD_SIZE = 5_000_000_000
README = """# Dense export

The dense form of a checkpoint compressed with `compressor`: quality-equal to it, **not smaller** than the original model.
It loads with plain transformers. Sizes and scores that count are those of the compressed checkpoint.
"""


def export_dense(path: Path, output: Path, overwrite: bool = False, shard_size: int = SHARD_SIZE) -> str:
    """Multiply out every compressed linear and write a stock checkpoint; return one line that says what it is.

    The weights are rounded to the dtype of the checkpoint. Raises CheckpointError if `path` holds nothing compressed by this package,
    or the export does not reload bit for bit.
    """
    stock = compressed_skeleton(path)
    size = sum(tensor.nbytes for tensor in stored_tensors(stock).values())
    preflight(output, path, overwrite, size)
    model, tokenizer = load(path)
    dtype = stored_dtype(stored_tensors(model).values())
    compressed = sum(tensor.nbytes for tensor in stored_tensors(model).values())
    for name in [name for name, module in model.named_modules() if isinstance(module, CompressedLinear)]:
        model.set_submodule(name, dense_module(model.get_submodule(name), stock.get_submodule(name), dtype))
    with Staging(output, overwrite) as staging:
        write_config(staging.folder, model)
        # `stock`, unlike `model`, does not remember having been loaded from our names, so this gives the architecture's own.
        write_weights(staging.folder, model, shard_size, revert_weight_conversion(stock, stored_tensors(model)))
        write_companions(staging.folder, model, tokenizer, path)
        with naming(staging.folder / "README.md"):
            (staging.folder / "README.md").write_text(README, encoding="utf-8")
        compare_reload(staging.folder, model)
        staging.commit()
    return f"{output}: dense export, quality-equal to {path}, not smaller ({size:,} bytes of weights; compressed {compressed:,})"


def compressed_skeleton(path: Path) -> PreTrainedModel:
    """The dense architecture of a compressed checkpoint, on the meta device. Raises CheckpointError if it is not one of this package."""
    if read(path).quantization.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"{path}: is not a checkpoint of this package, so there is nothing to export")
    return skeleton(path)


def dense_module(compressed: CompressedLinear, stock: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Build what the architecture has in this place, nn.Linear or Conv1D (weight (in, out)), with Ŵ rounded to `dtype`."""
    weight = compressed.to_dense().to(dtype)  # (out, in)
    with torch.device("meta"):
        if isinstance(stock, Conv1D):
            module, weight = Conv1D(*weight.shape), weight.T.contiguous()  # (in, out)
        else:
            module = nn.Linear(compressed.in_features, compressed.out_features, bias=compressed.bias is not None)
    module.weight = nn.Parameter(weight, requires_grad=False)
    bias = compressed.dense_bias()
    module.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    return module
