"""Pruned: whole outputs and inputs of a linear are gone; what is left is a smaller dense matrix.

References: channels of feed-forward blocks, LoRAP (arXiv 2404.09695) and OSSCAR (arXiv 2403.12983);
dimensions of attention heads, MoDeGPT (arXiv 2408.09632). A removed channel of a gated block gives
zero, act(0) · 0, to the linear behind it, which does not read it.

Glossary
    weight    (outputs · inputs,) the matrix of the kept outputs and inputs, row-major
    rows      bit mask of the kept outputs, most significant bit first, ⌈out / 8⌉ bytes; absent
              where all are kept
    columns   bit mask of the kept inputs, ⌈in / 8⌉ bytes; absent where all are kept
    bias      (outputs,) of the kept outputs

Execution: inputs are gathered, multiplied by the small matrix, and scattered among zeros: the model
around it sees the widths it expects, so any architecture runs as it is. Gathering and scattering
move one number for each channel and token, the product saves thousands.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.linears.base import Blank, CompressedLinear
from compressor.linears.masks import pack_mask, unpack_mask


class Pruned(CompressedLinear):
    """y[rows] = weight · x[columns] + bias, zero elsewhere."""

    kind = "pruned"
    sizes: ClassVar = {"outputs": "kept_outputs", "inputs": "kept_inputs", "bias": "has_bias"}
    is_pruned = True
    can_absorb = True

    weight: nn.Parameter
    rows: Tensor | None
    columns: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        in_features: int,
        out_features: int,
        inputs: int,
        rows: Tensor | None,
        columns: Tensor | None,
    ):
        """Wrap stored tensors as they are (no copy, no cast).

        Args:
            weight: (outputs · inputs,) of the kept ones.
            bias: (outputs,) or None.
            inputs: how many are kept.
            rows: packed mask of the kept outputs, uint8, or None.
            columns: packed mask of the kept inputs, uint8, or None.
        """
        super().__init__(in_features, out_features)
        self.inputs, self.outputs = inputs, weight.numel() // inputs
        self.store(weight=weight, rows=rows, columns=columns, bias=bias)
        # indices behind the masks; derived from them on first use
        self._places: dict[str, Tensor] = {}

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        columns: Tensor | None,
        dtype: torch.dtype,
    ) -> Self:
        """Cut a dense linear down to the outputs and inputs inside masks.

        Args:
            weight: (out, in).
            bias: (out,) or None.
            rows: boolean (out,); None keeps all outputs.
            columns: boolean (in,); None keeps all inputs.
        """
        height, width = weight.shape
        matrix = weight if rows is None else weight[rows]
        matrix = matrix if columns is None else matrix[:, columns]
        bias = bias if bias is None or rows is None else bias[rows]
        return cls(
            matrix.flatten().to(dtype, copy=True),
            None if bias is None else bias.to(dtype, copy=True),
            width,
            height,
            matrix.shape[1],
            *(None if mask is None else pack_mask(mask) for mask in (rows, columns)),
        )

    @classmethod
    def empty(cls, spec: Mapping[str, Any], blank: Blank) -> Self:
        height, width = spec["out_features"], spec["in_features"]
        outputs = height if spec["outputs"] is None else spec["outputs"]
        inputs = width if spec["inputs"] is None else spec["inputs"]
        return cls(
            blank.floats(outputs * inputs),
            blank.bias(spec, outputs),
            width,
            height,
            inputs,
            None if spec["outputs"] is None else blank.bits(height),
            None if spec["inputs"] is None else blank.bits(width),
        )

    @property
    def kept_outputs(self) -> int | None:
        return None if self.rows is None else self.outputs

    @property
    def kept_inputs(self) -> int | None:
        return None if self.columns is None else self.inputs

    def places(self, side: str) -> Tensor:
        """Return the indices, int64 and ascending, of the kept `rows` or `columns`."""
        mask = getattr(self, side)
        if side not in self._places or self._places[side].device != mask.device:
            # An inference tensor could not be used by a training step later.
            with torch.inference_mode(False):
                length = self.out_features if side == "rows" else self.in_features
                self._places[side] = unpack_mask(mask.clone(), length).nonzero().flatten()
        return self._places[side]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._places = {}

    def matrix(self) -> Tensor:
        """Return the weight of the kept outputs and inputs, (outputs, inputs)."""
        return self.weight.view(self.outputs, self.inputs)

    def support(self) -> Tensor:
        return torch.ones(self.outputs, self.inputs, dtype=torch.bool, device=self.weight.device)

    def forward(self, input: Tensor) -> Tensor:
        gathered = input if self.columns is None else input[..., self.places("columns")]
        output = functional.linear(gathered, self.matrix(), self.bias)
        if self.rows is None:
            return output
        zeros = output.new_zeros(*output.shape[:-1], self.out_features)
        return zeros.index_copy(-1, self.places("rows"), output)

    def dense_bias(self) -> Tensor | None:
        if self.bias is None or self.rows is None:
            return self.bias
        return self.bias.new_zeros(self.out_features).index_copy(
            0, self.places("rows"), self.bias.detach()
        )

    def multiply_adds(self) -> int:
        return self.weight.numel()

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        matrix = self.matrix().to(torch.promote_types(self.weight.dtype, torch.float32))
        for side, dim, length in (("columns", 1, self.in_features), ("rows", 0, self.out_features)):
            if getattr(self, side) is not None:
                shape = list(matrix.shape)
                shape[dim] = length
                matrix = matrix.new_zeros(shape).index_copy(dim, self.places(side), matrix)
        return matrix
