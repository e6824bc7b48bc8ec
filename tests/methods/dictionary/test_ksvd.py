"""The K-SVD reference: greedy pursuit, sweeps that never grow the error, and planted dictionaries,
in float64.
"""

import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from compressor.methods.dictionary.ksvd import BATCH, MEMORY, batch_size, ksvd, omp_codes, sweep


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(matrix: Tensor) -> Tensor:
    return matrix / matrix.norm(dim=0)


def error(targets: Tensor, dictionary: Tensor, codes: Tensor) -> float:
    return (targets - dictionary @ codes).square().sum().item()


def greedy(target: Tensor, dictionary: Tensor, count: int) -> Tensor:
    """Orthogonal matching pursuit of one target as it is defined, by least squares from scratch at
    each step.
    """
    chosen: list[int] = []
    for _ in range(count):
        codes = torch.zeros(dictionary.shape[1], dtype=torch.float64)
        if chosen:
            codes[chosen] = torch.linalg.lstsq(dictionary[:, chosen], target[:, None]).solution[
                :, 0
            ]
        scores = (dictionary.T @ (target - dictionary @ codes)).abs()
        scores[chosen] = -1
        chosen.append(int(scores.argmax()))
    codes = torch.zeros(dictionary.shape[1], dtype=torch.float64)
    codes[chosen] = torch.linalg.lstsq(dictionary[:, chosen], target[:, None]).solution[:, 0]
    return codes


@pytest.mark.parametrize("count", [1, 3, 7])
def test_pursuit_is_the_greedy_definition(count):
    dictionary, targets = unit(random(12, 9)), random(12, 15, seed=1)
    codes = omp_codes(dictionary.T @ dictionary, dictionary.T @ targets, count)
    expected = torch.stack([greedy(target, dictionary, count) for target in targets.T], dim=1)
    torch.testing.assert_close(codes, expected, rtol=1e-8, atol=1e-8)
    residual = targets - dictionary @ codes
    assert (
        (dictionary.T @ residual)[codes != 0].abs() < 1e-9
    ).all()  # orthogonal to the atoms in use


