"""Candidates that have been built, and what that shows about the curves they were chosen from."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from compressor.allocation.decompose import Decomposition, Decompositions
from compressor.allocation.options import Option
from compressor.allocation.solve import ProbeResults, Selection
from compressor.linears.base import Modules
from compressor.resume.store import NOWHERE, Store
from compressor.runtime.progress import Steps, list_silently


class CandidateBuilder:
    """Cache of built candidates, which recalibrates screened curves.

    The ratio of measured to predicted error of a curve is known where it was probed and where
    candidates were built. Between these, the ratio of a screened curve is interpolated, log over
    log of the bits; an exact curve is corrected at these points alone.
    """

    def __init__(
        self, decompositions: Decompositions, probes: ProbeResults, store: Store = NOWHERE
    ):
        self.store = store
        self.built: dict[tuple[int, str], tuple[Modules, float]] = {}
        # decomposition → bits of a candidate → measured ÷ predicted error
        self.ratios: dict[int, dict[int, float]] = {}
        self.probed: dict[int, float] = {}  # the ratio at the probe, which damages are relative to
        for (unit, index), result in probes.items():
            part = decompositions[unit][index]
            self.probed[id(part)] = result.departure
            candidates = part.curve.candidates
            bits = next((c.bits for c in candidates if c.setting == result.setting), None)
            if bits is not None and result.departure > 0:
                self.ratios[id(part)] = {bits: result.departure}

    def build(self, option: Option) -> tuple[Modules, float]:
        """Build the modules of an option as they will be stored, once.

        Returns:
            The modules, and their error in the metric of the method.
        """
        part, candidate = _decomposition_of(option), option.candidate
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
        self, selection: Selection, steps: Steps = list_silently
    ) -> tuple[Modules, dict[str, float]]:
        """Build everything that was selected; return modules, and the error of each unit."""
        modules: Modules = {}
        errors: dict[str, float] = {}
        for option in steps(selection.options.values(), "build"):
            if option.decomposition is not None:
                own, errors[option.unit] = self.build(option)
                modules |= own
        return modules, errors

    def ratio(self, option: Option) -> float:
        """Estimate the error of an option once it is stored, over that of its curve."""
        part, bits = _decomposition_of(option), option.candidate.bits
        known = self.ratios.get(id(part), {})
        if not part.curve.screened:
            return known.get(bits, self.probed.get(id(part), 1.0))
        if not known:
            return 1.0
        places = sorted(known)
        return math.exp(
            np.interp(math.log(bits), np.log(places), np.log([known[place] for place in places]))
        )

    def correct_damages(self, options: Mapping[str, list[Option]]) -> dict[str, list[Option]]:
        """Return options with the damages that follow from everything measured so far."""
        return {unit: [self._correct(option) for option in own] for unit, own in options.items()}

    def _correct(self, option: Option) -> Option:
        base = self.probed.get(id(option.decomposition), 1.0)
        if option.decomposition is None or base <= 0:
            return option
        return replace(option, damage=option.damage * self.ratio(option) / base)


def _decomposition_of(option: Option) -> Decomposition:
    if option.decomposition is None:
        raise ValueError(f"{option.unit} stays dense: there is nothing to build")
    return option.decomposition
