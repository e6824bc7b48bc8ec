"""Dense weight of a linear, and the abstract storage kind that stands in for it.

A storage kind is one file of this package. Other packages ask a kind what they need through the
hooks of `CompressedLinear`; the defaults are neutral or refuse.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from compressor.errors import CheckpointError, did_you_mean
from compressor.linalg import Metric
from compressor.linalg.products import Product


@dataclass(frozen=True)
class Dense:
    """Dense linear to be compressed: y = W x + b, with the dtype in which the result will be
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


@dataclass(frozen=True)
class Blank:
    """Allocator of stored tensors whose values are undefined."""

    dtype: torch.dtype  # of floating tensors
    device: torch.device | str = "meta"

    def floats(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=self.dtype, device=self.device)

    def words(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int32, device=self.device)

    def bits(self, count: int) -> Tensor:
        """Allocate `count` bits in whole bytes, (⌈count / 8⌉,) uint8."""
        return torch.empty((count + 7) // 8, dtype=torch.uint8, device=self.device)

    def bias(self, spec: Mapping[str, Any], height: int | None = None) -> Tensor | None:
        """Allocate the bias (out,), or (height,), if the spec has one."""
        return self.floats(height or spec["out_features"]) if spec["bias"] else None


KINDS: dict[str, type["CompressedLinear"]] = {}  # kind in specs → class


def build_empty(
    spec: Mapping[str, Any], dtype: torch.dtype, device: torch.device | str = "meta"
) -> "CompressedLinear":
    """Allocate the module that `spec` describes, values undefined.

    Args:
        spec: JSON description, as `CompressedLinear.spec` gives it.
        dtype: of floating tensors.

    Raises:
        CheckpointError: this version does not know the kind.
    """
    kind = spec.get("kind")
    if kind not in KINDS:
        raise CheckpointError(f"storage kind '{kind}' is unknown; {did_you_mean(str(kind), KINDS)}")
    return KINDS[kind].empty(spec, Blank(dtype, device))


class CompressedLinear(nn.Linear, ABC):
    """A linear y = Ŵ x + b that stores Ŵ (out, in) in fewer bits.

    It is an `nn.Linear` so that libraries which look for linears (PEFT adapters, device maps) find
    it; `weight` is one of the stored tensors and never has the dense shape (nor its transpose), so
    a reader without `compressor.hf` stops with a shape error.

    A subclass that names its `kind` is registered in `KINDS`.
    """

    kind: ClassVar[str]
    # key of the spec → attribute that holds it, beside the kind and the numbers of features
    sizes: ClassVar[Mapping[str, str]] = {"bias": "has_bias"}
    # outputs or inputs are gone together with those of the linears around it
    is_pruned: ClassVar[bool] = False
    # the places of the stored entries are a buffer `mask`, so others can be chosen
    has_movable_support: ClassVar[bool] = False
    can_absorb: bool = False  # whether `absorb` takes a product
    factor_names: tuple[str, ...] = ()  # parameters of the low-rank part

    weight: Tensor  # a buffer where codes are integers
    bias: nn.Parameter | None  # type: ignore[assignment]  # absent in most models
    lender: str | None = None  # linear that stores tensors which this one borrows
    lent: "CompressedLinear | Tensor | None" = None  # its module, or a tensor until that is there

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "kind" in vars(cls):
            KINDS[cls.kind] = cls

    def __init__(self, in_features: int, out_features: int):
        nn.Module.__init__(self)  # nn.Linear.__init__ would allocate the dense weight
        self.in_features, self.out_features = in_features, out_features

    def store(self, **tensors: Tensor | None) -> None:
        """Register tensors as they are (no copy, no cast): floating ones as parameters, others as
        buffers, None as absent.
        """
        for name, tensor in tensors.items():
            if tensor is None:
                self.register_parameter(name, None)
            elif tensor.is_floating_point():
                parameter = nn.Parameter(tensor, requires_grad=tensor.requires_grad)
                self.register_parameter(name, parameter)
            else:
                self.register_buffer(name, tensor)

    def spec(self) -> dict[str, Any]:
        """Return the JSON description from which `empty` rebuilds the module."""
        features = {"in_features": self.in_features, "out_features": self.out_features}
        return {"kind": self.kind, **features} | {
            key: getattr(self, attribute) for key, attribute in self.sizes.items()
        }

    @classmethod
    @abstractmethod
    def empty(cls, spec: Mapping[str, Any], blank: Blank) -> Self:
        """Allocate the module described by `spec`, its tensors from `blank`."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """Compute Ŵ (out, in) from the stored tensors, without autograd, in float32 (float64 if
        they are float64).
        """

    @abstractmethod
    def multiply_adds(self) -> int:
        """Count the multiply-adds for one token, as `forward` executes it."""

    @property
    def has_bias(self) -> bool:
        return self.bias is not None

    def dense_bias(self) -> Tensor | None:
        """Return the bias (out,) of the dense linear that this module stands for."""
        return self.bias

    def reset_parameters(self) -> None:
        """Draw nothing at random: every stored tensor comes from a decomposition or a
        checkpoint.
        """

    def bits(self) -> int:
        """Count the bits of every stored tensor, bias, indices and masks included: what the
        checkpoint holds, header apart.
        """
        return sum(
            tensor.numel() * tensor.element_size() * 8 for tensor in self.state_dict().values()
        )

    def stored_parameters(self) -> int:
        """Count the stored real numbers, bias included; indices, masks and pivots do not count."""
        return sum(
            tensor.numel() for tensor in self.state_dict().values() if tensor.is_floating_point()
        )

    # Hooks: what a kind lets other packages do with it.

    @property
    def base(self) -> "CompressedLinear":
        """Storage without a low-rank part that was added to it: the module itself, if none was."""
        return self

    def bind(self, model: nn.Module) -> None:
        """Find in the model, once all of its modules are in place, what this module borrows from
        others; most borrow nothing.

        Raises:
            CheckpointError: it is not there.
        """

    def borrow(self, source: "CompressedLinear | Tensor") -> None:
        """Take what this module borrows from another linear, or from a tensor until that is in its
        place.
        """
        raise TypeError(f"storage of kind '{self.kind}' borrows nothing")

    def trainable(self, train: str) -> dict[str, nn.Parameter]:
        """Return the parameters that learn, by name within the module.

        Args:
            train: as in the recipe; `low_rank` leaves all but the factors of a low-rank part as
                they are.
        """
        own = {
            name: parameter
            for name, parameter in self.named_parameters(recurse=False)
            if parameter.is_floating_point()
        }
        if train != "low_rank":
            return own
        return {name: parameter for name, parameter in own.items() if name in self.factor_names}

    def support(self) -> Tensor | None:
        """Return the mask (rows, columns) of the matrix whose entries inside it are `weight`,
        row-major; None for kinds that store no entries.
        """
        return None

    def low_rank_part(self) -> tuple[Tensor, Tensor] | None:
        """Return up (out, r) and down (r, in) that a further low-rank term would join, without
        autograd; None if there are none.
        """
        return None

    def absorb(self, product: Product, metric: Metric, linear: str) -> dict[str, Tensor]:
        """Compute the tensors that change when Ŵ + product is stored in the sizes of Ŵ.

        Args:
            product: of the shape of the support, if there is one, else (out, in).
            metric: (in, in), in which a low-rank part is approximated again.
            linear: name for errors.
        """
        support = self.support()
        if support is None:
            raise TypeError(f"{linear}: storage of kind '{self.kind}' takes no product")
        return {"weight": self.weight + product.scale * (product.up @ product.down)[support]}

    def extend(self, up: Tensor, down: Tensor, dtype: torch.dtype) -> "CompressedLinear":
        """Build a new module of Ŵ + up · down. up: (out, r); down: (r, in); dtype: of the factors
        as they are stored.
        """
        from compressor.linears.adapted import Adapted

        up, down = (
            factor.to(dtype, memory_format=torch.contiguous_format) for factor in (up, down)
        )
        return Adapted(deepcopy(self), up, down)

    def extended_size(self, rank: int, itemsize: int) -> tuple[int, int]:
        """Count (bits, parameters) after `extend` by `rank`. itemsize: bytes of a number in the
        factors.
        """
        numbers = rank * (self.in_features + self.out_features)
        return self.bits() + numbers * itemsize * 8, self.stored_parameters() + numbers

    @property
    def largest_extension(self) -> int:
        """Largest rank by which the shape lets the module be extended."""
        return min(self.in_features, self.out_features)


Modules = dict[str, CompressedLinear]  # module name → what is installed there
