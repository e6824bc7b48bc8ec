"""LoRA that is merged back: every linear of the blocks learns s B A beside a frozen base, and is
stored in the size it had.

References: LoRA (arXiv 2106.09685) as healing, SVD-LLM's and LLM-Pruner's; merging into low-rank
storage is LoRA-Squeeze's exact QR route (arXiv 2602.10993) on [U sB] [V; A]; LoRA inside a mask is
PERP's MaskLoRA (arXiv 2312.15230) and SQFT's SparsePEFT (arXiv 2410.03750).

Glossary
    up B     (out, r), zero at the start
    down A   (r, in), normal with variance 1 / r
    scale s  median |W| / ZERO

What a kind stores decides where the product is added, and what merging does to it
    dense linear
        Ŵ + s B A; merged exactly.
    sparse, wrapped, dictionary, pruned
        s B A inside the mask is added to the matrix whose entries are stored: Ŵ, the core of
        `wrapped`, the codes of `dictionary`, the kept rows and columns of `pruned`; merged exactly.
    low rank, also pivoted, and residuals of `adapted`
        Ŵ + s B A, of rank r_stored + r, cut to r_stored by the best approximation in the metric of
        the inputs' mean squares; what that loses is for the judge of healing to see.
    packed, chained, and adapted with integer factors
        Nothing: integer codes take no sum without being rounded again. They stay frozen where other
        linears can learn; a model of nothing else is refused.

Differs from LoRA: the scale is not α / r. The learning rate of a tensor is relative to its own
size, and B has none at the start, where `loop` puts ZERO in its place; with this scale and variance
a step moves an entry of W by about the learning rate times the median of |W|, as when W itself
learns. A learns like any other tensor.

Memory beside the frozen model: r (in + out) numbers for each linear, four times with gradient and
moments; inside a mask, s B A and its gradient as matrices for each linear of the pass.
"""

from collections.abc import Iterable, Mapping
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compressor.errors import ConfigError
from compressor.hf import out_in
from compressor.linalg import Metric
from compressor.linalg.products import Product
from compressor.linears import CompressedLinear
from compressor.training.learners import Trainable, Values, collect_leaves, copy_masters
from compressor.training.loop import ZERO


def takes_lora(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Say whether a product can be merged into what a linear stores."""
    if isinstance(module, CompressedLinear):
        return module.can_absorb
    return isinstance(module, (nn.Linear, Conv1D))


class Lora(nn.Module):
    """A linear with a product beside it: y = module(x) + s · up · (down · x), or with s · up · down
    added inside a mask.
    """

    module: nn.Linear | Conv1D

    def __init__(self, module: nn.Linear | Conv1D, rank: int, generator: torch.Generator):
        """module: frozen, as it is (no copy)."""
        super().__init__()
        self.module, self.mask, weight = module, None, module.weight.detach()
        if isinstance(module, CompressedLinear):
            self.mask = module.support()
            weight = weight if self.mask is not None else module.to_dense()
        height, width = out_in(module) if self.mask is None else self.mask.shape
        rank = min(rank, height, width)
        down = torch.randn(rank, width, generator=generator) / rank**0.5
        self.scale = (weight.abs().median().item() or ZERO) / ZERO
        self.up = nn.Parameter(weight.new_zeros(height, rank), requires_grad=False)
        self.down = nn.Parameter(down.to(weight), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        if self.mask is None:
            return self.module(input) + self.scale * functional.linear(
                functional.linear(input, self.down), self.up
            )
        return functional_call(self.module, {"weight": self.inside(self.mask)}, (input,))

    def inside(self, mask: Tensor) -> Tensor:
        """Return the entries (n,) inside the mask, with what has been learned."""
        return self.module.weight + self.scale * (self.up @ self.down)[mask]

    @torch.no_grad()
    def merge(self, metric: Metric, linear: str) -> dict[str, Tensor]:
        """Compute the tensors that change when the product becomes part of what is stored.

        Args:
            metric: (in, in), that of low-rank storage.
            linear: name for errors.

        Raises:
            NumericalError: the numbers are not finite.
        """
        module, product = self.module, self.product()
        if isinstance(module, CompressedLinear):
            return module.absorb(product, metric, linear)
        added = product.scale * (product.up @ product.down)
        return {"weight": module.weight + (added.T if isinstance(module, Conv1D) else added)}

    def product(self) -> Product:
        return Product(self.up.detach(), self.down.detach(), self.scale)


def select_mergeable(
    model: PreTrainedModel, modules: Mapping[str, nn.Module], scopes: Iterable[nn.Module]
) -> dict[str, nn.Module]:
    """Select the linears below `scopes` that take a product, by name.

    Raises:
        ConfigError: there are none.
    """
    leaves = collect_leaves(model, modules, scopes)
    linears: dict[str, nn.Module] = {
        name: module for name, module in leaves.items() if takes_lora(module)
    }
    if not linears:
        kinds = {module.kind for module in leaves.values() if isinstance(module, CompressedLinear)}
        raise ConfigError(
            "heal.train: lora has nothing to merge into, every linear is stored as integers "
            f"({', '.join(sorted(kinds))}); set heal.train to compressed, which trains their scales"
        )
    return linears


class Loras(Trainable):
    """Products beside linears, which are merged into what these store."""

    def __init__(
        self,
        model: PreTrainedModel,
        modules: Mapping[str, nn.Module],
        scopes: Iterable[nn.Module],
        rank: int,
        seed: int,
    ):
        """Put products beside copies of the linears.

        Args:
            modules: what is to stand in the model, by name.

        Raises:
            ConfigError: none of the linears takes a product.
        """
        self.originals = select_mergeable(model, modules, scopes)
        generator = torch.Generator().manual_seed(seed)
        self.loras = {
            name: Lora(copy, rank, generator)
            for name, copy in copy_masters(model, self.originals).items()
            if takes_lora(copy)
        }
        self.copies: dict[str, nn.Module] = dict(self.loras)
        self.parameters = {
            f"{name}.{side}": getattr(lora, side)
            for name, lora in self.loras.items()
            for side in ("up", "down")
        }
        self.metrics: dict[str, Metric] = {}  # in which products join low-rank storage

    def learned(self) -> Values:
        return {
            name: lora.merge(self.metrics.get(name, Metric()), name)
            for name, lora in self.loras.items()
        }

    @torch.no_grad()
    def measure_inputs(self, model: PreTrainedModel, batches: Iterable[Tensor]) -> None:
        """Take the sums of squares of inputs over all batches, (in,), as the metric of each linear
        with low-rank storage, while the products are in the model.
        """
        sums: dict[str, Tensor] = {}

        def add(name: str, input: Tensor) -> None:
            sums[name] = sums.get(name, 0) + input.double().flatten(0, -2).square().sum(0)

        hooks = [
            lora.register_forward_pre_hook(lambda module, args, name=name: add(name, args[0]))
            for name, lora in self.loras.items()
            if isinstance(lora.module, CompressedLinear) and lora.mask is None
        ]
        try:
            for batch in batches:
                model(input_ids=batch, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        self.metrics = {name: Metric(total) for name, total in sums.items()}
