"""Curves of the methods that competed for each linear, thinned to a few points, for reports.

curves.json of a checkpoint: {"curves": [{linear, members, method, kept, error, ranks, spectrum},
…]}. kept: fractions of the dense bits, growing; error: the predicted one, in the metric of the
method; ranks and spectrum (low rank only): squared singular values ÷ energy.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compressor.allocation.decompose import Decomposition
from compressor.plan import Candidate, Curve

POINTS = 16  # of a curve, at most
DIGITS = 4  # significant


def summarise(decompositions: Mapping[str, Iterable[Decomposition]]) -> list[dict[str, Any]]:
    """Describe the curves of a run, JSON values."""
    parts = [part for parts in decompositions.values() for part in parts if part.curve.candidates]
    return [thin(part.curve, list(part.members)) for part in parts]


def thin(curve: Curve, members: Sequence[str]) -> dict[str, Any]:
    """Describe one curve by the candidates that no smaller one beats, thinned evenly.

    Both ends are included.
    """
    best: list[Candidate] = []
    for candidate in sorted(
        curve.candidates, key=lambda candidate: (candidate.bits, candidate.error)
    ):
        if not best or candidate.error < best[-1].error:
            best.append(candidate)
    shown = [best[index] for index in evenly(len(best))]
    outline: dict[str, Any] = {
        "linear": curve.linear,
        "members": list(members),
        "method": curve.method,
        "kept": [rounded(candidate.bits / curve.dense_bits) for candidate in shown],
        "error": [rounded(candidate.error) for candidate in shown],
    }
    if curve.spectrum:
        ranks = geometrically(len(curve.spectrum))
        outline |= {
            "ranks": ranks,
            "spectrum": [rounded(curve.spectrum[rank - 1]) for rank in ranks],
        }
    return outline


def evenly(count: int) -> list[int]:
    """Return at most POINTS indices of 0 … count − 1, the first and the last among them.

    >>> evenly(3), evenly(31)[:3]
    ([0, 1, 2], [0, 2, 4])
    """
    steps = min(count, POINTS) - 1
    return sorted({round(step * (count - 1) / max(steps, 1)) for step in range(steps + 1)})


def geometrically(count: int) -> list[int]:
    """Return at most POINTS numbers of 1 … count, dense at the beginning.

    >>> geometrically(4), geometrically(1000)[:4], geometrically(1000)[-1]
    ([1, 2, 3, 4], [1, 2, 3, 4], 1000)
    """
    return sorted({round(count ** (step / (POINTS - 1))) for step in range(POINTS)})


def rounded(value: float) -> float:
    """Round to the digits that reports show."""
    return float(f"{value:.{DIGITS}g}")


def to_json(curves: Sequence[Mapping[str, Any]]) -> str:
    """Render curves.json, one line for each curve."""
    lines = ",\n".join(json.dumps(curve, allow_nan=False) for curve in curves)
    return f'{{"curves": [\n{lines}\n]}}\n'
