"""Sparse dictionary: every output is a combination of a few of k shared atoms, Ŵ = Sᵀ Dᵀ with
sparse codes S and a dense dictionary D.

References: CoSpaDi (arXiv 2509.22075), ROCKET (arXiv 2602.11008), COMPOT (arXiv 2602.15200);
DSFormer (arXiv 2312.13211) in blocks, where each of P slices of the inputs has a dictionary of its
own. A bit mask beats indices at these densities (sparse-dictionary card §10.1).

Glossary
    atoms   (k, in) Dᵀ; in P blocks (P · k, in / P), the atoms of the first slice first
    codes   (out, P · k) Sᵀ, rebuilt from:
    weight  (nonzeros,) the codes inside the mask, row-major, so that the codes of an output are
            contiguous; rows may differ in number
    mask    bit mask of the codes, row-major, most significant bit first, ⌈out · P · k / 8⌉ bytes; a
            code inside it may be zero

Linears that share a dictionary store it once: one of them has the atoms, the others name it in
their spec and borrow.

Execution: as a pair, codes · (atoms · x), where that takes fewer multiply-adds for a token than the
dense product, K (in / P + out) < in · out with K = P · k atoms in all, and as the dense Ŵ
otherwise: with half of the codes kept the pair wins below 0.75 of the dense size for a square
weight, below 0.6 for one 3.5 times as tall as wide. What is multiplied by, codes or Ŵ, is rebuilt
once and kept in memory beside the stored tensors; with autograd on the stored tensors it is always
the pair, rebuilt for each pass. Sparse products are slower than dense ones at these densities (card
§10.2).
"""

from collections.abc import Mapping
from typing import Any, Self

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.nn import functional

from compressor.errors import CheckpointError
from compressor.linears.base import CompressedLinear
from compressor.linears.masks import pack_mask, unpack_mask
from compressor.linears.rebuilt import kept


