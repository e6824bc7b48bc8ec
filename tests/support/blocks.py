"""One block of a small model, repaired."""

import torch

from compressor.linears import Adapted, Chained, Dictionary, Packed, Pruned, Sparse, Wrapped
from compressor.linears.masks import pack_mask
from compressor.pipeline.train import training
from compressor.recipe.training import Repair
from compressor.training.repair import repair_blocks
from support.activations import windows
from support.modules import low_rank

DOWN = "model.layers.0.mlp.down_proj"  # 32 outputs, 48 inputs


SECTION = Repair(enabled=True, train="compressed", steps=40, check=20, learning_rate=0.02)


def sparse(weight, bias, kept=0.5):
    mask = weight.abs() > weight.abs().flatten().quantile(1 - kept)
    return Sparse(weight[mask], pack_mask(mask.flatten()), bias, weight.shape[1], weight.shape[0])


def dictionary(weight, bias):
    left, values, atoms = torch.linalg.svd(weight, full_matrices=False)
    codes = (left * values)[:, :20]
    mask = codes.abs() > codes.abs().median()
    return Dictionary(
        codes[mask], atoms[:20].contiguous(), pack_mask(mask.flatten()), bias, len(weight)
    )


def packed(weight, bias, symmetric=True, group=8):
    parts = weight.unflatten(1, (-1, group))
    scales = parts.abs().amax(-1) / 3
    codes = (parts / scales[..., None]).round().flatten(1)
    return Packed.of_codes(codes, scales, None if symmetric else torch.zeros_like(scales), bias, 3)


def chained(weight, bias):
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    up = (left * values)[:, :24].contiguous()
    return Chained(packed(right[:24].contiguous(), None), packed(up, bias))


def wrapped(weight, bias):
    mask = torch.zeros(weight.numel() // 4, 4, dtype=torch.bool)
    mask.scatter_(1, weight.abs().view(-1, 4).topk(2).indices, True)
    return Wrapped.of(
        weight,
        mask.view_as(weight),
        torch.eye(4).repeat(8, 1, 1),
        torch.eye(4).repeat(12, 1, 1),
        bias,
        weight.dtype,
    )


MADE = {
    "low_rank": lambda weight, bias: low_rank(weight, bias, 12, False),
    "low_rank pivoted": lambda weight, bias: low_rank(weight, bias, 12, True),
    "sparse": sparse,
    "adapted sparse": lambda weight, bias: Adapted(sparse(weight, bias), *low_rank_pair(weight, 3)),
    "adapted packed": lambda weight, bias: Adapted(packed(weight, bias), *low_rank_pair(weight, 3)),
    "dictionary": dictionary,
    "packed": packed,
    "packed asymmetric": lambda weight, bias: packed(weight, bias, symmetric=False),
    "chained": chained,
    "pruned": lambda weight, bias: Pruned.of(
        weight, bias, torch.arange(32) % 3 > 0, torch.arange(48) % 4 > 0, weight.dtype
    ),
    "wrapped": wrapped,
}


def low_rank_pair(weight, rank):
    module = low_rank(weight, None, rank, False)
    return module.up.detach() * 0.5, module.weight.detach()


def repaired(model, modules, section=SECTION, batches=None, heldout=None, dtype=torch.float32):
    dtypes = dict.fromkeys([name for name, _ in model.named_parameters()], dtype)
    dtypes |= {
        f"{name}.{key}": p.dtype
        for name, module in modules.items()
        for key, p in module.named_parameters()
    }
    batches = [windows()] if batches is None else batches
    with training(model):
        return repair_blocks(
            model, modules, dtypes, (batches, batches if heldout is None else heldout), section, 0
        )
