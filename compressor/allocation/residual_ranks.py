"""Ranks of residuals under one budget."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Offer:
    """What the ranks of one residual gain and cost, one after the other."""

    gains: Sequence[float]  # damage that each next rank takes away, not ascending
    costs: Sequence[int]  # of each next rank, in the unit of the budget


def spend(offers: Mapping[str, Offer], budget: int) -> dict[str, int]:
    """Spend a budget on ranks, the next one always where it gains most for its cost and still fits.

    With constant costs this is the optimum of the additive damage, up to the last rank that does
    not fit, since no gain is larger than the one before it.

    Returns:
        The rank of every residual.
    """
    ranks = dict.fromkeys(offers, 0)
    queue = [
        (-offer.gains[0] / offer.costs[0], name) for name, offer in offers.items() if offer.gains
    ]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        offer, rank = offers[name], ranks[name]
        if offer.costs[rank] > budget or offer.gains[rank] <= 0:
            continue  # later ranks of it neither cost less, by more than rounding, nor gain more
        budget -= offer.costs[rank]
        ranks[name] = rank = rank + 1
        if rank < len(offer.gains):
            heapq.heappush(queue, (-offer.gains[rank] / offer.costs[rank], name))
    return ranks
