"""Seeded (weight, statistics) cases for the methods, with the tokens and gradients the statistics
were summed from.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.linears import Dense
from compressor.statistics import LinearStats

KINDS = (
    "square",
    "tall",
    "wide",
    "biased",
    "low_rank_weight",
    "low_rank_gram",
    "dead_inputs",
    "dead_half",
    "few_tokens",
    "one_token",
    "zero_weight",
)


@dataclass(frozen=True)
class Case:
    """A linear, its inputs x (tokens, in) and output gradients g (tokens, out), float64, and their
    statistics.
    """

    dense: Dense
    x: Tensor
    g: Tensor
    stats: LinearStats


def sums(x: Tensor, g: Tensor) -> LinearStats:
    """Statistics by definition, in float64."""
    return LinearStats(
        tokens=len(x),
        gram=x.T @ x,
        sum=x.sum(0),
        abs_sum=x.abs().sum(0),
        fisher=(g.square().sum(1, keepdim=True) * x.square()).sum(0),
        grad_tokens=len(g),
        grad_gram=g.T @ g,
    )


def make(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Case:
    """One linear with correlated, off-centre inputs; `kind` is one of KINDS."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    height, width = {"tall": (40, 24), "wide": (20, 44)}.get(kind, (28, 28))
    tokens = {"few_tokens": 12, "one_token": 1}.get(kind, 200)
    x = normal(tokens, width) @ (
        normal(width, width) * torch.logspace(0, -2, width, dtype=torch.float64)
    ) + 0.5 * normal(width)
    g = normal(tokens, height) @ normal(height, height) / height
    weight = normal(height, width)
    if kind == "low_rank_weight":
        weight = normal(height, 5) @ normal(5, width)
    if kind == "low_rank_gram":
        x = x[:, :6] @ normal(6, width)
    if kind == "dead_inputs":
        x[:, ::3] = 0
    if kind == "dead_half":
        x[:, : width // 2] = 0
    if kind == "zero_weight":
        weight = torch.zeros_like(weight)
    bias = normal(height).to(dtype) if kind == "biased" else None
    return Case(Dense(weight.to(dtype), bias, dtype), x, g, sums(x, g))


def correlated(height: int = 24, width: int = 48, seed: int = 0, tokens: int = 400) -> Case:
    """Inputs and gradients with a spread of scales and neighbours that resemble each other, as in a
    trained model.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(size: int) -> Tensor:
        noise = torch.randn(tokens, size, generator=generator, dtype=torch.float64)
        mixed = (noise + 0.8 * noise.roll(1, 1) + 0.4 * noise.roll(3, 1)) * torch.logspace(
            0, -1, size, dtype=torch.float64
        )
        return mixed[:, torch.randperm(size, generator=generator)]

    x, g = drawn(width), drawn(height)
    return Case(
        Dense(torch.randn(height, width, generator=generator), None, torch.float32),
        x,
        g,
        sums(x, g),
    )
