"""Utilised rank: project a weight on the input and output subspaces that the data uses, Ŵ = P_out W
P_in.

References: utilised rank, arXiv 2407.04797.

Glossary
    V, λ       eigenpairs of the Gram G (in, in): input directions and their energy
    U, σ²      eigenpairs of W G Wᵀ: output directions and their energy
    inputs     k_in, outputs k_out: leading directions kept on either side, both at the same share p
               of cumulative energy
    core C     Uᵀ W V; since W − Ŵ = U (C − C[:k_out, :k_in]) Vᵀ, its error is a sum of C² λ outside
               the kept corner

Differs from the paper: the share p is not fixed but is the one knob that the budget bisects
(allocation `threshold`), and no fine-tuning follows. The one-sided optimum (`low_rank`, metric
`gram`) dominates it at equal rank; it serves as a diagnostic and a baseline.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from compressor import linalg
from compressor.linalg import Metric
from compressor.linears import Dense, LowRank
from compressor.linears.low_rank import pair_size
from compressor.methods import register
from compressor.methods.base import Approximation, LinearMethod
from compressor.methods.low_rank.low_rank import candidate, saves
from compressor.plan import Candidate, Curve
from compressor.statistics import LinearStats


@dataclass(frozen=True)
class Subspaces:
    """Input and output eigenbases of one linear."""

    linear: str
    dense: Dense
    metric: Metric  # G, per token
    input_energy: Tensor  # (in,) λ, descending
    inputs: Tensor  # (in, in) V
    output_energy: Tensor  # (k,) σ², descending, k = min(out, in)
    outputs: Tensor  # (out, k) U


@register
@dataclass(frozen=True)
class UtilizedRank(LinearMethod[Subspaces]):
    """Keep the directions that carry a share p of the energy, on the input and on the output
    side.
    """

    name: ClassVar[str] = "utilized_rank"
    paper: ClassVar[str] = "utilised rank, arXiv 2407.04797"

    storage: Literal["factors", "pivoted"] = "factors"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"gram"})

    def sizes(self, dense: Dense) -> list[Candidate]:
        pivoted = self.storage == "pivoted"
        sizes = {
            rank: pair_size(dense, rank, pivoted, dense.bias is not None)
            for rank in range(1, min(dense.weight.shape))
        }
        return [
            candidate(self.name, {"rank": rank}, size)
            for rank, size in sizes.items()
            if saves(dense, size)
        ]

    def prepare(self, linear: str, dense: Dense, stats: LinearStats) -> Subspaces:
        stats.require(linear, self.needs)
        metric = Metric(stats.gram, 1 / stats.tokens)
        input_energy, inputs = linalg.eigh_descending(
            stats.total(linear, "gram"), f"{linear}: the Gram"
        )
        output_energy, outputs = linalg.principal_outputs(dense.weight, metric, linear)
        return Subspaces(
            linear,
            dense,
            metric,
            input_energy.clamp(min=0) / stats.tokens,
            inputs,
            output_energy.clamp(min=0),
            outputs,
        )

    def candidates(self, state: Subspaces) -> Curve:
        dense, core = (
            state.dense,
            state.outputs.T @ state.dense.weight.double() @ state.inputs,
        )  # (k, in)
        kept = (
            (core.square() * state.input_energy).cumsum(0).cumsum(1)
        )  # energy of every leading corner
        energy, pivoted = kept[-1, -1].item(), self.storage == "pivoted"
        candidates, thresholds = [], []
        for share, outputs, inputs in zip(*self.corners(state), strict=True):
            size = pair_size(dense, min(inputs, outputs), pivoted, dense.bias is not None)
            if saves(dense, size):
                error = (
                    max(0.0, 1 - kept[outputs - 1, inputs - 1].item() / energy)
                    if energy > 0
                    else 0.0
                )
                candidates.append(
                    candidate(self.name, {"inputs": inputs, "outputs": outputs}, size, error)
                )
                thresholds.append(1 - share)
        return Curve(
            state.linear,
            self.name,
            tuple(candidates),
            dense.bits,
            dense.parameters,
            energy,
            thresholds=(*thresholds, 0.0),
        )

    def corners(self, state: Subspaces) -> tuple[list[float], list[int], list[int]]:
        """Shares p at which k_in or k_out steps, with k_out(p) and k_in(p); one corner for each
        rank, the largest share it reaches.
        """
        by_input = state.input_energy.cumsum(0) / state.input_energy.sum().clamp(
            min=torch.finfo(torch.float64).tiny
        )
        by_output = state.output_energy.cumsum(0) / state.output_energy.sum().clamp(
            min=torch.finfo(torch.float64).tiny
        )
        shares = torch.cat([by_input, by_output]).clamp(max=1).unique()  # ascending
        inputs = torch.searchsorted(by_input, shares).clamp(max=len(by_input) - 1) + 1
        outputs = torch.searchsorted(by_output, shares).clamp(max=len(by_output) - 1) + 1
        rank = torch.minimum(inputs, outputs)
        last = torch.cat([rank[1:] != rank[:-1], torch.tensor([True], device=rank.device)])
        return shares[last].tolist(), outputs[last].tolist(), inputs[last].tolist()

    def compress(self, state: Subspaces, setting: dict[str, Any]) -> LowRank:
        weight = state.dense.weight.double()
        inputs, outputs = (
            state.inputs[:, : setting["inputs"]],
            state.outputs[:, : setting["outputs"]],
        )
        core = outputs.T @ weight @ inputs  # (k_out, k_in)
        up, down = (
            (outputs, core @ inputs.T)
            if setting["outputs"] <= setting["inputs"]
            else (outputs @ core, inputs.T)
        )
        return LowRank.of(up, down, state.dense.bias, state.dense.dtype, self.storage == "pivoted")

    def measure(self, state: Subspaces, module: Approximation) -> float:
        return linalg.relative_error(state.dense.weight, module.to_dense(), state.metric)
