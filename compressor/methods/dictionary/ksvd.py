"""K-SVD over orthogonal matching pursuit, as CoSpaDi publishes it: the slow reference that fast
solvers are held to.

References: CoSpaDi, arXiv 2509.22075 (60 rounds, 8 power iterations for each atom, first atoms
drawn from the columns); K-SVD, Aharon, Elad and Bruckstein 2006; OMP grown by Cholesky factors for
a batch of targets, Rubinstein, Zibulevsky and Elad 2008.

Glossary
    targets A (r, n)   dictionary D (r, k), unit columns   codes S (k, n), at most `count` nonzeros
                       in each column
    H = DᵀD            α = Dᵀ (a − D s), what the residual of a target correlates to with every atom
    L Lᵀ = H           on the atoms that a target has selected; `inverse` holds L⁻¹, a row for each
                       step
"""

import torch
from torch import Tensor

# an atom whose squared distance from the span of the selected ones is below this adds nothing
DEPENDENT = 1e-8
BATCH = 8192  # targets coded together, as published; fewer where memory bounds them
MEMORY = 2**30  # bytes that one batch may hold


def batch_size(atoms: int, count: int, itemsize: int, memory: int) -> int:
    """Count the targets that one batch of the pursuit may hold.

    Each target holds L⁻¹ (s, s), at most six vectors (k,), of its codes, its residual and their
    temporaries, and about eight vectors (s,).
    """
    held = (count**2 + 6 * atoms + 8 * count) * itemsize
    return max(1, min(BATCH, memory // held))


def omp_codes(gram: Tensor, correlations: Tensor, count: int, memory: int = MEMORY) -> Tensor:
    """Code targets by orthogonal matching pursuit: the atom of largest |α|, then least squares on
    all selected, `count` times. Costs O(n s (k² + s²)) for n targets.

    A target that meets a dependent atom spends a step on it and keeps fewer nonzeros.

    Args:
        gram: H (k, k), unit diagonal, or zero for atoms that are zero.
        correlations: DᵀA (k, n).
        count: s, nonzeros of each target.
        memory: bytes that the pursuit may hold at once, its answer apart.

    Returns:
        Codes (k, n).
    """
    size = batch_size(len(gram), count, correlations.element_size(), memory)
    return torch.cat(
        [_omp_batch(gram, batch, count) for batch in correlations.split(size, dim=1)], dim=1
    )


def _omp_batch(gram: Tensor, correlations: Tensor, count: int) -> Tensor:
    wanted = correlations.T.contiguous()  # (n, k)
    targets, rows = len(wanted), torch.arange(len(wanted), device=wanted.device)
    codes, residual, taken = (
        torch.zeros_like(wanted),
        wanted,
        torch.zeros_like(wanted, dtype=torch.bool),
    )
    chosen = torch.zeros(targets, count, dtype=torch.int64, device=wanted.device)
    inverse, values = wanted.new_zeros(targets, count, count), wanted.new_zeros(targets, count)
    for step in range(count):
        pick = residual.abs().masked_fill(taken, -1).argmax(1)
        taken[rows, pick], chosen[:, step] = True, pick
        known = inverse[:, :step, :step]
        across = torch.bmm(
            known, gram[pick].gather(1, chosen[:, :step])[:, :, None]
        )  # L⁻¹ H[selected, pick], (n, t, 1)
        distance = gram.diagonal()[pick] - across.square().sum((1, 2))
        scale = torch.where(distance > DEPENDENT, distance.clamp(min=DEPENDENT).rsqrt(), 0.0)[
            :, None
        ]
        inverse[:, step, :step] = -scale * torch.bmm(across.mT, known)[:, 0]
        inverse[:, step, step] = scale[:, 0]
        gain = (
            scale * residual[rows, pick][:, None]
        )  # coefficient of the new direction, orthonormal to the earlier ones
        values[:, : step + 1] += gain * inverse[:, step, : step + 1]
        codes.scatter_(1, chosen[:, : step + 1], values[:, : step + 1])
        residual = wanted - codes @ gram
    return codes.T


def sweep(
    targets: Tensor, dictionary: Tensor, codes: Tensor, power_iterations: int = 8
) -> tuple[Tensor, Tensor]:
    """Sweep once over the atoms: each in turn becomes the leading direction of what it must
    explain, its codes the projections on it.

    No update grows the error, and none changes which codes are zero. Power iterations start from
    the atom as it is; atoms without a code stay. targets: (r, n); dictionary: (r, k); codes: (k,
    n). Returns the new dictionary and codes.
    """
    atoms, codes = (
        dictionary.T.clone(memory_format=torch.contiguous_format),
        codes.clone(),
    )  # (k, r)
    residual = targets.T - codes.T @ atoms  # (n, r): a row for each target, gathered contiguously
    for index in range(len(atoms)):
        users = codes[index].nonzero().flatten()
        if len(users) == 0:
            continue
        unexplained = residual[users] + torch.outer(codes[index, users], atoms[index])  # (users, r)
        direction = atoms[index]
        for _ in range(power_iterations):
            direction = unexplained.T @ (unexplained @ direction)
            direction = direction / direction.norm().clamp(min=torch.finfo(direction.dtype).tiny)
        values = unexplained @ direction
        atoms[index], codes[index, users] = direction, values
        residual[users] = unexplained - torch.outer(values, direction)
    return atoms.T, codes


def ksvd(
    targets: Tensor,
    atoms: int,
    nonzeros: int,
    iterations: int,
    generator: torch.Generator,
    power_iterations: int = 8,
    flat: float = 1e-4,
    memory: int = MEMORY,
) -> tuple[Tensor, Tensor]:
    """Learn a dictionary (r, k) and codes (k, n) of targets (r, n) in at most `iterations` rounds
    of OMP and one K-SVD sweep.

    The first atoms are columns drawn by `generator`, scaled to unit norm. Ends early when a round
    lowers the error by less than `flat` of what it was; the last round's answer is returned, as
    published, whether or not it is the best. memory: that of `omp_codes`.
    """
    drawn = torch.randperm(targets.shape[1], generator=generator)[:atoms].to(targets.device)
    dictionary = targets[:, drawn] / targets[:, drawn].norm(dim=0).clamp(
        min=torch.finfo(targets.dtype).tiny
    )
    error = torch.inf
    for _ in range(iterations):
        codes = omp_codes(dictionary.T @ dictionary, dictionary.T @ targets, nonzeros, memory)
        dictionary, codes = sweep(targets, dictionary, codes, power_iterations)
        previous, error = error, (targets - dictionary @ codes).square().sum().item()
        if previous - error < flat * previous and previous < torch.inf:
            break
    return dictionary, codes
