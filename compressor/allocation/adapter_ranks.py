"""Ranks of the modules of an adapter under one budget."""

from collections.abc import Sequence

from compressor.allocation.knapsack import Row, knapsack
from compressor.errors import BudgetError
from compressor.linalg.products import Components


def allocate(
    parts: Sequence[Components], prices: Sequence[int], whole: int, keep: float
) -> list[int]:
    """Choose ranks that lose least in total with at most keep · `whole` parameters.

    The largest σ² for each parameter comes first, over all modules. The knapsack finishes that
    order exactly: what is left of the budget goes where it is worth most.

    Args:
        parts: singular values of each module.
        prices: parameters of one rank of each module.
        whole: parameters of all of them.
        keep: fraction of `whole`.

    Returns:
        The rank of each module, which may be 0.

    Raises:
        BudgetError: if no single rank fits, or if nothing is worth keeping.
    """
    budget = int(keep * whole + 1e-9)
    if budget < min(prices):
        least = -(-min(prices) * 10_000 // whole) / 10_000
        raise BudgetError(
            f"--keep {keep:g} is {budget:,} parameters, the smallest module takes {min(prices):,} "
            f"for one rank; keep {least:g}"
        )
    rows = []
    for part, price in zip(parts, prices, strict=True):
        ranks = range(len(part.energies) + 1)
        rows.append(
            Row(
                tuple(price * rank for rank in ranks),
                tuple(map(part.tail, ranks)),
                price * (len(ranks) - 1),
            )
        )
    chosen = list(knapsack(rows, budget).choice)
    if not any(chosen):
        raise BudgetError(
            "every product of the adapter is zero, so no rank is worth keeping; use --rank"
        )
    return chosen
