"""The quality gate: hold a report against a baseline report and name every score that left its
limits.

A score is a number of `report.json`: `perplexity`, `kl` and `bytes` of the compressed model, or
`task.metric` of lm-eval. Its limits:

    max, min                     the score itself: a number (0.05), or a multiple of the baseline
                                 (0.95x)
    max_increase, max_decrease   what it may rise or fall: a number (0.5), or a share of the
                                 baseline (2%)
    tolerance                    both of these, so that an improvement that large is named too
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any
from xml.etree import ElementTree

from pydantic import BeforeValidator, ValidationError
from rich.console import RenderableType

from compressor.errors import CheckpointError, ConfigError, did_you_mean
from compressor.files.documents import read_json, replace_text
from compressor.files.yaml import parse_document, read_text
from compressor.recipe.training import Section
from compressor.recipe.validation import explain
from compressor.reporting.tables import columns, number

REPORT = "report.json"
KEPT_IN_BASELINE = ("bytes", "perplexity", "kl", "tokens", "window", "lm_eval", "fingerprints")
HEADINGS = ("score", "limit", "measured", "baseline", "bound", "")
_NUMBER = r"[0-9]{1,20}(?:\.[0-9]{1,20})?(?:[eE][-+]?[0-9]{1,2})?"


def _written_with(unit: str, example: str) -> BeforeValidator:
    """A validator for a number that is at least 0, or text holding such a number and `unit`."""

    def check(value: Any) -> str:
        text = str(value).replace(" ", "")
        if isinstance(value, bool) or not re.fullmatch(f"{_NUMBER}{unit}?", text):
            raise ValueError(f"must be a number or {example}, not {value!r}")
        return text

    return BeforeValidator(check)


Bound = Annotated[str, _written_with("x", "a multiple of the baseline such as 0.95x")]
Change = Annotated[str, _written_with("%", "a share of the baseline such as 2%")]


class Limits(Section):
    """The limits of one score; those left out do not bound it."""

    max: Bound | None = None
    min: Bound | None = None
    max_increase: Change | None = None
    max_decrease: Change | None = None
    tolerance: Change | None = None


class LimitsFile(Section):
    """A file of limits."""

    limits: dict[str, Limits]
    """Score → its limits."""


DEFAULT: Mapping[str, Limits] = {"perplexity": Limits(max_increase="2%")}


def read_limits(path: Path) -> dict[str, Limits]:
    """Read a YAML file with one section, `limits`. Raises ConfigError with the place of what is not
    right.
    """
    document = parse_document(read_text(path), str(path))
    try:
        return LimitsFile.model_validate(document.value).limits
    except ValidationError as error:
        places = {(): str(path)} | document.places
        raise ConfigError(explain(error, LimitsFile, places, "a file of limits")) from None


def named_limits(
    max: Sequence[str] = (),
    min: Sequence[str] = (),
    tolerance: Sequence[str] = (),
    perplexity_increase: str | None = None,
) -> dict[str, Limits]:
    """Limits from `score=value` texts of the command line. Raises ConfigError naming the option."""
    given = (
        [("max", text) for text in max]
        + [("min", text) for text in min]
        + [("tolerance", text) for text in tolerance]
    )
    found: dict[str, dict[str, str]] = {}
    for kind, text in given:
        score, equals, value = text.rpartition("=")
        if not equals or not score:
            raise ConfigError(
                f"--{kind} {text}: expected score=value, such as kl=0.05 or task.metric=0.95x"
            )
        if kind in found.setdefault(score, {}):
            raise ConfigError(f"--{kind} {text}: {score} has such a limit already, given twice")
        found[score][kind] = value
    if perplexity_increase is not None:
        found.setdefault("perplexity", {})["max_increase"] = perplexity_increase
    try:
        return LimitsFile.model_validate({"limits": found}).limits
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        _, score, kind = map(str, first["loc"])
        option = "--max-perplexity-increase" if kind == "max_increase" else f"--{kind} {score}"
        raise ConfigError(f"{option}: {first['msg'].removeprefix('Value error, ')}") from None


def merge(weaker: Mapping[str, Limits], stronger: Mapping[str, Limits]) -> dict[str, Limits]:
    """Limits of both; where they bound one score from the same side by the same kind, the stronger
    ones.
    """
    both = {score: weaker[score].model_dump(exclude_none=True) for score in weaker}
    for score, limits in stronger.items():
        both[score] = both.get(score, {}) | limits.model_dump(exclude_none=True)
    return {score: Limits(**limits) for score, limits in both.items()}


def read_report(path: Path) -> dict[str, Any]:
    """Read `report.json`, or that of a checkpoint folder.

    Raises CheckpointError if there is none, if it is not a report, or if perplexity or KL are
    missing; ConfigError for a wrong path.
    """
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder; give a checkpoint or its {REPORT}")
    path = path / REPORT if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file; only checkpoints written by `compressor compress` hold a report"
        )
    report = read_json(path)
    if not _is_report(report):
        raise CheckpointError(f"{path}: is not a report of `compressor compress`")
    if report["perplexity"].get("compressed") is None or report["kl"] is None:
        reason = report.get("reason") or "no reason is given"
        raise CheckpointError(
            f"{path}: has no scores ({reason}); compress again with evaluation.enabled=true"
        )
    if not isinstance(report["fingerprints"].get("evaluation"), str):
        raise CheckpointError(
            f"{path}: does not say which text it was evaluated on (fingerprints.evaluation); "
            "compress again"
        )
    for score, value in scores(report).items():
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise CheckpointError(f"{path}: {score} is {value!r}, expected a finite number")
    return report


def _is_report(data: Mapping[str, Any]) -> bool:
    sections = all(
        isinstance(data.get(name), dict) for name in ("perplexity", "bytes", "fingerprints")
    )
    tasks = data.get("lm_eval") or {}
    return (
        sections
        and "kl" in data
        and isinstance(tasks, dict)
        and all(isinstance(metrics, dict) for metrics in tasks.values())
    )


def scores(report: Mapping[str, Any]) -> dict[str, float]:
    """Every score of a report that a limit can name."""
    found = {
        "perplexity": report["perplexity"]["compressed"],
        "kl": report["kl"],
        "bytes": report["bytes"].get("compressed"),
    }
    for task, metrics in (report.get("lm_eval") or {}).items():
        found |= {
            f"{task}.{metric}": value for metric, value in metrics.items() if value is not None
        }
    return found


def compare(
    report: Path, baseline: Path, limits: Mapping[str, Limits] | None = None
) -> dict[str, Any]:
    """Hold a report against a baseline: {report, baseline, checks, broken}, a check for every
    limit, `broken` their messages.

    limits: score → limits; None for at most 2 % more perplexity. Raises ConfigError if the two were
    not evaluated on the same windows or tasks, or a limit names a score that one of them does not
    have.
    """
    if not baseline.exists():
        raise ConfigError(
            f"{baseline}: no such baseline; write one with `compressor gate --update {report} "
            f"--baseline {baseline}`"
        )
    new, old = read_report(report), read_report(baseline)
    if new["fingerprints"]["evaluation"] != old["fingerprints"]["evaluation"]:
        raise ConfigError(
            f"{report} and {baseline} were evaluated on different windows "
            "(fingerprints.evaluation), so their scores do not compare;"
            " evaluate on the same text and window, or write a new baseline with `compressor "
            "gate --update`"
        )
    checks = []
    for score, bounds in (DEFAULT if limits is None else limits).items():
        values = [_score(each, score, path) for each, path in ((new, report), (old, baseline))]
        _refuse_other_tasks(score, new, old, report, baseline)
        checks += [
            _check(score, kind, limit, *values)
            for kind, limit in bounds.model_dump(exclude_none=True).items()
        ]
    if not checks:
        raise ConfigError("the limits bound nothing; give at least one, such as kl: {max: 0.05}")
    return {
        "report": str(report),
        "baseline": str(baseline),
        "checks": checks,
        "broken": [check["message"] for check in checks if not check["passed"]],
    }


def _score(report: Mapping[str, Any], score: str, path: Path) -> float:
    found = scores(report)
    if score not in found:
        raise ConfigError(f"{path} has no score '{score}'; {did_you_mean(score, found)}")
    return found[score]


def _refuse_other_tasks(
    score: str, new: Mapping[str, Any], old: Mapping[str, Any], report: Path, baseline: Path
) -> None:
    task = next((name for name in new.get("lm_eval") or {} if score.startswith(f"{name}.")), None)
    for key in ("samples", "max_length") if task else ():
        counts = [each["lm_eval"].get(task, {}).get(key) for each in (new, old)]
        if counts[0] != counts[1]:
            raise ConfigError(
                f"{task}: {key} is {counts[0]} in {report} and {counts[1]} in {baseline}, so "
                f"{score} does not compare"
            )


def _check(score: str, kind: str, limit: str, measured: float, baseline: float) -> dict[str, Any]:
    least, most = _bounds(score, kind, limit, baseline)
    passed = least <= measured <= most
    side, end = ("at most", most) if measured > most or least == -math.inf else ("at least", least)
    how = f"{kind.replace('_', ' ')} {limit}"
    message = (
        f"{score} is {number(measured)}, {side} {number(end)} is allowed ({how}, baseline "
        f"{number(baseline)})"
    )
    ends = {
        "least": least if math.isfinite(least) else None,
        "most": most if math.isfinite(most) else None,
    }
    return {
        "score": score,
        "limit": how,
        "measured": measured,
        "baseline": baseline,
        **ends,
        "passed": passed,
        "message": message,
    }


def _bounds(score: str, kind: str, limit: str, baseline: float) -> tuple[float, float]:
    """Least and greatest value that a limit allows."""
    value = float(limit.rstrip("x%"))
    if kind in ("max", "min"):
        if limit.endswith("x") and baseline < 0:
            raise ConfigError(
                f"{score}: {limit} of the baseline {number(baseline)}, which is negative; limit "
                "its change instead"
            )
        bound = value * baseline if limit.endswith("x") else value
        return (-math.inf, bound) if kind == "max" else (bound, math.inf)
    change = value / 100 * abs(baseline) if limit.endswith("%") else value
    least = -math.inf if kind == "max_increase" else baseline - change
    return least, math.inf if kind == "max_decrease" else baseline + change


def update(report: Path, baseline: Path) -> dict[str, Any]:
    """Write the scores of a report as the new baseline, whole or not at all. An existing file must
    be a report or a baseline.
    """
    found = read_report(report)
    if baseline.is_file() and not _is_report(read_json(baseline)):
        raise ConfigError(f"{baseline}: is no baseline, so it is not replaced; choose another name")
    kept = {key: found.get(key) for key in KEPT_IN_BASELINE}
    replace_text(baseline, json.dumps(kept, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    return {"baseline": str(baseline), "scores": scores(kept)}


def render(found: Mapping[str, Any]) -> RenderableType:
    """One row for each limit."""
    rows = ([*_row(check), "passed" if check["passed"] else "BROKEN"] for check in found["checks"])
    return columns("Quality gate", HEADINGS, rows, words=(0, 1, 5))


def _row(check: Mapping[str, Any]) -> Iterator[str]:
    bounds = [
        f"{sign} {number(check[key])}"
        for key, sign in (("least", "≥"), ("most", "≤"))
        if check[key] is not None
    ]
    yield from (
        check["score"],
        check["limit"],
        number(check["measured"]),
        number(check["baseline"]),
        ", ".join(bounds),
    )


def write_junit(path: Path, found: Mapping[str, Any]) -> None:
    """Write the checks as JUnit XML, a test case for each limit."""
    counts = {"tests": str(len(found["checks"])), "failures": str(len(found["broken"]))}
    suite = ElementTree.Element("testsuite", {"name": "compressor gate", **counts})
    for check in found["checks"]:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            {"classname": "compressor.gate", "name": f"{check['score']} {check['limit']}"},
        )
        if not check["passed"]:
            ElementTree.SubElement(case, "failure", {"message": check["message"]})
    ElementTree.indent(suite)
    replace_text(
        path,
        '<?xml version="1.0" encoding="utf-8"?>\n'
        + ElementTree.tostring(suite, encoding="unicode")
        + "\n",
    )


def line(message: str, github: bool) -> str:
    """A broken limit as one line: for people, or as GitHub Actions shows it beside the run."""
    if not github:
        return f"regression: {message}"
    return "::error title=Quality gate::" + message.replace("%", "%25").replace(
        "\r", "%0D"
    ).replace("\n", "%0A")


def refuse_limits(*given: Any) -> None:
    """Raise ConfigError if anything is given that `--update` would not heed."""
    if any(given):
        raise ConfigError(
            "--update compares nothing, so it takes neither limits nor --junit nor --github; "
            "leave them out"
        )
