"""Integer codes of a few bits with a scale for each group of inputs, and optionally a low-rank
residual that makes up for the rounding.

References (solver → paper)
    rtn       round to nearest, ranges clipped where that lowers the error
    gptq      error feedback from input to input: GPTQ, arXiv 2210.17323; in the two-sided metric
              also from output to output: YAQA,
              arXiv 2505.22988
    sweeps    adaptive rounding of what either returns, by coordinate descent: QuantEase, arXiv
              2309.01885; see `coordinate_descent`
    residual  EoRA, arXiv 2410.21271, see `residual`, and `residual_integers` for factors of
              integers; choosing bits and rank together for
              each linear by a knapsack is MLoRQ's idea, arXiv 2507.09616

Glossary
    metric M, grad_gram H = L Lᵀ   as in `sparse`; H is the identity unless the metric is two-sided
    scheme                         bits and group: a number of inputs, `auto:32` for the divisor of
                                   the width nearest to 32, or `channel`

Differs from the papers: scales are fixed before the first code is chosen, from the dense weight, so
inputs can be rounded in the order of their second moments without any index being stored (GPTQ
takes scales from the updated weight, group by group). Inputs that calibration never saw are rounded
to nearest; GPTQ's code sets them to zero. Symmetric grids put the spare code on the side of the
largest entry of a group. MLoRQ stores either integers or factors, for vision transformers. YAQA
rounds to lattices after rotations. All statistics are of the dense model.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from compressor import linalg
from compressor.errors import ConfigError
from compressor.linears import Adapted, CompressedLinear, Dense, Packed
from compressor.linears.packed import packed_size
from compressor.methods import register
from compressor.methods.base import Approximation
from compressor.methods.integers.coordinate_descent import descend
from compressor.methods.integers.error_feedback import (
    Entries,
    Grid,
    fit_grid,
    nearest,
    round_columns,
    round_entries,
)
from compressor.methods.integers.residual_integers import (
    Codec,
    IntegerResidual,
    errors,
    round_residuals,
)
from compressor.methods.low_rank.residual import Residual, decompose
from compressor.methods.sparse.base import MetricName, TwoSided, Weighed
from compressor.methods.sparse.sparse import obs_factor
from compressor.plan import Candidate, Curve
from compressor.statistics import LinearStats

TOGETHER = 1 << 24  # entries of all schemes that are rounded at once


def _group(value: int | str) -> int | str:
    if (
        isinstance(value, str)
        and value != "channel"
        and not (value.startswith("auto:") and value[5:].isdecimal() and int(value[5:]))
    ):
        raise ValueError(
            "is a number of inputs, 'auto:32' for the divisor nearest to 32, or 'channel'"
        )
    if isinstance(value, int) and value < 1:
        raise ValueError("is at least 1")
    return value


Group = Annotated[int | str, AfterValidator(_group)]
Bits = Annotated[int, Field(ge=2, le=8)]


def group_size(group: int | str, width: int, linear: str) -> int:
    """Count the inputs that share a scale.

    Raises:
        ConfigError: a size given as a number does not divide the width; names the linear.
    """
    if group == "channel":
        return width
    if isinstance(group, str):
        wanted = int(group.removeprefix("auto:"))
        return min(
            (size for size in range(1, width + 1) if width % size == 0),
            key=lambda size: (abs(size - wanted), size),
        )
    if width % group:
        raise ConfigError(
            f"{linear}: groups of {group} do not divide its {width} inputs; use group "
            f"'auto:{group}' or 'channel'"
        )
    return group


def scheme_of(setting: dict[str, Any]) -> tuple[int, int]:
    return setting["bits"], setting["group"]


@dataclass(frozen=True)
class Feedback:
    """Orders of inputs and outputs, the factors of `error_feedback` in them, and the damping that
    they took.
    """

    order: Tensor  # (in,)
    inner: Tensor  # (in, in) U
    rows: Tensor | None  # (out,); None for feedback among inputs alone
    outer: Tensor | None  # (out, out) V
    damping: float


@dataclass(frozen=True)
class Scheme:
    """One weight rounded in one way, what the residual starts from."""

    module: Packed
    error: float  # relative, of the module as it is stored
    residual: Residual | None  # None where none is offered
    integers: IntegerResidual | None  # None where none is offered, or factors are not integers
    damping: float | None  # None without feedback


@dataclass(frozen=True)
class Prepared:
    """One linear in its metric, and the schemes solved so far; factors as large as a Gram are made
    when they are needed, and let go.
    """

    weighed: Weighed
    schemes: dict[tuple[int, int], Scheme] = field(default_factory=dict)

    @property
    def damping(self) -> float | None:
        """Damping that error feedback took, once something is solved; None without it."""
        return next((scheme.damping for scheme in self.schemes.values()), None)


@register
@dataclass(frozen=True)
class QuantizeMethod(TwoSided[Prepared]):
    """Integer codes with group scales, alone or with a low-rank residual."""

    name: ClassVar[str] = "quantize"
    paper: ClassVar[str] = "GPTQ, arXiv 2210.17323; EoRA, arXiv 2410.21271; MLoRQ, arXiv 2507.09616"
    integers: ClassVar[bool] = True

    solver: Literal["rtn", "gptq"] = "gptq"
    metric: MetricName = "gram"
    bits: tuple[Bits, ...] = (4,)  # widths of the codes that are offered
    # inputs that share a scale, each as a number, 'auto:N' or 'channel'
    group: tuple[Group, ...] = ("auto:32",)
    symmetric: bool = True  # no zero points
    # ranks of the residual that are offered; 0 is none
    residual: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    # width of the codes of both factors of residuals; null for numbers in the stored dtype
    residual_bits: Bits | None = None
    # inputs of the one factor, and outputs of the other, that share a scale
    residual_group: Group = "auto:128"
    # smallest part of a range that the clip search tries; 1 for none
    clip: Annotated[float, Field(gt=0, le=1)] = 0.4
    # ranges that it tries, evenly spaced from the whole one
    clips: Annotated[int, Field(ge=1)] = 31
    # `gptq` only: inputs of large second moment first, or as they stand
    ordering: Literal["moment", "natural"] = "moment"
    # `gptq` only: over the mean diagonal, the first that works
    damping: tuple[Annotated[float, Field(ge=0)], ...] = (0.01, 0.1, 1.0)
    # `gptq` only: columns, and rows of the two-sided metric, whose feedback is applied together
    block: Annotated[int, Field(ge=1)] = 32
    # of `coordinate_descent` after that: each code in turn moves to the best one
    sweeps: Annotated[int, Field(ge=0)] = 0

    def settings(self, dense: Dense, linear: str) -> Iterator[Candidate]:
        """List everything on offer, errors NaN.

        Raises:
            ConfigError: a group does not divide, or all ranks are above a side; names the linear.
        """
        (height, width), wide = dense.weight.shape, 8 * dense.dtype.itemsize
        ranks = [rank for rank in self.residual if rank <= min(height, width)]
        if not ranks:
            raise ConfigError(
                f"{linear}: residual rank {min(self.residual)} is above its smaller side, "
                f"{min(height, width)}"
            )
        for bits in self.bits:
            for group in dict.fromkeys(group_size(group, width, linear) for group in self.group):
                codes, scales = packed_size(height, width, bits, group, self.symmetric)
                for rank in ranks:
                    more, numbers = self.residual_size(rank, height, width, linear)
                    numbers += scales + (0 if dense.bias is None else height)
                    setting = {"bits": bits, "group": group, "symmetric": self.symmetric} | (
                        {"rank": rank} if rank else {}
                    )
                    if rank and self.residual_bits is not None:
                        setting["residual_bits"] = self.residual_bits
                    products = height * width + rank * (height + width)
                    yield Candidate(
                        self.name,
                        setting,
                        codes + more + wide * numbers,
                        numbers,
                        math.nan,
                        products,
                    )

    def residual_size(self, rank: int, height: int, width: int, linear: str) -> tuple[int, int]:
        """(bits of codes, other numbers) of a residual."""
        if rank == 0 or self.residual_bits is None:
            return 0, rank * (height + width)
        parts = [
            packed_size(
                rank, side, self.residual_bits, group_size(self.residual_group, side, linear), True
            )
            for side in (height, width)
        ]
        return sum(codes for codes, _ in parts), sum(scales for _, scales in parts)

    def sizes(self, dense: Dense, linear: str = "a target") -> list[Candidate]:
        smaller = (size for size in self.settings(dense, linear) if size.bits < dense.bits)
        return sorted(smaller, key=lambda size: size.bits)

    def prepare(self, linear: str, dense: Dense, stats: LinearStats) -> Prepared:
        """Form the metric tr(H D M Dᵀ), D = W − Ŵ (out, in); schemes are solved when they are asked
        for, at the cost of a Cholesky factor, O(in³), and O(out · in²) each.
        """
        linalg.require_finite(dense.weight, f"{linear}: the weight")
        return Prepared(self.weigh(linear, dense, stats, is_posed=False))

    def feedback(self, weighed: Weighed) -> Feedback:
        moment = weighed.metric.matrix()
        order, rows, outer, taken = self.arrange(moment.diagonal()), None, None, 0.0
        inner, damping = obs_factor(moment[order][:, order], self.damping, weighed.linear)
        if weighed.root is not None:
            grad_gram = weighed.root @ weighed.root.T
            rows = self.arrange(grad_gram.diagonal())
            outer, taken = obs_factor(grad_gram[rows][:, rows], self.damping, weighed.linear)
        return Feedback(order, inner, rows, outer, max(damping, taken))

    def arrange(self, moments: Tensor) -> Tensor:
        """Order in which inputs or outputs of these second moments are rounded."""
        if self.ordering == "natural":
            return torch.arange(len(moments), device=moments.device)
        return moments.argsort(descending=True, stable=True)

    def solve(self, state: Prepared, schemes: Sequence[tuple[int, int]]) -> None:
        """Round the weight in these schemes, pairs of bits and group, some of them together, and
        remember the results in the state.
        """
        weighed, dense = state.weighed, state.weighed.dense
        weight, new = (
            dense.weight.double(),
            [scheme for scheme in schemes if scheme not in state.schemes],
        )
        if not new:
            return
        feedback = self.feedback(weighed) if self.solver == "gptq" else None
        importance = weighed.metric.diagonal()
        together = max(1, TOGETHER // weight.numel())
        for start in range(0, len(new), together):
            part = new[start : start + together]
            grids = [
                fit_grid(weight, *scheme, self.symmetric, importance, self.ranges(), dense.dtype)
                for scheme in part
            ]
            modules, rounded = [], self.codes(weight, grids, feedback)
            if self.sweeps:
                rounded = descend(
                    weight,
                    rounded,
                    Entries.of(grids),
                    weighed.metric,
                    weighed.root,
                    self.sweeps,
                    self.block,
                )
            for grid, codes in zip(grids, rounded, strict=True):
                linalg.require_finite(grid.scales, f"{weighed.linear}: scales in {dense.dtype}")
                bias = None if dense.bias is None else dense.bias.to(dense.dtype, copy=True)
                modules.append(
                    Packed.of_codes(codes, grid.scales.to(dense.dtype), grid.zeros, bias, grid.bits)
                )
            state.schemes.update(
                zip(part, self.measure_rounded(weighed, modules, importance, feedback), strict=True)
            )

    def ranges(self) -> Tensor:
        """List the parts of a range that the clip search tries, (clips,)."""
        return torch.linspace(1, self.clip, self.clips if self.clip < 1 else 1)

    def codes(self, weight: Tensor, grids: Sequence[Grid], feedback: Feedback | None) -> Tensor:
        """Codes (K, out, in) on K grids."""
        if feedback is None:
            return torch.stack(
                [nearest(weight, *grid.columns(), 2 ** (grid.bits - 1)) for grid in grids]
            )
        if feedback.outer is None or feedback.rows is None:
            return round_columns(weight, grids, feedback.inner, feedback.order, self.block)
        return round_entries(
            weight, grids, feedback.inner, feedback.order, feedback.outer, feedback.rows, self.block
        )

    def measure_rounded(
        self,
        weighed: Weighed,
        modules: Sequence[Packed],
        importance: Tensor,
        feedback: Feedback | None,
    ) -> list[Scheme]:
        """Measure rounded weights, and decompose what they lost where residuals are offered.

        Args:
            weighed: W (out, in) and its metric.
            modules: K rounded weights.
            importance: (in,), weights of squared errors: the mean of x².
            feedback: what the codes were rounded with; None for nearest ones.
        """
        height, width = weighed.dense.weight.shape
        most, what = min(max(self.residual), height, width), f"{weighed.linear}: residual"
        damping = None if feedback is None else feedback.damping
        if most == 0:
            return [
                Scheme(module, weighed.error(module.to_dense()), None, None, damping)
                for module in modules
            ]
        lost = [weighed.dense.weight.double() - module.to_dense() for module in modules]
        found = [decompose(error, weighed.metric, weighed.root, most, what) for error in lost]
        integers: list[IntegerResidual | None] = [None] * len(found)
        if self.residual_bits is not None:
            groups = (
                group_size(self.residual_group, height, weighed.linear),
                group_size(self.residual_group, width, weighed.linear),
            )
            dampings = () if feedback is None else self.damping
            codec = Codec(
                self.residual_bits,
                groups,
                self.ranges()[::3],
                dampings,
                self.block,
                weighed.dense.dtype,
            )
            metrics = weighed.metric, weighed.root, importance
            integers = [*round_residuals(what, lost, found, metrics, codec, feedback)]
        return [
            Scheme(module, part.tail[0].item() / (weighed.energy or 1.0), part, stored, damping)
            for module, part, stored in zip(modules, found, integers, strict=True)
        ]

    def candidates(self, state: Prepared) -> Curve:
        """List every scheme and rank that no smaller one matches.

        Errors are measured on the codes, also on those of residuals; residuals that are not
        integers follow in closed form.
        """
        weighed, found = state.weighed, list[Candidate]()
        sizes = self.sizes(weighed.dense, weighed.linear)
        self.solve(state, list(dict.fromkeys(scheme_of(size.setting) for size in sizes)))
        left = self.errors_behind(state, {size.setting.get("rank", 0) for size in sizes})
        for size in sizes:
            rank = size.setting.get("rank", 0)
            error = left[rank][scheme_of(size.setting)]
            rung = {} if state.damping is None else {"damping": state.damping}
            candidate = replace(size, setting=size.setting | rung, error=error)
            if found and found[-1].bits == size.bits and error < found[-1].error:
                found.pop()
            if not found or error < found[-1].error or (error == 0 and size.bits > found[-1].bits):
                found.append(candidate)
        return Curve(
            weighed.linear,
            self.name,
            tuple(found),
            weighed.dense.bits,
            weighed.dense.parameters,
            weighed.energy,
        )

    def errors_behind(
        self, state: Prepared, ranks: Iterable[int]
    ) -> dict[int, dict[tuple[int, int], float]]:
        """Measure the relative error of every scheme behind residuals of these ranks."""
        schemes, energy = state.schemes.values(), state.weighed.energy or 1.0
        found = {}
        for rank in ranks:
            if rank == 0:
                lost = [scheme.error for scheme in schemes]
            elif self.residual_bits is None:
                residuals = [one.residual for one in schemes if one.residual is not None]
                lost = [residual.tail[rank].item() / energy for residual in residuals]
            else:
                integers = [one.integers for one in schemes if one.integers is not None]
                lost = [error / energy for error in errors(integers, rank)]
            found[rank] = dict(zip(state.schemes, lost, strict=True))
        return found

    def compress(self, state: Prepared, setting: dict[str, Any]) -> CompressedLinear:
        self.solve(state, [scheme_of(setting)])
        scheme, rank, weighed = (
            state.schemes[scheme_of(setting)],
            setting.get("rank", 0),
            state.weighed,
        )
        module = copy.deepcopy(scheme.module)  # the state keeps its own
        if rank == 0:
            return module
        if scheme.integers is not None:
            return Adapted(module, *scheme.integers.pair(rank))
        if scheme.residual is None:
            raise ValueError(f"{weighed.linear}: no residual was decomposed; setting {setting}")
        pair = scheme.residual.pair(
            weighed.dense.weight.double() - module.to_dense(), weighed.root, rank
        )
        return Adapted(
            module,
            *(
                factor.to(weighed.dense.dtype, memory_format=torch.contiguous_format, copy=True)
                for factor in pair
            ),
        )

    def measure(self, state: Prepared, module: Approximation) -> float:
        return state.weighed.error(module.to_dense())
