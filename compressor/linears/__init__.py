"""Storage kinds: each file holds one form in which the weight of a linear can be stored."""

from importlib import import_module
from pkgutil import iter_modules

from compressor.linears.adapted import Adapted
from compressor.linears.base import KINDS, Blank, CompressedLinear, Dense, build_empty
from compressor.linears.chained import Chained
from compressor.linears.dictionary import Dictionary
from compressor.linears.low_rank import LowRank
from compressor.linears.packed import Packed
from compressor.linears.pruned import Pruned
from compressor.linears.sparse import Sparse
from compressor.linears.wrapped import Wrapped

__all__ = [
    "KINDS",
    "Adapted",
    "Blank",
    "Chained",
    "CompressedLinear",
    "Dense",
    "Dictionary",
    "LowRank",
    "Packed",
    "Pruned",
    "Sparse",
    "Wrapped",
    "build_empty",
]

for _file in iter_modules(__path__):  # a kind registers itself when its file is imported
    import_module(f"{__name__}.{_file.name}")
