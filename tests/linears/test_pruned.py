"""The pruned storage kind: gathered inputs, scattered outputs, and sizes."""

import pytest
import torch
from support.sameness import assert_same_output

from compressor.linears import Pruned

ROWS = torch.tensor([True, False, True, True, False, True, True, False, True])
COLUMNS = torch.tensor([True, True, False, True, False, True])
CASES = pytest.mark.parametrize(
    ("rows", "columns"),
    [(ROWS, None), (None, COLUMNS), (ROWS, COLUMNS)],
    ids=["rows", "columns", "both"],
)


def dense() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(9, 6, generator=generator), torch.randn(9, generator=generator)


def masked(rows, columns) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = dense()
    rows = torch.ones(9, dtype=torch.bool) if rows is None else rows
    columns = torch.ones(6, dtype=torch.bool) if columns is None else columns
    return weight * rows[:, None] * columns, bias * rows


@CASES
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_it_is_the_masked_dense_linear(rows, columns, biased):
    weight, bias = dense()
    module = Pruned.of(weight, bias if biased else None, rows, columns, torch.float32)
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))
    wanted, offset = masked(rows, columns)
    assert torch.equal(module.to_dense(), wanted)
    torch.testing.assert_close(module(x), x @ wanted.T + (offset if biased else 0))
    assert module(x[0, 0]).shape == (9,)


@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_take_whole_bytes(rows, columns, dtype):
    module = Pruned.of(*dense(), rows, columns, dtype)
    height, width = 6 if rows is not None else 9, 4 if columns is not None else 6
    masks = (2 if rows is not None else 0) + (
        1 if columns is not None else 0
    )  # bytes for 9 and for 6 bits
    assert module.bits() == 8 * (dtype.itemsize * (height * width + height) + masks)
    assert module.multiply_adds() == height * width and module.weight.ndim == 1


def test_loading_other_masks_takes_effect():
    one, other = (Pruned.of(*dense(), rows, None, torch.float32) for rows in (ROWS, ROWS.flip(0)))
    x = torch.ones(1, 6)
    one(x)
    one.load_state_dict(other.state_dict())
    assert_same_output(one(x), other(x))