class PeakMemory(TorchDispatchMode):
    """Most bytes that tensors made under this mode held at once."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.live:
                    self.live[storage.data_ptr()] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage.data_ptr(), None)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def test_pursuit_holds_no_more_than_its_memory():
    atoms, targets, count, memory = 128, 1024, 64, 2**23
    dictionary = unit(random(96, atoms).float())
    gram, correlations = dictionary.T @ dictionary, dictionary.T @ random(96, targets).float()
    answer = 2 * 4 * atoms * targets  # in batches, and joined
    with PeakMemory() as bounded:
        omp_codes(gram, correlations, count, memory)
    with PeakMemory() as unbounded:
        omp_codes(gram, correlations, count)
    assert memory / 2 < bounded.peak < memory + answer
    assert unbounded.peak > 2 * memory


def test_batches_are_the_published_ones_wherever_they_fit():
    assert batch_size(512, 256, 4, MEMORY) < BATCH == batch_size(256, 96, 4, MEMORY)
    assert batch_size(2184, 1092, 4, MEMORY) * 1092**2 * 4 < MEMORY  # a linear of an 8B model
    assert batch_size(2184, 1092, 4, 1) == 1


def test_pursuit_in_batches_is_pursuit(monkeypatch):
    from compressor.methods.dictionary import ksvd as module

    dictionary, targets = unit(random(12, 9)), random(12, 15, seed=1)
    whole = omp_codes(dictionary.T @ dictionary, dictionary.T @ targets, 3)
    monkeypatch.setattr(module, "BATCH", 4)
    torch.testing.assert_close(
        omp_codes(dictionary.T @ dictionary, dictionary.T @ targets, 3), whole
    )


def test_pursuit_passes_over_dependent_and_absent_atoms():
    dictionary = torch.zeros(4, 5, dtype=torch.float64)
    dictionary[0, 0] = dictionary[0, 1] = dictionary[1, 2] = dictionary[2, 3] = (
        1.0  # atoms 0 and 1 are the same, atom 4 is zero
    )
    targets = torch.tensor([[5.0], [2.0], [1.0], [0.0]], dtype=torch.float64)
    codes = omp_codes(dictionary.T @ dictionary, dictionary.T @ targets, 5)
    assert codes.flatten().tolist() == pytest.approx([5.0, 0.0, 2.0, 1.0, 0.0])
    assert (
        omp_codes(dictionary.T @ dictionary, torch.zeros(5, 3, dtype=torch.float64), 2) == 0
    ).all()


def test_planted_codes_are_recovered():
    """20: incoherent atoms, s ≪ k."""
    dictionary = unit(random(60, 40))
    planted = random(40, 25, seed=1)
    planted = (planted + planted.sign()) * (random(40, 25, seed=2).argsort(0) < 3)
    codes = omp_codes(dictionary.T @ dictionary, dictionary.T @ dictionary @ planted, 3)
    torch.testing.assert_close(codes, planted, rtol=1e-8, atol=1e-8)


def test_a_sweep_never_grows_the_error_and_keeps_the_supports():
    dictionary, targets = unit(random(12, 9)), random(12, 40, seed=1)
    codes = omp_codes(dictionary.T @ dictionary, dictionary.T @ targets, 3)
    before = dictionary.clone(), codes.clone()
    for _ in range(4):
        swept, moved = sweep(targets, dictionary, codes)
        assert error(targets, swept, moved) <= error(targets, dictionary, codes) * (1 + 1e-12)
        assert torch.equal(moved == 0, codes == 0)
        torch.testing.assert_close(swept.norm(dim=0), torch.ones(9, dtype=torch.float64))
        assert torch.equal(dictionary, before[0]) and torch.equal(codes, before[1])
        dictionary, codes = swept, moved
        before = dictionary.clone(), codes.clone()


def test_one_atom_becomes_the_leading_direction():
    """By hand: with every target on its only atom, a sweep is the power method, here for columns
    (3, 0) and (0, 1) and (3, 0).
    """
    targets = torch.tensor([[3.0, 0.0, 3.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    start = torch.tensor([[0.6], [0.8]], dtype=torch.float64)
    dictionary, codes = sweep(
        targets, start, torch.ones(1, 3, dtype=torch.float64), power_iterations=30
    )
    torch.testing.assert_close(dictionary[:, 0], torch.tensor([1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(codes, torch.tensor([[3.0, 0.0, 3.0]], dtype=torch.float64))


def test_unused_atoms_stay():
    targets, dictionary, codes = (
        random(5, 8),
        unit(random(5, 3, seed=1)),
        torch.ones(3, 8, dtype=torch.float64),
    )
    codes[1] = 0
    swept, _ = sweep(targets, dictionary, codes)
    assert torch.equal(swept[:, 1], dictionary[:, 1]) and not torch.equal(
        swept[:, 0], dictionary[:, 0]
    )


def test_rounds_lower_the_error_and_the_seed_decides():
    targets = random(16, 60) * torch.logspace(0, -1, 16, dtype=torch.float64)[:, None]

    def run(rounds: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        return ksvd(targets, 8, 3, rounds, torch.Generator().manual_seed(seed), flat=0.0)

    errors = [error(targets, *run(rounds)) for rounds in (1, 3, 9)]
    assert errors[0] > errors[1] > errors[2]
    assert all(torch.equal(one, two) for one, two in zip(run(2), run(2), strict=True))
    assert not torch.equal(run(2)[0], run(2, seed=1)[0])
    assert ((run(2)[1] != 0).sum(0) <= 3).all()
    early = ksvd(targets, 8, 3, 50, torch.Generator().manual_seed(0), flat=0.5)
    assert torch.equal(early[0], run(2)[0])  # the second round gains less than half


def test_zero_targets_are_no_trouble():
    dictionary, codes = ksvd(
        torch.zeros(6, 9, dtype=torch.float64), 4, 2, 3, torch.Generator().manual_seed(0)
    )
    assert torch.isfinite(dictionary).all() and (codes == 0).all()
