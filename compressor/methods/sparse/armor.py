"""A 2:4 sparse core between small block-diagonal wrappers.

References: ARMOR, arXiv 2510.05528. The descent is in `block_diagonal`.

Glossary
    core S            two of every four consecutive entries of a row stored         (their 2:4
                      matrix)
    wrappers A, B     block-diagonal, blocks of at most `wrapper` outputs or inputs; identities at
                      the start
    start             Wanda's mask, or that of ADMM with values by least squares, whichever errs
                      less

Differs from the paper: the error is that of the whole Gram, or the two-sided one, instead of its
diagonal; both moments are scaled to unit diagonals instead of NoWag's normalisation, which leaves
Wanda's mask as it is. Wrappers are least squares, block after block, and values conjugate
gradients, where the paper takes Adam steps; masks are renewed for all groups instead of sampled
ones. What is stored is measured against the start as it would be stored, and the better of the two
is kept. Blocks are the largest divisors that fit.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compressor.linears import Dense
from compressor.linears.wrapped import Wrapped
from compressor.methods import register
from compressor.methods.base import Approximation
from compressor.methods.sparse.admm import Problem, admm, projection, refit
from compressor.methods.sparse.base import Pattern, TwoSided, Weighed, require_divisible
from compressor.methods.sparse.block_diagonal import Factors, descend
from compressor.plan import Candidate, Curve
from compressor.statistics import LinearStats

PATTERN: Pattern = "2:4"
ITERATIONS, RHO, GROWTH, REFIT = 15, 0.1, 1.2, 10  # of ADMM, as in `sparse`


def divisor(width: int, most: int) -> int:
    """Largest divisor of `width` that is not above `most`."""
    return max(size for size in range(1, min(width, most) + 1) if width % size == 0)


def identity(width: int, size: int, like: Tensor) -> Tensor:
    """Blocks (width / size, size, size) of the identity."""
    return torch.eye(size, dtype=like.dtype, device=like.device).repeat(width // size, 1, 1)


def choose_core(problem: Problem) -> tuple[Tensor, Tensor, float]:
    """Choose the better of two sparse cores: values and mask (out, in), and its error."""
    project = projection(PATTERN, [0])
    mask = project(problem.weight[None])
    cores = [(problem.weight * mask[0], mask[0])]
    mask, values = admm(problem, project, 1, ITERATIONS, RHO, GROWTH)
    cores.append((refit(problem, problem.weight, mask, values, REFIT)[0], mask[0]))
    return min(
        ((core, mask, problem.error(core)) for core, mask in cores), key=lambda each: each[2]
    )


@dataclass(frozen=True)
class Started:
    """One linear and the sparse core that descent starts from."""

    weighed: Weighed
    core: Tensor  # (out, in), in the coordinates of the problem
    mask: Tensor
    lost: float  # its relative error


@register
@dataclass(frozen=True)
class Armor(TwoSided[Started]):
    """Two of four entries of a core between block-diagonal wrappers."""

    name: ClassVar[str] = "armor"
    paper: ClassVar[str] = "ARMOR, arXiv 2510.05528"

    wrapper: tuple[Annotated[int, Field(ge=1)], ...] = (4, 8, 16, 32)  # sizes of blocks offered
    sweeps: Annotated[int, Field(ge=0)] = 20  # at most
    steps: Annotated[int, Field(ge=0)] = 4  # of conjugate gradients in a sweep
    # the last sweep gained less than this share of the error
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 5e-3
    # solve every size for the curve; otherwise its errors are a guess that what is built corrects,
    # see `guess`
    measured: bool = False

    def sizes(self, dense: Dense) -> list[Candidate]:
        require_divisible(PATTERN, dense.weight.shape[1], "a target")
        height, width = dense.weight.shape
        found: dict[int, Candidate] = {}
        for most in self.wrapper:
            left, right = divisor(height, most), divisor(width, most)
            numbers = height * width // 2 + height * left + width * right
            parameters = numbers + (0 if dense.bias is None else height)
            bits = parameters * dense.dtype.itemsize * 8 + 8 * ((height * width // 2 + 3) // 4)
            executed = height * width + height * left + width * right
            if bits < dense.bits and parameters < dense.parameters:
                found.setdefault(
                    bits,
                    Candidate(self.name, {"wrapper": most}, bits, parameters, math.nan, executed),
                )
        return [found[bits] for bits in sorted(found)]

    def prepare(self, linear: str, dense: Dense, stats: LinearStats) -> Started:
        """Find the 2:4 core that descent starts from: the better of the largest entries of W̃
        (out, in) and ADMM on them. Costs one pair of eigenproblems and ITERATIONS products of the
        size of W M.
        """
        require_divisible(PATTERN, dense.weight.shape[1], linear)
        weighed = self.weigh(linear, dense, stats)
        core, mask, lost = choose_core(weighed.problem)
        return Started(weighed, core, mask, lost / (weighed.energy or 1.0))

    def candidates(self, state: Started) -> Curve:
        found: list[Candidate] = []
        dense = state.weighed.dense
        for size in self.sizes(dense):
            lost = (
                self.measure(state, self.compress(state, size.setting))
                if self.measured
                else guess(state, size)
            )
            if not found or lost < found[-1].error or lost == 0:
                found.append(replace(size, error=lost))
        return Curve(
            state.weighed.linear,
            self.name,
            tuple(found),
            dense.bits,
            dense.parameters,
            state.weighed.energy,
            screened=not self.measured,
        )

    def compress(self, state: Started, setting: dict[str, Any]) -> Wrapped:
        """Build the better of what descent comes to and its start, as they are stored."""
        height, width = state.core.shape
        left, right = (
            identity(size, divisor(size, setting["wrapper"]), state.core)
            for size in (height, width)
        )
        start = Factors(left, state.core, state.mask, right)
        found, _ = descend(state.weighed.problem, start, self.sweeps, self.steps, self.tolerance)
        return min(
            (store(state.weighed, factors) for factors in (found, start)),
            key=lambda module: self.measure(state, module),
        )

    def measure(self, state: Started, module: Approximation) -> float:
        return state.weighed.error(module.to_dense())


def guess(state: Started, size: Candidate) -> float:
    """Error of a size before it is solved: that of the start, less the share of the numbers it
    lacks that the wrappers bring back.
    """
    dense = state.weighed.dense
    lacking, whole = dense.parameters - size.parameters, dense.weight.numel()
    return state.lost * lacking / (whole - whole // 2)


def store(weighed: Weighed, factors: Factors) -> Wrapped:
    """Build the module of factors in the coordinates of the problem: their scales go to the
    wrappers, whose columns and rows then get norm 1.

    So the core has the scale of the weight, and no factor leaves the range of the stored dtype.
    """
    problem, dense = weighed.problem, weighed.dense
    left = factors.left / problem.outputs.view(
        *factors.left.shape[:2], 1
    )  # (out / b, b, b), rows divided
    right = factors.right / problem.inputs.view(factors.right.shape[0], 1, -1)  # columns divided
    tall, wide = left.norm(dim=1), right.norm(dim=2)  # of the columns of A and of the rows of B
    tall, wide = torch.where(tall > 0, tall, 1.0), torch.where(wide > 0, wide, 1.0)
    core = factors.core * tall.view(-1, 1) * wide.view(1, -1)
    return Wrapped.of(
        core, factors.mask, left / tall[:, None], right / wide[..., None], dense.bias, dense.dtype
    )
