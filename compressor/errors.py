"""Errors meant for users: one line saying what, where and what to do; the command line prints it
without a traceback.

    CompressorError          exit 1   a run that failed
    ├── NumericalError       exit 1   NaN, infinity or a decomposition that does not converge; names
                             the linear
    ├── CheckpointError      exit 1   a model folder that is damaged, incomplete or not ours to
                             read; names the file
    ├── DataError            exit 1   text or statistics that cannot be used; names the source
    ├── EvaluationError      exit 1   a score that could not be computed
    └── ConfigError          exit 2   recipe, option, name or path that the user must change
        └── BudgetError      exit 2   a size that no plan reaches; names the least reachable one

Any other exception is a bug in this package, but for a disk (OSError) or a memory that is full.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class CompressorError(Exception):
    exit_code = 1


class NumericalError(CompressorError):
    pass


class CheckpointError(CompressorError):
    pass


class DataError(CompressorError):
    pass


class EvaluationError(CompressorError):
    pass


class ConfigError(CompressorError):
    exit_code = 2


class BudgetError(ConfigError):
    pass


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """Return a sentence that names the nearest valid name, or lists all of them when none is
    near.
    """
    valid = sorted(valid)
    near = get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"choose from: {', '.join(valid)}"
