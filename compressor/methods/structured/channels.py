"""Channels of feed-forward blocks: some are removed from all linears of the block, and the last
linear makes up for them.

References: OSSCAR, arXiv 2403.12983 (`obs`: backward elimination with a refit); LoRAP, arXiv
2404.09695 (`lorap`, with the least important 1 % kept); FLAP, arXiv 2312.11983 (`flap`:
fluctuation); Wanda, arXiv 2306.11695 (`wanda`); TransAct, arXiv 2407.05690 (`transact`).

Glossary
    hidden h    (m,) inputs of the consumer (down, fc2); producers (gate, up, gate_up, fc1) write
                them
    score       what a channel is worth; the lowest leave first, so the kept channels of a smaller
                width are among those of a larger one
        obs     ‖W_down[:, c]‖² / (H⁻¹)_cc, renewed after every removal
        lorap   ‖W_gate[c] ⊙ √s_x‖ + ‖W_up[c] ⊙ √s_x‖ + ‖W_down[:, c]‖ √s_h,c with s the mean
                squares of the inputs
        flap    var(h_c) ‖W_down[:, c]‖²                    wanda   E h_c² ‖W_down[:, c]‖²
        transact    E h_c², blind to what the consumer makes of it
    refit       none, linear (W' of `elimination`) or affine (the same on centred inputs, with a
                bias for what is lost on average)

Differs from the papers: statistics are of the dense model, collected once (OSSCAR and LoRAP go
block after block). All widths share one elimination; removed channels of LoRAP and FLAP may be
refitted too. Ridges are on the change of the weight, relative to mean(diag H).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compressor import linalg
from compressor.errors import ConfigError
from compressor.linalg import Metric
from compressor.linears import CompressedLinear, Dense, Pruned
from compressor.methods import register
from compressor.methods.base import Approximation, Member, Method, by_role, dense_size
from compressor.methods.structured.elimination import dropped_errors, eliminate, refit
from compressor.plan import Candidate, Curve

CONSUMERS = ("down", "fc2")
DEAD = 1e-13  # share of its mean square below which the variance of a channel is rounding
LEAST = 0.01  # share of the channels, the least important ones, that LoRAP keeps


@dataclass(frozen=True)
class Block:
    """One feed-forward block: the order in which channels leave, and the metric of its consumer."""

    module: str
    parts: dict[str, Member]
    consumer: str  # its role
    metric: Metric  # of the hidden activations, with mean and ridge as the refit wants them
    root: (
        Tensor | None
    )  # L: (out, out), L Lᵀ = H of the consumer's output gradients; None where it is the identity
    # (m, m) that metric as a matrix, 1 on the diagonal for channels that are always the same: they
    # cost nothing
    moment: Tensor
    order: Tensor  # (m,) channels, first to leave first
    errors: Tensor  # (m,) error after each has left
    energy: float

    @property
    def hidden(self) -> int:
        return self.parts[self.consumer].dense.weight.shape[1]


def consumer_of(module: str, roles: Mapping[str, Any]) -> str:
    """Find the role of the linear that reads the hidden activations.

    Raises:
        ConfigError: the module is no feed-forward block.
    """
    found = [role for role in CONSUMERS if role in roles]
    if len(found) != 1 or len(roles) < 2:
        raise ConfigError(
            f"{module}: not a feed-forward block whose channels are known; leave it out of the "
            "targets of 'channels'"
        )
    return found[0]


@register
@dataclass(frozen=True)
class Channels(Method[Block]):
    """Feed-forward blocks of fewer channels."""

    name: ClassVar[str] = "channels"
    paper: ClassVar[str] = (
        "OSSCAR, arXiv 2403.12983; LoRAP, arXiv 2404.09695; FLAP, arXiv 2312.11983"
    )
    unit: ClassVar[str] = "ffn"

    score: Literal["obs", "lorap", "flap", "wanda", "transact"] = "obs"
    refit: Literal["none", "linear", "affine"] = "linear"
    metric: Literal["gram", "two_sided"] = "gram"  # of the consumer's output
    keep_least: bool = False  # keep the least important 1 % as well, as LoRAP does
    # λ, relative to the mean square of a hidden channel
    ridge: Annotated[float, Field(ge=0)] = 1e-3
    shrink_grad_gram: Annotated[float, Field(ge=0, le=1)] = 0.1  # `two_sided` only
    # widths offered: multiples of it; by default at most 128 of them
    step: Annotated[int, Field(ge=1)] | None = None

    @property
    def needs(self) -> frozenset[str]:
        centred = {"sum"} if self.refit == "affine" or self.score == "flap" else set()
        return frozenset(
            {"gram"} | centred | ({"grad_gram"} if self.metric == "two_sided" else set())
        )

    def sizes_of_unit(self, members: Mapping[str, Member]) -> list[Candidate]:
        parts = by_role(members)
        consumer = consumer_of("a target", parts)
        denses = {role: part.dense for role, part in parts.items()}
        hidden = denses[consumer].weight.shape[1]
        step = self.step or max(1, hidden // 128)
        found = [self.size(denses, consumer, width) for width in range(step, hidden, step)]
        bits, parameters = dense_size(members)
        return [size for size in found if size.bits < bits and size.parameters < parameters]

    def size(self, denses: Mapping[str, Dense], consumer: str, width: int) -> Candidate:
        """Count what a block of `width` channels stores: small matrices, a mask for each linear,
        biases.
        """
        bits = parameters = multiply_adds = 0
        hidden = denses[consumer].weight.shape[1]
        for role, dense in denses.items():
            height, inputs = dense.weight.shape
            if role == consumer:
                numbers, mask, biases = (
                    height * width,
                    hidden,
                    height if dense.bias is not None or self.refit == "affine" else 0,
                )
            else:
                outputs = width * (
                    height // hidden
                )  # twice as many where gate and up are one linear
                numbers, mask, biases = (
                    outputs * inputs,
                    height,
                    0 if dense.bias is None else outputs,
                )
            parameters += numbers + biases
            multiply_adds += numbers
            bits += (numbers + biases) * dense.dtype.itemsize * 8 + 8 * ((mask + 7) // 8)
        return Candidate(self.name, {"channels": width}, bits, parameters, math.nan, multiply_adds)

    def prepare_unit(self, unit: str, members: Mapping[str, Member]) -> Block:
        """Order the channels by what their removal costs the consumer y = W h, W (d, m).

        The error of keeping K with the best W' is tr(Lᵀ (W − W') M (W − W')ᵀ L), the sum of the
        prices tr(Lᵀ W_P V_PP⁻¹ W_Pᵀ L) of what has left, V = M⁻¹ as the removals so far have left
        it (see `elimination`): M (m, m) the second moment of h, centred where a bias may follow,
        plus the ridge on its diagonal, L Lᵀ (d, d) that of the output gradients, or I. Scores other
        than `obs` give the order; without a refit the error is tr(Lᵀ W_P M_PP W_Pᵀ L). One
        elimination, O(m³ + d m²), serves every width.
        """
        parts = by_role(members)
        consumer = consumer_of(unit, parts)
        dense, stats = parts[consumer].dense, parts[consumer].stats
        for part in parts.values():
            part.stats.require(part.linear, self.needs)
        name, weight, root = parts[consumer].linear, dense.weight.double(), None
        moment = stats.total(name, "gram").double() / stats.tokens
        ridge = self.ridge * moment.diagonal().mean().item() if self.refit != "none" else 0.0
        mean = None
        if self.refit == "affine":
            mean = stats.total(name, "sum").double() / stats.tokens
        metric = Metric(stats.gram, 1 / stats.tokens, mean, ridge)
        if self.metric == "two_sided":
            root = stats.gradient_root(name, self.shrink_grad_gram)
            weight = root.T @ weight
        squares = moment.diagonal().clone()
        if mean is not None:
            moment = moment - torch.outer(mean, mean)
        dead = (
            moment.diagonal() <= DEAD * squares
            if ridge == 0
            else torch.zeros_like(squares, dtype=torch.bool)
        )
        moment = moment + torch.diag(torch.full_like(squares, ridge)) + torch.diag(dead.double())
        order, errors = self.order_channels(unit, parts, consumer, weight * ~dead, moment)
        return Block(
            unit,
            parts,
            consumer,
            metric,
            root,
            moment,
            order,
            errors,
            metric.energy(weight),
        )

    def order_channels(
        self,
        module: str,
        parts: Mapping[str, Member],
        consumer: str,
        weight: Tensor,
        moment: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Order the channels by removal; return the order and the error after each, both (m,)."""
        what = f"{module}: the moment of the hidden activations"
        linalg.require_finite(moment, what)
        if self.score == "obs" and self.refit != "none":
            return eliminate(weight, moment, what=what)
        order = self.scores(parts, consumer, weight, moment).argsort(stable=True)
        if self.keep_least:
            first = int(LEAST * len(order))
            order = torch.cat([order[first:], order[:first]])
        if self.refit == "none":
            return order, dropped_errors(weight, moment, order)
        return eliminate(weight, moment, order=order, what=what)

    def scores(
        self, parts: Mapping[str, Member], consumer: str, weight: Tensor, moment: Tensor
    ) -> Tensor:
        """Score every channel, (m,); `obs` without a refit is that of the first step."""
        name, stats = parts[consumer].linear, parts[consumer].stats
        squares = stats.total(name, "gram").diagonal().double() / stats.tokens
        norms = weight.square().sum(0)
        match self.score:
            case "obs":
                return norms / torch.cholesky_inverse(torch.linalg.cholesky(moment)).diagonal()
            case "transact":
                return squares
            case "wanda":
                return squares * norms
            case "flap":
                return (
                    squares - (stats.total(name, "sum").double() / stats.tokens).square()
                ) * norms
        found = norms.sqrt() * squares.sqrt()
        for role, part in parts.items():
            if role != consumer:
                gram = part.stats.total(part.linear, "gram")
                inputs = (gram.diagonal().double() / part.stats.tokens).sqrt()
                rows = (part.dense.weight.double() * inputs).norm(
                    dim=1
                )  # (m,), or (2 m,) where gate and up are one
                found = found + rows.view(-1, len(found)).sum(0)
        return found

    def candidates(self, state: Block) -> Curve:
        errors = (
            (state.errors / state.energy).tolist() if state.energy > 0 else [0.0] * state.hidden
        )
        found = [
            replace(size, error=errors[state.hidden - size.setting["channels"] - 1])
            for size in self.sizes_of_unit(state.parts)
        ]
        bits, parameters = dense_size(state.parts)
        return Curve(state.module, self.name, tuple(found), bits, parameters, state.energy)

    def kept(self, state: Block, width: int) -> Tensor:
        """Mask the channels that stay, (m,)."""
        kept = torch.ones(state.hidden, dtype=torch.bool, device=state.order.device)
        kept[state.order[: state.hidden - width]] = False
        return kept

    def compress_unit(
        self, state: Block, setting: dict[str, Any], outputs: Mapping[str, int]
    ) -> dict[str, CompressedLinear]:
        kept = self.kept(state, setting["channels"])
        modules: dict[str, CompressedLinear] = {}
        for role, part in state.parts.items():
            dense = part.dense
            if role == state.consumer:
                modules[part.linear] = self.consumer(state, dense, kept)
            else:
                rows = kept.repeat(len(dense.weight) // state.hidden)
                modules[part.linear] = Pruned.of(dense.weight, dense.bias, rows, None, dense.dtype)
        return modules

    def consumer(self, state: Block, dense: Dense, kept: Tensor) -> Pruned:
        """Build the linear that reads the kept channels."""
        weight, bias = dense.weight.double(), dense.bias
        if self.refit == "none":
            return Pruned.of(dense.weight, bias, None, kept, dense.dtype)
        new = refit(weight, state.moment, kept)
        if state.metric.mean is not None:
            lost = (weight - new) @ state.metric.mean
            bias = lost if bias is None else bias.double() + lost
        return Pruned.of(new, bias, None, kept, dense.dtype)

    def measure_unit(self, state: Block, modules: Mapping[str, Approximation]) -> float:
        consumer = state.parts[state.consumer]
        stored = modules[consumer.linear].to_dense()
        return linalg.relative_error(
            consumer.dense.weight, stored, state.metric, state.root, state.energy
        )
