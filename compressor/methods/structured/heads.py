"""Attention heads: value dimensions and whole heads are removed, and the output projection makes up
for what it can.

References: value and output projections as one module, MoDeGPT (arXiv 2408.09632); heads by
output-aware elimination, OSSCAR (arXiv 2403.12983); by the norm of their activations, TransAct
(arXiv 2407.05690).

Glossary (k key–value heads, each serving g query heads; hd = head_dim; mixed values z (k · g · hd,)
are the inputs of o_proj)
    V_h (hd, d), O_j (d, hd)   rows of v_proj and columns of o_proj of one head; z_j = Σ_t a_jt V_h
                               x_t
    basis of a head            K = Σ_j O_jᵀ F O_j = L Lᵀ over its g query heads, M = mean E z_j
                               z_jᵀ; E the eigenvectors of Lᵀ M L:
                               V' = Eᵀ Lᵀ V_h and O_j' = O_j L⁻ᵀ E change nothing, and put what the
                               output sees least of last
    score                      what a unit is worth; the lowest leave first. obs: the error of its
                               removal, renewed after every one;
                               transact: E z² over all of its inputs of o_proj, in the basis that
                               the model has
    unit                       what leaves at once: one value dimension of a key–value head (g
                               inputs of o_proj), or a whole head (g · hd)
F is the second moment of the output gradients (`two_sided`) or the identity. What is removed is
zero to the attention around it, so any
implementation of it runs as it is, with its own scale and cache.

Differs from the papers: the second moment of values is that of the mixed ones, which includes what
attention averages out; units are chosen over all heads of a block by backward elimination, and
o_proj is refitted over all heads; ranks may differ between heads.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compressor import linalg
from compressor.errors import ConfigError
from compressor.linalg import Metric
from compressor.linears import CompressedLinear, Pruned
from compressor.methods import register
from compressor.methods.base import Approximation, Member, Method, by_role, dense_size
from compressor.methods.structured.elimination import eliminate, refit
from compressor.plan import Candidate, Curve


@dataclass(frozen=True)
class Shape:
    """Layout of the heads of one attention module."""

    dim: int  # hd
    kv: int  # k
    group: int  # g, query heads of a key–value head


def shape_of(module: str, parts: Mapping[str, Member], roles: tuple[str, ...]) -> Shape:
    """Read the layout of heads off the shapes of projections.

    Raises:
        ConfigError: projections are fused or missing, or heads are not known; names the module.
    """
    few, many = ("k", "q") if "q" in roles else ("v", "o")
    if not set(roles) <= parts.keys():
        raise ConfigError(
            f"{module}: needs separate projections {', '.join(roles)}; leave it out of the "
            "targets of this method"
        )
    dim = parts[few].dense.head_dim
    rows = len(parts[few].dense.weight)
    columns = parts[many].dense.weight.shape[1 if many == "o" else 0]
    if not dim or dim % 2 or rows % dim or columns % rows:
        raise ConfigError(
            f"{module}: its heads are not known, or its queries and keys are normalised; leave it "
            "out of the targets of this method"
        )
    return Shape(dim, rows // dim, columns // rows)


@dataclass(frozen=True)
class Mixed:
    """Value and output projections of one module, in the basis that units leave, and the order in
    which they do.
    """

    module: str
    parts: dict[str, Member]
    shape: Shape
    basis: Tensor  # (k, hd, hd): z' = basis · z of each head; the identity for whole heads
    weight: Tensor  # o_proj in that basis (d, k · g · hd), float64
    moment: Tensor  # of z', with the ridge
    root: Tensor | None
    order: Tensor  # (units,)
    errors: Tensor  # (units,)
    energy: float


def order_inputs(shape: Shape) -> Tensor:
    """List the inputs of o_proj in the order (key–value head, dimension, query head), in which
    those that leave at once are neighbours, (k · g · hd,).
    """
    return (
        torch.arange(shape.kv * shape.group * shape.dim)
        .view(shape.kv, shape.group, shape.dim)
        .transpose(1, 2)
        .flatten()
    )


def identity_basis(shape: Shape, like: Tensor) -> Tensor:
    """Return the basis that heads have, (k, hd, hd)."""
    return torch.eye(shape.dim, dtype=torch.float64, device=like.device).expand(shape.kv, -1, -1)


@dataclass(frozen=True)
class _Values(Method[Mixed]):
    """Abstract removal of inputs of o_proj with the values that write them: a score, an order, a
    refit.
    """

    score: Literal["obs", "transact"] = "obs"
    metric: Literal["gram", "two_sided"] = "gram"  # of the output of o_proj
    # on the change of o_proj, relative to the mean square of its inputs
    ridge: Annotated[float, Field(gt=0)] = 1e-3
    shrink_grad_gram: Annotated[float, Field(ge=0, le=1)] = 0.1  # `two_sided` only

    roles: ClassVar[tuple[str, ...]]  # of its members

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram"} | ({"grad_gram"} if self.metric == "two_sided" else set()))

    @abstractmethod
    def inputs_at_once(self, shape: Shape) -> int:
        """Count the inputs of o_proj that leave at once."""

    @abstractmethod
    def basis(self, shape: Shape, output: Tensor, moment: Tensor) -> Tensor:
        """Choose the basis of each head's values, (k, hd, hd).

        Args:
            output: Lᵀ O (d, k · g · hd), o_proj with weighed outputs.
            moment: M (k · g · hd, k · g · hd), second moment of its inputs.
        """

    def units(self, shape: Shape) -> int:
        return shape.kv * shape.group * shape.dim // self.inputs_at_once(shape)

    def sizes_of_unit(self, members: Mapping[str, Member]) -> list[Candidate]:
        parts = by_role(members)
        shape = shape_of("a target", parts, self.roles)
        found = [self.size(parts, shape, kept) for kept in range(1, self.units(shape))]
        bits, parameters = dense_size(members)
        return [size for size in found if size.bits < bits and size.parameters < parameters]

    def size(self, parts: Mapping[str, Member], shape: Shape, kept: int) -> Candidate:
        bits = parameters = multiply_adds = 0
        share = kept * self.inputs_at_once(shape) / (shape.kv * shape.group * shape.dim)
        for role, part in parts.items():
            dense = part.dense
            height, width = dense.weight.shape
            numbers, mask = round(height * width * share), width if role == "o" else height
            biases = 0 if dense.bias is None else height if role == "o" else round(height * share)
            parameters, multiply_adds = parameters + numbers + biases, multiply_adds + numbers
            bits += (numbers + biases) * dense.dtype.itemsize * 8 + 8 * ((mask + 7) // 8)
        return Candidate(self.name, {self.name: kept}, bits, parameters, math.nan, multiply_adds)

    def prepare_unit(self, unit: str, members: Mapping[str, Member]) -> Mixed:
        """Order the units by what their removal costs.

        With z the inputs of o_proj (d, k · g · hd), M their second moment and F = L Lᵀ that of the
        output gradients, or I: change the basis of every head to z' = B z (see `basis`), which
        leaves O z = (O B⁻¹) z' as it is, and eliminate inputs of O B⁻¹ under
        B M Bᵀ + ridge · mean(diag) · I. The error of keeping K is the sum of the prices
        tr(Lᵀ O_P V_PP⁻¹ O_Pᵀ L) of what has left (see `elimination`). One elimination,
        O((k g hd)³), serves every size.
        """
        parts = by_role(members)
        shape = shape_of(unit, parts, self.roles)
        for part in parts.values():
            part.stats.require(part.linear, self.needs)
        output, stats, root = parts["o"].dense.weight.double(), parts["o"].stats, None
        moment = stats.total(parts["o"].linear, "gram").double() / stats.tokens
        what = f"{unit}: the moment of the mixed values"
        linalg.require_finite(moment, what)
        weighed = output
        if self.metric == "two_sided":
            root = stats.gradient_root(parts["o"].linear, self.shrink_grad_gram)
            weighed = root.T @ output
        energy = Metric(moment).energy(weighed)
        basis = (
            self.basis(shape, weighed, moment)
            if self.score == "obs"
            else identity_basis(shape, output)
        )
        whole = torch.block_diag(*basis.repeat_interleave(shape.group, 0))  # z' = whole · z
        inverse = torch.linalg.inv(whole)
        output, moment = output @ inverse, whole @ moment @ whole.T
        places, order = order_inputs(shape).to(output.device), None
        if self.score == "transact":
            order = (
                moment.diagonal()[places]
                .view(-1, self.inputs_at_once(shape))
                .sum(1)
                .argsort(stable=True)
            )
        level = self.ridge * moment.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        moment = moment + level * torch.eye(len(moment)).to(moment)
        weighed = (output if root is None else root.T @ output)[:, places]
        order, errors = eliminate(
            weighed, moment[places][:, places], self.inputs_at_once(shape), order, what
        )
        return Mixed(unit, parts, shape, basis, output, moment, root, order, errors, energy)

    def candidates(self, state: Mixed) -> Curve:
        errors = (
            (state.errors / state.energy).tolist()
            if state.energy > 0
            else [0.0] * len(state.errors)
        )
        found = [
            replace(size, error=errors[len(errors) - size.setting[self.name] - 1])
            for size in self.sizes_of_unit(state.parts)
        ]
        bits, parameters = dense_size(state.parts)
        return Curve(state.module, self.name, tuple(found), bits, parameters, state.energy)

    def kept(self, state: Mixed, setting: dict[str, Any]) -> Tensor:
        """Mask the inputs of o_proj that stay, (k · g · hd,)."""
        units = torch.ones(self.units(state.shape), dtype=torch.bool, device=state.order.device)
        units[state.order[: len(units) - setting[self.name]]] = False
        kept = torch.zeros(len(state.moment), dtype=torch.bool, device=units.device)
        kept[order_inputs(state.shape).to(units.device)] = units.repeat_interleave(
            self.inputs_at_once(state.shape)
        )
        return kept

    def compress_unit(
        self, state: Mixed, setting: dict[str, Any], outputs: Mapping[str, int]
    ) -> dict[str, CompressedLinear]:
        kept, shape = self.kept(state, setting), state.shape
        heads = kept.view(shape.kv, shape.group, shape.dim)
        rows = heads[
            :, 0
        ].flatten()  # a dimension stays for all query heads of a key–value head, or for none
        modules: dict[str, CompressedLinear] = {}
        for role, part in state.parts.items():
            dense = part.dense
            if role == "o":
                modules[part.linear] = Pruned.of(
                    refit(state.weight, state.moment, kept), dense.bias, None, kept, dense.dtype
                )
            elif role == "v":
                change = torch.block_diag(*state.basis)
                bias = None if dense.bias is None else change @ dense.bias.double()
                modules[part.linear] = Pruned.of(
                    change @ dense.weight.double(), bias, rows, None, dense.dtype
                )
            else:  # queries and keys of heads that stay
                modules[part.linear] = Pruned.of(
                    dense.weight, dense.bias, kept if role == "q" else rows, None, dense.dtype
                )
        return modules

    def measure_unit(self, state: Mixed, modules: Mapping[str, Approximation]) -> float:
        found = modules[state.parts["o"].linear].to_dense().double()
        return linalg.relative_error(
            state.weight, found, Metric(state.moment), state.root, state.energy
        )


@register
@dataclass(frozen=True)
class ValueDims(_Values):
    """Heads of fewer value dimensions; the key–value cache keeps its size.

    Dimensions leave in the basis in which the output sees least of the last ones. What has left is
    zero to the attention around it, which caches values of the full width.
    """

    name: ClassVar[str] = "value_dims"
    paper: ClassVar[str] = "MoDeGPT, arXiv 2408.09632"
    unit: ClassVar[str] = "vo"
    roles: ClassVar[tuple[str, ...]] = ("v", "o")

    def inputs_at_once(self, shape: Shape) -> int:
        return shape.group

    def basis(self, shape: Shape, output: Tensor, moment: Tensor) -> Tensor:
        """Diagonalise values and outputs of each head together: with K = Σ_j O_jᵀ F O_j = L Lᵀ over
        its query heads and M the mean of their moments, B = Eᵀ Lᵀ, E the eigenvectors of Lᵀ M L.
        Costs k eigenproblems of size hd.
        """
        found = []
        size = shape.group * shape.dim
        for start in range(0, shape.kv * size, size):
            heads = [
                slice(start + j * shape.dim, start + (j + 1) * shape.dim)
                for j in range(shape.group)
            ]
            seen = sum(
                (output[:, head].T @ output[:, head] for head in heads), moment.new_zeros(())
            )
            seen = linalg.shrink(seen, 1e-9) + torch.finfo(torch.float64).tiny * torch.eye(
                shape.dim
            ).to(seen)
            mixed = sum(moment[head, head] for head in heads) / shape.group
            root = linalg.cholesky(seen, "the moment of an output head", "ridge")
            _, vectors = linalg.eigh_descending(root.T @ mixed @ root, "the moment of a value head")
            found.append(vectors.T @ root.T)
        return torch.stack(found)


@register
@dataclass(frozen=True)
class Heads(_Values):
    """Fewer key–value heads and their query heads; the key–value cache keeps its size.

    What has left is zero to the attention around it, which caches all heads.
    """

    name: ClassVar[str] = "heads"
    paper: ClassVar[str] = "OSSCAR, arXiv 2403.12983"
    unit: ClassVar[str] = "attention"
    roles: ClassVar[tuple[str, ...]] = ("q", "k", "v", "o")

    def inputs_at_once(self, shape: Shape) -> int:
        return shape.group * shape.dim

    def basis(self, shape: Shape, output: Tensor, moment: Tensor) -> Tensor:
        return identity_basis(shape, output)
