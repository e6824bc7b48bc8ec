"""Add a method of your own and compress the bundled model with it.

    python examples/custom_method.py [OUTPUT]

Drops the inputs of a linear that carry least; input j is worth ‖W[:, j]‖² E x²_j. Nothing is
refitted, so expect it to lose to `channels` and `low_rank`.
"""

import math
import sys
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from compressor import compress
from compressor.config import load_recipe
from compressor.linalg.metric import Metric, relative_error
from compressor.linears import Dense, Pruned
from compressor.methods.base import LinearMethod
from compressor.methods.registry import register
from compressor.plan import Candidate, Curve
from compressor.statistics import LinearStats

State = tuple[
    str, Dense, Metric, Tensor
]  # name, weight, metric, inputs from the most to the least important


@register
@dataclass(frozen=True)
class KeepInputs(LinearMethod[State]):
    """Linears that read their most important inputs alone."""

    name: ClassVar[str] = "keep_inputs"
    paper: ClassVar[str] = "examples/custom_method.py"
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    sizes_offered: int = 16

    def sizes(self, dense: Dense) -> list[Candidate]:
        height, width = dense.weight.shape
        bias = 0 if dense.bias is None else height
        counts = sorted(
            {max(1, width * step // self.sizes_offered) for step in range(1, self.sizes_offered)}
        )
        numbers = {count: height * count + bias for count in counts}
        mask = 8 * math.ceil(width / 8)
        bits = dense.dtype.itemsize * 8
        return [
            Candidate(self.name, {"inputs": k}, n * bits + mask, n, math.nan, height * k)
            for k, n in numbers.items()
        ]

    def prepare(self, linear: str, dense: Dense, stats: LinearStats) -> State:
        stats.require(linear, self.needs)
        worth = dense.weight.double().square().sum(0) * stats.gram.diagonal()  # (in,)
        return linear, dense, Metric(stats.gram, 1 / stats.tokens), worth.argsort(descending=True)

    def candidates(self, state: State) -> Curve:
        linear, dense, metric, _ = state
        built = [(size, self.compress(state, size.setting)) for size in self.sizes(dense)]
        offered = tuple(replace(size, error=self.measure(state, module)) for size, module in built)
        return Curve(
            linear, self.name, offered, dense.bits, dense.parameters, metric.energy(dense.weight)
        )

    def compress(self, state: State, setting: dict[str, Any]) -> Pruned:
        _, dense, _, order = state
        kept = torch.zeros_like(order, dtype=torch.bool)
        kept[order[: setting["inputs"]]] = True
        return Pruned.of(dense.weight, dense.bias, rows=None, columns=kept, dtype=dense.dtype)

    def measure(self, state: State, module: Pruned) -> float:
        return relative_error(state[1].weight, module.to_dense(), state[2])


if __name__ == "__main__":
    settings = [
        "calibration.windows=16",
        "calibration.length=128",
        "evaluation.windows=8",
        "allocation.damage=relative_error",
    ]
    recipe = load_recipe(
        overrides=settings,
        options={"method": "keep_inputs", "allocation.keep": 0.9, "output.overwrite": True},
    )
    report = compress(recipe, sys.argv[1] if len(sys.argv) > 1 else "out/custom")
    print(f"kept {report['kept']['targets']:.3f} of the bits, KL {report['kl']:.4f} nats per token")
