"""The dictionary storage kind: examples by hand, the faster of its two products, and what is kept
between forward passes.
"""

import pytest
import torch
from torch import Tensor

from compressor.linears import Dictionary
from compressor.linears.masks import pack_mask


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def made(
    shape,
    blocks: int = 1,
    bias: bool = True,
    atoms: int = 3,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Dictionary:
    """Random atoms (`atoms` for each block) and random codes above 0.3: outputs with unequal
    numbers of nonzeros.
    """
    height, width = shape
    codes, offset = (
        random(height, blocks * atoms, seed=seed, dtype=dtype),
        random(height, seed=seed + 1, dtype=dtype),
    )
    dictionary, mask = (
        random(blocks * atoms, width // blocks, seed=seed + 2, dtype=dtype),
        random(*codes.shape, seed=seed) > 0.3,
    )
    return Dictionary(
        codes[mask], dictionary, pack_mask(mask.flatten()), offset if bias else None, height, blocks
    )


FEW_OR_MANY = pytest.mark.parametrize("atoms", [2, 14], ids=["pair", "dense"])


def test_by_hand():
    """Three atoms, two outputs in one byte of mask: output 0 is 2 × atom 0, output 1 is atom 1 − 3
    × atom 2.
    """
    module = Dictionary(
        weight=torch.tensor([2.0, 1.0, -3.0]),
        atoms=torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]),
        mask=torch.tensor([0b10001100], dtype=torch.uint8),
        bias=torch.tensor([0.5, 0.0]),
        out_features=2,
    )
    dense = torch.tensor([[2.0, 0.0, 4.0, 0.0], [-3.0, -2.0, -3.0, -3.0]])
    assert torch.equal(module.to_dense(), dense)
    assert torch.equal(module(torch.eye(4)), dense.T + module.bias)
    assert (module.in_features, module.out_features) == (4, 2)


def test_blocks_by_hand():
    """Two slices of two inputs with one atom each: the second atom sees inputs 2 and 3 only."""
    atoms = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    module = Dictionary(
        torch.tensor([1.0, 10.0]),
        atoms,
        torch.tensor([0b11000000], dtype=torch.uint8),
        None,
        1,
        blocks=2,
    )
    assert module.to_dense().tolist() == [[1.0, 2.0, 30.0, 40.0]]
    assert module(torch.ones(4)).tolist() == [73.0]


def test_the_pair_runs_where_it_takes_fewer_multiply_adds():
    """24 × 16 = 384 multiply-adds dense; k atoms take 40 k, in two blocks 32 for each atom."""
    assert made((24, 16), atoms=9).runs_as_pair() and not made((24, 16), atoms=10).runs_as_pair()
    assert (
        made((24, 16), 2, atoms=5).runs_as_pair() and not made((24, 16), 2, atoms=6).runs_as_pair()
    )


@FEW_OR_MANY
def test_repeated_passes_rebuild_nothing(atoms, monkeypatch):
    module, inputs = made((9, 12), atoms=atoms), random(3, 12)
    with torch.no_grad():
        first = module(inputs)
        monkeypatch.setattr(Dictionary, "codes", None)
        assert torch.equal(module(inputs), first)
