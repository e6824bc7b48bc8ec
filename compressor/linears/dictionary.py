"""Sparse dictionary: every output is a combination of a few of k shared atoms, Ŵ = Sᵀ Dᵀ with
sparse codes S and a dense dictionary D.

References: CoSpaDi (arXiv 2509.22075), ROCKET (arXiv 2602.11008), COMPOT (arXiv 2602.15200);
DSFormer (arXiv 2312.13211) in blocks, where each of P slices of the inputs has a dictionary of its
own. A bit mask beats indices at these densities.

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
the pair, rebuilt for each pass. Sparse products are slower than dense ones at these densities.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.nn import functional

from compressor.errors import CheckpointError
from compressor.linears.base import Blank, CompressedLinear
from compressor.linears.masks import Masked, pack_mask
from compressor.linears.rebuilt import memoise


class Dictionary(Masked):
    """y = codes · (atoms · x) + bias, with codes[mask] = weight and zero elsewhere."""

    kind = "dictionary"
    sizes: ClassVar = {
        "blocks": "blocks",
        "atoms": "atom_count",
        "nonzeros": "nonzeros",
        "bias": "has_bias",
    }

    atoms: nn.Parameter

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

        Args:
            weight: (nonzeros,).
            atoms: (blocks · k, in / blocks); or the module that stores them.
            mask: packed mask of (out, blocks · k), uint8.
            bias: (out,) or None.
            lender: name of the linear that stores the atoms, if that is another one.
        """
        stored = atoms.dictionary() if isinstance(atoms, Dictionary) else atoms
        super().__init__(blocks * stored.shape[1], out_features)
        self.blocks, self.lender, self.atom_count = blocks, lender, stored.shape[0]
        if lender is None:
            self.store(weight=weight, atoms=stored, mask=mask, bias=bias)
        else:
            self.store(weight=weight, mask=mask, bias=bias)
            self.borrow(atoms)

    def spec(self) -> dict[str, Any]:
        return super().spec() | ({} if self.lender is None else {"lender": self.lender})

    @classmethod
    def empty(cls, spec: Mapping[str, Any], blank: Blank) -> Self:
        height, atoms, blocks = spec["out_features"], spec["atoms"], spec["blocks"]
        lender = spec.get("lender")
        own = Blank(blank.dtype) if lender else blank  # borrowed atoms take no memory
        return cls(
            blank.floats(spec["nonzeros"]),
            own.floats(atoms, spec["in_features"] // blocks),
            blank.bits(height * atoms),
            blank.bias(spec),
            height,
            blocks,
            lender,
        )

    @property
    def columns(self) -> int:
        return self.atom_count

    def bind(self, model: nn.Module) -> None:
        if self.lender is None:
            return
        lender = model.get_submodule(self.lender)
        source = lender.base if isinstance(lender, CompressedLinear) else None
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

    def borrow(self, source: CompressedLinear | Tensor) -> None:
        # Not a submodule: its tensors are stored where it stands.
        lent = source.base if isinstance(source, CompressedLinear) else source
        object.__setattr__(self, "lent", lent)

    def dictionary(self) -> Tensor:
        """Return the atoms (P · k, in / P), its own or borrowed; these in the dtype and on the
        device of the codes.
        """
        if self.lender is None:
            return self.atoms
        if isinstance(self.lent, Tensor):  # not bound to a model yet
            return self.lent
        assert isinstance(self.lent, Dictionary), "only a dictionary lends atoms"
        with align_module_device(self.lent):  # fetches what accelerate keeps elsewhere
            return self.lent.atoms.to(self.weight)

    def codes(self) -> Tensor:
        """Rebuild Sᵀ (out, P · k) in the dtype of the values, differentiable in them."""
        return self.matrix()

    def runs_as_pair(self) -> bool:
        """Say whether the pair takes fewer multiply-adds for a token than the dense product."""
        return self.multiply_adds() < self.in_features * self.out_features

    def multiply_adds(self) -> int:
        pair = self.atom_count * (self.in_features // self.blocks + self.out_features)
        return min(pair, self.in_features * self.out_features)

    def split(self, members: Mapping[str, int]) -> dict[str, "Dictionary"]:
        """Build the modules of the linears that are stacked in this one, by name; the first stores
        the atoms, the others borrow them.

        Args:
            members: linear → number of outputs, in the order of the rows.
        """
        masks = self.support().split(list(members.values()))
        weights = self.weight.detach().split([int(mask.sum()) for mask in masks])
        biases: tuple[Tensor | None, ...] = (None,) * len(masks)
        if self.bias is not None:
            biases = self.bias.detach().split(list(members.values()))
        modules: dict[str, Dictionary] = {}
        for name, mask, weight, bias in zip(members, masks, weights, biases, strict=True):
            lender = next(iter(modules), None)
            modules[name] = Dictionary(
                weight.clone(),
                self.atoms.detach() if lender is None else modules[lender],
                pack_mask(mask.flatten()),
                None if bias is None else bias.clone(),
                len(mask),
                self.blocks,
                lender,
            )
        return modules

    def _pair(self, input: Tensor, codes: Tensor, atoms: Tensor) -> Tensor:
        if self.blocks == 1:
            coordinates = functional.linear(input, atoms)
        else:
            slices = input.unflatten(-1, (self.blocks, -1))
            dictionaries = atoms.unflatten(0, (self.blocks, -1))
            coordinates = torch.einsum("...pi,pki->...pk", slices, dictionaries).flatten(-2)
        return functional.linear(coordinates, codes, self.bias)

    def forward(self, input: Tensor) -> Tensor:
        atoms = self.dictionary()
        if torch.is_grad_enabled() and (self.weight.requires_grad or atoms.requires_grad):
            return self._pair(input, self.codes(), atoms)
        if self.runs_as_pair():
            return self._pair(input, memoise((self.weight, self.mask), self.codes), atoms)
        dense = memoise(
            (self.weight, atoms, self.mask), lambda: self.to_dense().to(self.weight.dtype)
        )
        return functional.linear(input, dense, self.bias)

    @torch.no_grad()
    def to_dense(self) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        codes = self.codes().to(wide).unflatten(1, (self.blocks, -1))
        atoms = self.dictionary().to(wide).unflatten(0, (self.blocks, -1))
        return torch.einsum("opk,pki->opi", codes, atoms).flatten(1)
