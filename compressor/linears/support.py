"""Which matrix a storage kind keeps the entries of, and which entries."""

import torch
from torch import Tensor

from compressor.linears.base import CompressedLinear
from compressor.linears.dictionary import Dictionary
from compressor.linears.masks import unpack_mask
from compressor.linears.pruned import Pruned
from compressor.linears.sparse import Sparse
from compressor.linears.wrapped import GROUP, Wrapped


def grid(module: CompressedLinear) -> Tensor | None:
    """Mask (rows, columns) of the matrix whose entries inside it are `weight`, row-major; None for
    kinds that keep no entries.

    Sparse: Ŵ; dictionary: the codes; wrapped: the core; pruned: the kept outputs and inputs, all of
    them inside.
    """
    match module:
        case Sparse():
            return unpack_mask(module.mask, module.out_features * module.in_features).view(
                module.out_features, -1
            )
        case Dictionary():
            return unpack_mask(module.mask, module.out_features * module.atom_count).view(
                module.out_features, -1
            )
        case Wrapped():
            places = module.places()
            empty = torch.zeros(*places.shape[:2], GROUP, dtype=torch.bool, device=places.device)
            return empty.scatter(2, places, True).flatten(1)
        case Pruned():
            return torch.ones(
                module.outputs, module.inputs, dtype=torch.bool, device=module.weight.device
            )
    return None
