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

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.linears.base import CompressedLinear
from compressor.linears.masks import pack_mask, unpack_mask


class Pruned(CompressedLinear):
    """y[rows] = weight · x[columns] + bias, zero elsewhere."""

    kind = "pruned"

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

        weight: (outputs · inputs,) of the kept ones; inputs: how many are kept; rows, columns:
        packed masks, uint8, or None.
        """
        super().__init__(in_features, out_features)
        self.inputs, self.outputs = inputs, weight.numel() // inputs
        self.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias, requires_grad=bias.requires_grad)
        )
        self._places: dict[
            str, Tensor
        ] = {}  # indices behind the masks; derived from them on first use

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        columns: Tensor | None,
        dtype: torch.dtype,
    ) -> Self:
        """Cut a dense weight (out, in), with a bias (out,), down to boolean masks rows (out,) and
        columns (in,); None keeps all.
        """
        height, width = weight.shape
        kept = weight if rows is None else weight[rows]
        kept = kept if columns is None else kept[:, columns]
        bias = bias if bias is None or rows is None else bias[rows]
        packed = [None if mask is None else pack_mask(mask) for mask in (rows, columns)]
        cast = None if bias is None else bias.to(dtype, copy=True)
        return cls(kept.flatten().to(dtype, copy=True), cast, width, height, kept.shape[1], *packed)

    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "outputs": None if self.rows is None else self.outputs,
            "inputs": None if self.columns is None else self.inputs,
            "bias": self.bias is not None,
        }

    @classmethod
    def empty(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> Self:
        height, width = spec["out_features"], spec["in_features"]
        outputs, inputs = spec["outputs"], spec["inputs"]
        kept_height, kept_width = (
            height if outputs is None else outputs,
            width if inputs is None else inputs,
        )
        return cls(
            weight=torch.empty(kept_height * kept_width, dtype=dtype, device=device),
            bias=torch.empty(kept_height, dtype=dtype, device=device) if spec["bias"] else None,
            in_features=width,
            out_features=height,
            inputs=kept_width,
            rows=None
            if outputs is None
            else torch.empty((height + 7) // 8, dtype=torch.uint8, device=device),
            columns=None
            if inputs is None
            else torch.empty((width + 7) // 8, dtype=torch.uint8, device=device),
        )

    def places(self, side: str) -> Tensor:
        """Indices, int64 and ascending, of the kept `rows` or `columns`."""
        mask = getattr(self, side)
        if side not in self._places or self._places[side].device != mask.device:
            with torch.inference_mode(
                False
            ):  # an inference tensor could not be used by a training step later
                length = self.out_features if side == "rows" else self.in_features
                self._places[side] = unpack_mask(mask.clone(), length).nonzero().flatten()
        return self._places[side]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._places = {}

    def matrix(self) -> Tensor:
        """The kept outputs by the kept inputs."""
        return self.weight.view(self.outputs, self.inputs)

    def forward(self, input: Tensor) -> Tensor:
        gathered = input if self.columns is None else input[..., self.places("columns")]
        output = functional.linear(gathered, self.matrix(), self.bias)
        if self.rows is None:
            return output
        whole = output.new_zeros(*output.shape[:-1], self.out_features)
        return whole.index_copy(-1, self.places("rows"), output)

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
