"""What has been built of the candidates so far, and what that shows about the curves they were
chosen from.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from compressor.allocation.options import Option
from compressor.allocation.solve import Found, ResultOf, Solution
from compressor.linears import CompressedLinear
from compressor.resume.store import NOWHERE, Store
from compressor.runtime.progress import Progress, silent


class Workshop:
    """Builds each candidate once. Curves of screening errors are corrected along their whole
    length, exact ones where they were off.

    The ratio of measured to predicted error of a screening curve is known where it was probed and
    where candidates were built; between these it is interpolated, its logarithm over that of the
    bits. So a cheap curve becomes as good as need be where it is chosen from.
    """

    def __init__(self, found: Found, probed: ResultOf, store: Store = NOWHERE):
        self.store = store
        self.built: dict[tuple[int, str], tuple[dict[str, CompressedLinear], float]] = {}
        self.ratios: dict[
            int, dict[int, float]
        ] = {}  # decomposition → bits of a candidate → measured ÷ predicted
        self.probed: dict[int, float] = {}  # the ratio at the probe, which damages are relative to
        for (unit, index), result in probed.items():
            part = found[unit][index]
            self.probed[id(part)] = result.departure
            bits = next(
                (
                    candidate.bits
                    for candidate in part.curve.candidates
                    if candidate.setting == result.setting
                ),
                None,
            )
            if bits is not None and result.departure > 0:
                self.ratios[id(part)] = {bits: result.departure}

    def build(self, option: Option) -> tuple[dict[str, CompressedLinear], float]:
        """Modules of an option as they will be stored, and their error in the metric of the
        method.
        """
        part, candidate = option.decomposition, option.candidate
        key = id(part), json.dumps(candidate.setting, sort_keys=True)
        if key not in self.built:
            self.built[key] = self.store.recall(
                "modules", [part.key, candidate.setting], partial(part.build, candidate)
            )
        error = self.built[key][1]
        if candidate.error > 0 and error > 0:
            self.ratios.setdefault(id(part), {})[candidate.bits] = error / candidate.error
        return self.built[key]

    def build_all(
        self, solution: Solution, progress: Progress = silent
    ) -> tuple[dict[str, CompressedLinear], dict[str, float]]:
        """Modules of a solution, and the error of each linear or group."""
        modules, measured = {}, {}
        for unit, option in progress(solution.options.items(), "build"):
            if option.decomposition is not None:
                made, measured[unit] = self.build(option)
                modules |= made
        return modules, measured

    def ratio(self, option: Option) -> float:
        """What the stored error of an option is expected to be, over that of its curve."""
        part = option.decomposition
        known, bits = self.ratios.get(id(part), {}), option.candidate.bits
        if not part.curve.screened:
            return known.get(bits, self.probed.get(id(part), 1.0))
        if not known:
            return 1.0
        places = sorted(known)
        return math.exp(
            np.interp(math.log(bits), np.log(places), np.log([known[place] for place in places]))
        )

    def corrected(self, options: Mapping[str, list[Option]]) -> dict[str, list[Option]]:
        """Options with the damages that follow from everything measured so far."""
        return {
            unit: [self.revalued(option) for option in found] for unit, found in options.items()
        }

    def revalued(self, option: Option) -> Option:
        if option.decomposition is None:
            return option
        base = self.probed.get(id(option.decomposition), 1.0)
        return (
            replace(option, damage=option.damage * self.ratio(option) / base)
            if base > 0
            else option
        )
