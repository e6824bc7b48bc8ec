"""Low-rank modules made by hand from a weight, independent of the methods of the package."""

import scipy.linalg
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compressor.linears import LowRank
from compressor.linears.masks import pack_mask


def factor_pair(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Truncated SVD of weight (out, in) in float64: up (out, r), down (r, in)."""
    left, values, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    return left[:, :rank] * values[:rank], right[:rank]


def low_rank(weight: Tensor, bias: Tensor | None, rank: int, pivoted: bool) -> LowRank:
    """Best rank-r approximation of weight (out, in) in the Frobenius norm, stored plain or pivoted in the dtype of the weight."""
    up, down = factor_pair(weight, rank)
    bias = None if bias is None else bias.detach().clone()
    if not pivoted:
        return LowRank(down.to(weight.dtype), up.to(weight.dtype), bias)
    mask = torch.zeros(down.shape[1], dtype=torch.bool)
    mask[torch.as_tensor(scipy.linalg.qr(down.numpy(), mode="r", pivoting=True)[1][:rank].copy())] = True
    others = torch.linalg.solve(down[:, mask], down[:, ~mask])
    return LowRank(others.to(weight.dtype), (up @ down[:, mask]).to(weight.dtype), bias, pack_mask(mask))


def low_rank_like(module: nn.Module, rank: int, pivoted: bool) -> LowRank:
    """Low-rank approximation of an nn.Linear or a Conv1D."""
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    return low_rank(weight, module.bias, rank, pivoted)


def compress_in_place(model, modules: dict[str, LowRank]) -> None:
    """Put `modules` into the model and describe them in its config, as a checkpoint needs it."""
    for name, module in modules.items():
        model.set_submodule(name, module)
    specs = {name: module.spec() for name, module in modules.items()}
    model.config.quantization_config = {"quant_method": "compressor", "format_version": 1, "linears": specs}
