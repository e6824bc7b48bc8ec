"""What stands in for the weight of a linear: the abstract storage kind, and the dense weight it
replaces.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Dense:
    """The dense linear to be compressed: y = W x + b, with the dtype in which the result will be
    stored.

    A bias of None means that the linear has none. Conv1D weights (in, out) are transposed before
    they come here.
    """

    weight: Tensor  # (out, in)
    bias: Tensor | None  # (out,)
    dtype: torch.dtype
    heights: tuple[int, ...] = ()  # outputs of each linear where several are stacked
    # outputs (of q, k, v) or inputs (of o) of one attention head; 0 where there are none, or they
    # are not known
    head_dim: int = 0

    @property
    def parameters(self) -> int:
        return self.weight.numel() + (0 if self.bias is None else self.bias.numel())

    @property
    def bits(self) -> int:
        return self.parameters * self.dtype.itemsize * 8


class CompressedLinear(nn.Linear, ABC):
    """A linear y = Ŵ x + b that stores Ŵ (out, in) in fewer bits.

    It is an `nn.Linear` so that libraries which look for linears (PEFT adapters, device maps) find
    it; `weight` is one of the stored tensors and never has the dense shape (nor its transpose), so
    a reader without `compressor.hf` stops with a shape error.
    """

    kind: ClassVar[str]

    def __init__(self, in_features: int, out_features: int):
        nn.Module.__init__(self)  # nn.Linear.__init__ would allocate the dense weight
        self.in_features, self.out_features = in_features, out_features

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """JSON description from which `empty` rebuilds the module: kind, sizes, bias."""

    @classmethod
    @abstractmethod
    def empty(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> Self:
        """Allocate the module described by `spec`; floating tensors in `dtype`, values
        undefined.
        """

    @abstractmethod
    def to_dense(self) -> Tensor:
        """Ŵ (out, in) without autograd, computed from the stored tensors in float32 (float64 if
        they are float64).
        """

    def dense_bias(self) -> Tensor | None:
        """Bias (out,) of the dense linear that this module stands for."""
        return self.bias

    def reset_parameters(self) -> None:
        """Nothing to draw at random: every stored tensor comes from a decomposition or a
        checkpoint.
        """

    def bind(self, model: nn.Module) -> None:
        """Find in the model, once all of its modules are in place, what this module borrows from
        others; most borrow nothing.

        Raises CheckpointError if it is not there.
        """

    def bits(self) -> int:
        """Bits of every stored tensor, bias, indices and masks included: what the checkpoint holds,
        header apart.
        """
        return sum(
            tensor.numel() * tensor.element_size() * 8 for tensor in self.state_dict().values()
        )

    @abstractmethod
    def multiply_adds(self) -> int:
        """Multiply-adds for one token, as `forward` executes it."""

    def stored_parameters(self) -> int:
        """Stored real numbers, bias included; indices, masks and pivots do not count."""
        return sum(
            tensor.numel() for tensor in self.state_dict().values() if tensor.is_floating_point()
        )


Modules = dict[str, CompressedLinear]  # module name → what is installed there
