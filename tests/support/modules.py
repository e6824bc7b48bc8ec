"""Low-rank modules and checkpoints made by hand, independent of the methods and the writer of the
package; disks that are full.
"""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import scipy.linalg
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from compressor.linears import LowRank
from support.models import VOCABULARY, tiny_model, tiny_tokenizer

TARGETS = {  # a plain and a pivoted pair in the two blocks, dense linears beside them; ranks differ
    "llama": {
        "model.layers.0.self_attn.q_proj": (5, False),
        "model.layers.1.mlp.down_proj": (7, True),
    },
    "gpt2": {
        "transformer.h.0.attn.c_attn": (5, True),
        "transformer.h.0.mlp.c_proj": (6, False),
        "transformer.h.1.mlp.c_fc": (7, True),
    },
}


def factor_pair(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Truncated SVD of weight (out, in) in float64: up (out, r), down (r, in)."""
    left, values, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    return (left[:, :rank] * values[:rank]).contiguous(), right[:rank].contiguous()


def low_rank(weight: Tensor, bias: Tensor | None, rank: int, pivoted: bool) -> LowRank:
    """Best rank-r approximation of weight (out, in) in the Frobenius norm, stored plain or pivoted
    in the dtype of the weight.
    """
    up, down = factor_pair(weight, rank)
    bias = None if bias is None else bias.detach().clone()
    if not pivoted:
        return LowRank(down.to(weight.dtype), up.to(weight.dtype), bias)
    mask = numpy.zeros(down.shape[1], dtype=bool)
    mask[scipy.linalg.qr(down.numpy(), mode="r", pivoting=True)[1][:rank]] = True
    pivots, mask = torch.from_numpy(numpy.packbits(mask)), torch.from_numpy(mask)
    others = torch.linalg.solve(down[:, mask], down[:, ~mask]).contiguous()
    return LowRank(
        others.to(weight.dtype), (up @ down[:, mask]).to(weight.dtype).contiguous(), bias, pivots
    )


def low_rank_like(module: nn.Module, rank: int, pivoted: bool) -> LowRank:
    """Low-rank approximation of an nn.Linear or a Conv1D."""
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    return low_rank(weight, module.bias, rank, pivoted)


def compress_in_place(model, modules: dict[str, LowRank]) -> None:
    """Put `modules` into the model and describe them in its config, as a checkpoint needs it."""
    for name, module in modules.items():
        model.set_submodule(name, module)
    specs = {name: module.spec() for name, module in modules.items()}
    model.config.quantization_config = {
        "quant_method": "compressor",
        "format_version": 1,
        "linears": specs,
    }


def compressed(kind: str, **changes):
    """Tiny model with the modules of TARGETS in it."""
    model = tiny_model(kind, **changes)
    compress_in_place(
        model,
        {
            name: low_rank_like(model.get_submodule(name), *how)
            for name, how in TARGETS[kind].items()
        },
    )
    return model


def save_compressed(folder: Path, kind: str) -> Path:
    """Write a compressed tiny model with its tokenizer."""
    compressed(kind).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def loaded(folder: Path, **options):
    """Load with transformers alone and insist on a perfect fit."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, trust_remote_code=False, **options
    )
    assert not any(info.values()), info
    return model


def tokens(seed: int = 1, batch: int = 2, length: int = 12) -> Tensor:
    """Random token ids (batch, length) of the tiny vocabulary, without padding."""
    return torch.randint(
        3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed)
    )


@torch.no_grad()
def logits(model, input_ids: Tensor | None = None) -> Tensor:
    """One full pass, (batch, length, vocabulary)."""
    return model(input_ids=tokens() if input_ids is None else input_ids, use_cache=False).logits


@contextmanager
def disk_of_20_kb() -> Iterator[None]:
    """Let no file of this process grow beyond 20 KB, as on a full disk.

    Held inside a test's body only: between tests pytest itself writes, perhaps to a longer file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 * 1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def full_disk(monkeypatch, name: str, spared: int = 0) -> Iterator[None]:
    """Let writing a text file fail whose name begins with `name`, as on a full disk, after so many
    that go well.
    """
    original, seen = Path.write_text, []

    def write_text(path: Path, *arguments, **options) -> int:
        seen.append(path.name.startswith(name))
        if seen[-1] and sum(seen) > spared:
            path.touch()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return original(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write_text)
        yield
