"""Memory of what a module computes from its stored tensors, between forward passes."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def memoise(tensors: Sequence[Tensor], build: Callable[[], Tensor]) -> Tensor:
    """Return what `build` computes from the stored `tensors`, without autograd; built again when
    one of them is not what it was.

    The result lives on the first tensor's own object: casts, moves and in-place writes change the
    key, and whoever puts another object in place (assignment while loading, accelerate while
    offloading) takes the result away with the old one. Only in-place writes through `.data` go
    unseen, since PyTorch does not count them.
    """
    if any(tensor.is_inference() for tensor in tensors):  # such tensors do not count their versions
        return build()
    key = [(tensor.data_ptr(), tensor._version, tensor.dtype, tensor.device) for tensor in tensors]
    known, result, _ = getattr(tensors[0], "_memo", (None, None, None))
    if result is not None and known == key:
        return result
    # An inference tensor could not be used by a training step later.
    with torch.inference_mode(False), torch.no_grad():
        result = build()
    # Holding the storages keeps their addresses from being given to what a cast or `.data =` puts
    # in their place.
    storages = [tensor.untyped_storage() for tensor in tensors]
    tensors[0]._memo = key, result, storages  # type: ignore[attr-defined]  # lives on the object
    return result