class Dictionary(CompressedLinear):
    """y = codes · (atoms · x) + bias, with codes[mask] = weight and zero elsewhere."""

    kind = "dictionary"

    def __init__(
        self,
        weight: Tensor,
        atoms: "Tensor | Dictionary",
        mask: Tensor,
        bias: Tensor | None,
        out_features: int,
        blocks: int = 1,
        lender: str | None = None,
    ):
        """Wrap stored tensors as they are (no copy, no cast).

        weight: (nonzeros,); mask: packed mask of (out, blocks · k), uint8; bias: (out,) or None.
        atoms: (blocks · k, in / blocks); with `lender`, the name of the linear that stores them,
        that linear's module.
        """
        shape = (atoms.dictionary() if isinstance(atoms, Dictionary) else atoms).shape
        super().__init__(blocks * shape[1], out_features)
        self.blocks, self.lender, self.atom_count = blocks, lender, shape[0]
        self.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)
        if lender is None:
            self.atoms = nn.Parameter(atoms, requires_grad=atoms.requires_grad)
        else:
            self.borrow(atoms)
        self.register_buffer("mask", mask)
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias, requires_grad=bias.requires_grad)
        )

    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "blocks": self.blocks,
            "atoms": self.atom_count,
            "nonzeros": self.weight.numel(),
            "bias": self.bias is not None,
        } | ({} if self.lender is None else {"lender": self.lender})

    @classmethod
    def empty(cls, spec: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> Self:
        height, atoms, floating = (
            spec["out_features"],
            spec["atoms"],
            {"dtype": dtype, "device": device},
        )
        lender = spec.get("lender")
        return cls(
            weight=torch.empty(spec["nonzeros"], **floating),
            atoms=torch.empty(
                atoms,
                spec["in_features"] // spec["blocks"],
                **floating | ({"device": "meta"} if lender else {}),
            ),
            mask=torch.empty((height * atoms + 7) // 8, dtype=torch.uint8, device=device),
            bias=torch.empty(height, **floating) if spec["bias"] else None,
            out_features=height,
            blocks=spec["blocks"],
            lender=lender,
        )

    def bind(self, model: nn.Module) -> None:
        if self.lender is None:
            return
        source = getattr(model.get_submodule(self.lender), "base", model.get_submodule(self.lender))
        if (
            not isinstance(source, Dictionary)
            or source.lender
            or source.atoms.shape != (self.atom_count, self.in_features // self.blocks)
        ):
            raise CheckpointError(
                f"{self.lender}: a linear borrows its dictionary, but it stores none of "
                f"{self.atom_count} atoms"
            )
        self.borrow(source)

    def borrow(self, source: "Tensor | Dictionary") -> None:
        """Take the atoms from another linear, or from a tensor until that is in its place."""
        object.__setattr__(
            self, "lent", source
        )  # not a submodule: its tensors are stored where it stands

    def dictionary(self) -> Tensor:
        """The atoms (P · k, in / P), its own or borrowed; these in the dtype and on the device of
        the codes.
        """
        if self.lender is None:
            return self.atoms
        if isinstance(self.lent, Tensor):  # not bound to a model yet
            return self.lent
        with align_module_device(self.lent):  # fetches what accelerate keeps elsewhere
            return self.lent.atoms.to(self.weight)

    def codes(self) -> Tensor:
        """Sᵀ (out, P · k) in the dtype of the values, differentiable in them."""
        size = self.out_features * self.atom_count
        mask = unpack_mask(self.mask, size)
        return (
            self.weight.new_zeros(size)
            .masked_scatter(mask, self.weight)
            .view(self.out_features, -1)
        )

    def runs_as_pair(self) -> bool:
        """Whether the pair takes fewer multiply-adds for a token than the dense product."""
        return self.multiply_adds() < self.in_features * self.out_features

    def multiply_adds(self) -> int:
        pair = self.atom_count * (self.in_features // self.blocks + self.out_features)
        return min(pair, self.in_features * self.out_features)

    def split(self, members: Mapping[str, int]) -> dict[str, "Dictionary"]:
        """Modules of the linears that are stacked in this one, by name; the first stores the atoms,
        the others borrow them.

        members: linear → number of outputs, in the order of the rows.
        """
        mask = unpack_mask(self.mask, self.out_features * self.atom_count).view(
            self.out_features, -1
        )
        masks = mask.split(list(members.values()))
        weights = self.weight.detach().split([int(part.sum()) for part in masks])
        biases = (
            [None] * len(masks)
            if self.bias is None
            else self.bias.detach().split(list(members.values()))
        )
        found: dict[str, Dictionary] = {}
        for name, part, weight, bias in zip(members, masks, weights, biases, strict=True):
            lender = next(iter(found), None)
            atoms = self.atoms.detach() if lender is None else found[lender]
            bias = None if bias is None else bias.clone()
            found[name] = Dictionary(
                weight.clone(),
                atoms,
                pack_mask(part.flatten()),
                bias,
                len(part),
                self.blocks,
                lender,
            )
        return found

    def _pair(self, input: Tensor, codes: Tensor, atoms: Tensor) -> Tensor:
        if self.blocks == 1:
            coordinates = functional.linear(input, atoms)
        else:
            slices, parts = (
                input.unflatten(-1, (self.blocks, -1)),
                atoms.unflatten(0, (self.blocks, -1)),
            )
            coordinates = torch.einsum("...pi,pki->...pk", slices, parts).flatten(-2)  # (…, P · k)
        return functional.linear(coordinates, codes, self.bias)

    def forward(self, input: Tensor) -> Tensor:
        atoms = self.dictionary()
        if torch.is_grad_enabled() and (self.weight.requires_grad or atoms.requires_grad):
            return self._pair(input, self.codes(), atoms)
        if self.runs_as_pair():
            return self._pair(input, kept((self.weight, self.mask), self.codes), atoms)
        dense = kept((self.weight, atoms, self.mask), lambda: self.to_dense().to(self.weight.dtype))
        return functional.linear(input, dense, self.bias)

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        codes, atoms = (
            self.codes().to(wide).unflatten(1, (self.blocks, -1)),
            self.dictionary().to(wide).unflatten(0, (self.blocks, -1)),
        )
        return torch.einsum("opk,pki->opi", codes, atoms).flatten(1)
