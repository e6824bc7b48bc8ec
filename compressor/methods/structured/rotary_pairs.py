"""Rotary pairs of queries and keys: those that add least to attention logits are removed.

Reference: MoDeGPT (arXiv 2408.09632), its CR step with rotary embeddings.

Glossary (k key–value heads, each serving query heads j; hd = head_dim)
    pair    dimensions i and i' = i + hd / 2, which rotary embeddings turn into each other: they
            stay or leave together
    score   Σ_j (E q_i² + E q_i'²) (E k_i² + E k_i'²): rotations keep the sums, so it is taken
            before them

Differs from the paper: pairs are chosen over all heads of a block, and removed ones are zeros to
the attention around them, which keeps its scale, its embeddings and its cache. Kept rows are not
refitted. Normalised queries and keys are refused: fewer of them change the norm.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from compressor import linalg
from compressor.linalg import Metric
from compressor.linears import CompressedLinear, Pruned
from compressor.methods import register
from compressor.methods.base import Approximation, Member, Method, by_role, dense_size
from compressor.methods.structured.heads import Shape, shape_of
from compressor.plan import Candidate, Curve


@dataclass(frozen=True)
class Scored:
    """Query and key projections of one module with the score of every pair."""

    module: str
    parts: dict[str, Member]
    shape: Shape
    scores: Tensor  # (k, hd / 2)


@register
@dataclass(frozen=True)
class RotaryPairs(Method[Scored]):
    """Queries and keys of fewer rotary pairs; the key–value cache keeps its size.

    A pair stays for all query heads of a key–value head, or for none. What has left is zero to the
    attention around it, which caches keys of the full width.
    """

    name: ClassVar[str] = "rotary_pairs"
    paper: ClassVar[str] = "MoDeGPT, arXiv 2408.09632"
    unit: ClassVar[str] = "qk"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram"})

    def sizes_of_unit(self, members: Mapping[str, Member]) -> list[Candidate]:
        parts = by_role(members)
        shape = shape_of("a target", parts, ("q", "k"))
        return [self.size(parts, shape, kept) for kept in range(1, shape.kv * shape.dim // 2)]

    def size(self, parts: Mapping[str, Member], shape: Shape, kept: int) -> Candidate:
        bits = parameters = multiply_adds = 0
        for role, part in parts.items():
            dense = part.dense
            rows = 2 * kept * (shape.group if role == "q" else 1)
            numbers, biases = rows * dense.weight.shape[1], 0 if dense.bias is None else rows
            parameters, multiply_adds = parameters + numbers + biases, multiply_adds + numbers
            bits += (numbers + biases) * dense.dtype.itemsize * 8 + 8 * (
                (len(dense.weight) + 7) // 8
            )
        return Candidate(self.name, {"pairs": kept}, bits, parameters, math.nan, multiply_adds)

    def prepare_unit(self, unit: str, members: Mapping[str, Member]) -> Scored:
        """Score every pair: Σ_j (E q_i² + E q_i'²) (E k_i² + E k_i'²), E q² = diag(W M Wᵀ) with
        W (outputs, in) and M the second moment of the inputs. Costs one product W M each.
        """
        parts = by_role(members)
        shape = shape_of(unit, parts, ("q", "k"))
        energies = []
        for role, heads in (("q", shape.group), ("k", 1)):
            part = parts[role]
            part.stats.require(part.linear, self.needs)
            weight = part.dense.weight.double()
            squares = (Metric(part.stats.gram, 1 / part.stats.tokens).weigh(weight) * weight).sum(
                1
            )  # E of every output, squared
            linalg.require_finite(squares, f"{part.linear}: its mean square outputs")
            energies.append(squares.view(shape.kv, heads, 2, shape.dim // 2).sum(2))
        queries, keys = energies
        return Scored(unit, parts, shape, (queries * keys).sum(1))

    def candidates(self, state: Scored) -> Curve:
        energy = state.scores.sum().item()
        lost = state.scores.flatten().sort().values.cumsum(0) / (energy or 1.0)
        found = [
            replace(size, error=lost[-1 - size.setting["pairs"]].item())
            for size in self.sizes_of_unit(state.parts)
        ]
        bits, parameters = dense_size(state.parts)
        found = [size for size in found if size.bits < bits and size.parameters < parameters]
        return Curve(state.module, self.name, tuple(found), bits, parameters, energy)

    def compress_unit(
        self, state: Scored, setting: dict[str, Any], outputs: Mapping[str, int]
    ) -> dict[str, CompressedLinear]:
        order = state.scores.flatten().argsort(stable=True)
        kept = torch.ones(state.scores.numel(), dtype=torch.bool, device=order.device)
        kept[order[: len(kept) - setting["pairs"]]] = False
        kept = kept.view(state.shape.kv, 1, 1, state.shape.dim // 2)
        modules: dict[str, CompressedLinear] = {}
        for role, part in state.parts.items():
            heads = state.shape.group if role == "q" else 1
            rows = kept.expand(-1, heads, 2, -1).flatten()
            modules[part.linear] = Pruned.of(
                part.dense.weight, part.dense.bias, rows, None, part.dense.dtype
            )
        return modules

    def measure_unit(self, state: Scored, modules: Mapping[str, Approximation]) -> float:
        keys = modules[state.parts["k"].linear]
        if not isinstance(keys, Pruned):
            raise TypeError(f"{self.name} measures the modules that it builds")
        rows = keys.places("rows")
        kept = torch.zeros(state.shape.kv * state.shape.dim, dtype=torch.bool, device=rows.device)
        kept[rows] = True
        kept = kept.view(state.shape.kv, 2, state.shape.dim // 2)[:, 0]
        energy = state.scores.sum().item()
        return state.scores[~kept].sum().item() / energy if energy > 0 else 0.0
