"""Storage kinds: what can stand in for the weight of a linear."""

from typing import Any

import torch

from compressor.errors import CheckpointError, did_you_mean
from compressor.linears.adapted import Adapted
from compressor.linears.base import CompressedLinear, Dense
from compressor.linears.chained import Chained
from compressor.linears.dictionary import Dictionary
from compressor.linears.low_rank import LowRank
from compressor.linears.packed import Packed
from compressor.linears.pruned import Pruned
from compressor.linears.sparse import Sparse
from compressor.linears.wrapped import Wrapped

_ALL = (LowRank, Sparse, Adapted, Dictionary, Packed, Chained, Pruned, Wrapped)
KINDS: dict[str, type[CompressedLinear]] = {kind.kind: kind for kind in _ALL}

__all__ = ["KINDS", "CompressedLinear", "Dense", "build_empty", *(kind.__name__ for kind in _ALL)]


def build_empty(
    spec: dict[str, Any], dtype: torch.dtype, device: torch.device | str = "meta"
) -> CompressedLinear:
    """Allocate the module that `spec` describes. Raises CheckpointError for a kind this version
    does not know.
    """
    kind = spec.get("kind")
    if kind not in KINDS:
        raise CheckpointError(f"storage kind '{kind}' is unknown; {did_you_mean(str(kind), KINDS)}")
    return KINDS[kind].empty(spec, dtype, device)
