"""Optimizers of training, from libraries: AdamW of torch, and AdamW of bitsandbytes, which
keeps its moments in 8 bits.

References: 8-bit moments by block-wise dynamic codes, arXiv 2110.02861, as bitsandbytes has them on
CPUs and GPUs: blocks of 256 numbers with a scale each, whatever the shape; tensors of fewer than
4096 numbers keep moments of 32 bits.

Memory for each number that learns: 8 bytes of moments; 2.03 in 8 bits (two codes, and 8 bytes of
scales for 256 numbers), and 2 KiB of tables for each process.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from compressor.errors import ConfigError

BETAS = (0.9, 0.99)  # steps are few: a second moment over thousands of them would never settle
INSTALL = "pip install 'compressor[train]'"

# what an optimizer remembers of one tensor: tensors and numbers; nothing before its first step
Moments = dict[str, Any]


def build_optimizer(
    kind: str, parameters: Mapping[str, nn.Parameter], moments: Mapping[str, Moments]
) -> torch.optim.Optimizer:
    """Build an optimizer that goes on from `moments`, which it changes: a group for each parameter,
    in their order, learning rate 0.

    No weight decay, so that a tensor without a gradient stays as it is.

    Args:
        kind: as in the recipe.

    Raises:
        ConfigError: the library is missing.
    """
    groups = [{"params": [parameter], "lr": 0.0} for parameter in parameters.values()]
    optimizer = _class(kind)(groups, betas=BETAS, weight_decay=0.0)
    for name, parameter in parameters.items():
        if moments[name]:
            optimizer.state[parameter] = moments[name]
    return optimizer


def read_moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Moments]:
    """Return what an optimizer remembers of each parameter; it is not copied."""
    return {
        name: dict(optimizer.state[parameter]) if parameter in optimizer.state else {}
        for name, parameter in parameters.items()
    }


def require(kind: str) -> None:
    """Raise ConfigError if the library of an optimizer is missing."""
    _class(kind)


def _class(kind: str) -> Callable[..., torch.optim.Optimizer]:
    if kind == "adamw":
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ConfigError(
            f"optimizer '{kind}' needs bitsandbytes 0.50 or later; run `{INSTALL}`, or choose "
            "'adamw'"
        ) from None
    return AdamW8bit
