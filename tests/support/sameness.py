"""How tests compare two objects: what they store bit for bit, what they compute within rounding.

Two objects that hold the same numbers may run other kernels, by the strides or the alignment of
their tensors and by the processor. `torch.equal` on outputs is for one object called twice.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

COMPUTED = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}  # of the largest entry, by dtype


def is_same_tensor(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors have one dtype, shape and content, bit for bit."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    return torch.equal(
        *(tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in (found, expected))
    )


def assert_same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Fail unless two state dicts have the same names and, bit for bit, the same tensors."""
    assert found.keys() == expected.keys()
    assert not [
        name for name, tensor in expected.items() if not is_same_tensor(found[name], tensor)
    ]


def is_same_output(found: Tensor, expected: Tensor) -> bool:
    """Whether two results agree in dtype and shape, and in every entry within the rounding of their
    dtype.
    """
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    distance = (found.detach().double() - expected.detach().double()).abs().max()
    return bool(distance <= COMPUTED[expected.dtype] * expected.detach().abs().max())


def assert_same_output(found: Tensor, expected: Tensor) -> None:
    """Fail unless two results agree within the rounding of their dtype."""
    assert found.dtype == expected.dtype and found.shape == expected.shape, (
        found.dtype,
        found.shape,
        expected.dtype,
        expected.shape,
    )
    assert is_same_output(found, expected), (
        f"distance {(found - expected).abs().max():.3g} of {expected.abs().max():.3g}"
    )
