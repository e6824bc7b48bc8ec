"""The report of a run: what was kept, what it cost, and the same as a table.

Fractions are fractions kept. Sizes count what the linears store in the output dtype, bias included;
`bytes` are the files themselves. The keys are those of `records.Report`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from rich.console import Group, RenderableType
from rich.text import Text

from compressor.errors import EvaluationError
from compressor.files.documents import replace_text
from compressor.plan import DENSE, FINER_BASES, WITH_RESIDUALS, Plan
from compressor.reporting import tables
from compressor.reporting.records import Linear, Metrics, Report, Scores
from compressor.reporting.tables import ABSENT, kept_removed, number, percent, size
from compressor.statistics import describe_dense

MIX = ("method", "linears", "before", "after", "kept", "least kept", "largest error")
HEADINGS = ("", "original", "compressed", "kept / change")


@dataclass(frozen=True)
class Sizes:
    """Sizes that the plan does not know."""

    original_bytes: int  # files of the source model
    compressed_bytes: int  # files written
    # tensors outside the targeted linears, as stored in the output (before and after alike)
    other_bits: int
    other_parameters: int
    # tensors that the original stores under another name, and the compressed model by themselves
    untied_bits: int = 0
    untied_parameters: int = 0


@dataclass(frozen=True)
class Evaluated:
    """The measurements of the evaluation that ends a run."""

    scores: Scores  # on the evaluation windows
    heldout: Scores | None = None
    calibration: Scores | None = None  # of runs that train
    lm_eval: dict[str, Metrics] | None = None  # of the compressed model
    lm_eval_original: dict[str, Metrics] | None = None
    warnings: Sequence[str] = ()
    fingerprint: str | None = None  # digest of the evaluation windows


def build_report(
    plan: Plan,
    sizes: Sizes,
    unit: Literal["bits", "parameters"],
    fingerprints: Mapping[str, Any] | None = None,
    reason: str | None = None,
    warnings: Sequence[str] = (),
) -> Report:
    """Gather the report of a model that is written but not evaluated.

    Args:
        plan: with measured errors.
        sizes: of the files, and of what is no target.
        unit: what `kept.targets` and `kept.model` count.
        fingerprints: what the run depends on.
        reason: why the scores are null.
        warnings: beside those about linears that stay dense.
    """
    silent = {name: choice.reason for name, choice in plan.linears.items() if choice.reason}
    bits = _count(plan, "bits", sizes.other_bits, sizes.untied_bits)
    parameters = _count(plan, "parameters", sizes.other_parameters, sizes.untied_parameters)
    counted = bits if unit == "bits" else parameters
    no_scores = to_scores(None)
    return {
        "kept": {
            "unit": unit,
            "targets": _kept(counted["targets"]),
            "model": _kept(counted["model"]),
            "bits": _kept(bits["targets"]),
            "parameters": _kept(parameters["targets"]),
            "model_bits": _kept(bits["model"]),
            "model_parameters": _kept(parameters["model"]),
        },
        "bytes": {"original": sizes.original_bytes, "compressed": sizes.compressed_bytes},
        "sizes": {
            scope: {"bits": bits[scope], "parameters": parameters[scope]}
            for scope in ("targets", "model")
        },
        "perplexity": no_scores["perplexity"],
        "kl": no_scores["kl"],
        "tokens": no_scores["tokens"],
        "window": no_scores["window"],
        "reason": reason,
        "calibration": None,
        "heldout": None,
        "lm_eval": None,
        "lm_eval_original": None,
        "price": plan.price,
        "contest": dict(plan.contest),
        "search": plan.search,
        "trained": plan.trained,
        "linears": [
            cast(Linear, {"name": name} | choice.to_json()) for name, choice in plan.linears.items()
        ],
        "warnings": [*describe_dense(silent), *warnings],
        "fingerprints": dict(fingerprints or {}),
    }


def add_evaluation(report: Report, evaluated: Evaluated) -> Report:
    """Return the report with what its evaluation measured."""
    marks = {} if evaluated.fingerprint is None else {"evaluation": evaluated.fingerprint}
    return report | {
        **evaluated.scores,
        "reason": None,
        "calibration": evaluated.calibration,
        "heldout": evaluated.heldout,
        "lm_eval": evaluated.lm_eval,
        "lm_eval_original": evaluated.lm_eval_original,
        "warnings": [*report["warnings"], *evaluated.warnings],
        "fingerprints": report["fingerprints"] | marks,
    }


def _count(plan: Plan, count: str, other: int, untied: int) -> dict[str, dict[str, int]]:
    """Count bits or parameters of the targets and of the model, before and after."""
    original = sum(getattr(choice, f"dense_{count}") for choice in plan.linears.values())
    compressed = sum(getattr(choice, count) for choice in plan.linears.values())
    return {
        "targets": {"original": original, "compressed": compressed},
        "model": {
            "original": original + other - untied,
            "compressed": compressed + other,
        },
    }


def _kept(counted: dict[str, int]) -> float:
    return counted["compressed"] / counted["original"] if counted["original"] else 1.0


def to_scores(comparison: Mapping[str, Any] | None) -> Scores:
    """Turn `Comparison.to_json()` into the entries that a report has for one text; None into
    nulls.
    """
    entries = comparison or {}
    return {
        "perplexity": {
            "original": entries.get("perplexity_original"),
            "compressed": entries.get("perplexity"),
        },
        "kl": entries.get("kl"),
        "tokens": entries.get("tokens"),
        "window": entries.get("window"),
    }


def before_after_rows(report: Report) -> list[tuple[str, str, str, str]]:
    """List the rows (quantity, original, compressed, kept or change) of the table that terminal,
    page and model card show.
    """
    rows = []
    for scope, label in (("targets", "Targeted linears"), ("model", "Whole model")):
        for count, shown in (("bits", lambda bits: size(bits / 8)), ("parameters", number)):
            counted = report["sizes"][scope][count]
            before, after = shown(counted["original"]), shown(counted["compressed"])
            rows.append((f"{label}, stored {count}", before, after, kept_removed(_kept(counted))))
    files = report["bytes"]
    before, after = size(files["original"]), size(files["compressed"])
    rows.append(("Files", before, after, kept_removed(_kept(files))))
    on_evaluation: Scores = {
        "perplexity": report["perplexity"],
        "kl": report["kl"],
        "tokens": report["tokens"],
        "window": report["window"],
    }
    rows += _score_rows("", on_evaluation)
    if report["heldout"] is not None:
        rows += _score_rows("held-out ", report["heldout"])
    if report["calibration"] is not None:
        rows += _score_rows("calibration ", report["calibration"])
    return rows + lm_eval_rows(report)


def lm_eval_rows(report: Report) -> list[tuple[str, str, str, str]]:
    """List the rows of the metrics of lm-eval tasks, beside the original's where it has them."""
    rows = []
    for label, original, compressed in tables.metric_rows(
        report["lm_eval"], report["lm_eval_original"]
    ):
        before, after = (
            ABSENT if value is None else number(value) for value in (original, compressed)
        )
        rows.append((label, before, after, _change(original, compressed)))
    return rows


def _score_rows(label: str, scores: Scores) -> list[tuple[str, str, str, str]]:
    original, compressed = scores["perplexity"]["original"], scores["perplexity"]["compressed"]
    shown = [
        ABSENT if value is None else number(value) for value in (original, compressed, scores["kl"])
    ]
    window = "" if scores["window"] is None else f", window {scores['window']}"
    first = f"{label}perplexity per token{window}"
    second = f"{label}KL(original‖compressed), nats per token"
    return [
        (first[0].upper() + first[1:], shown[0], shown[1], _change(original, compressed)),
        (second[0].upper() + second[1:], "0" if scores["kl"] is not None else ABSENT, shown[2], ""),
    ]


def _change(original: float | None, compressed: float | None) -> str:
    return (
        ""
        if original is None or compressed is None or original == 0
        else f"{100 * (compressed / original - 1):+.1f} %"
    )


def method_rows(report: Report) -> list[tuple[str, ...]]:
    """List the rows of `MIX`, one for each method chosen, dense last."""
    rows: list[tuple[str, ...]] = []
    methods = {linear["method"] for linear in report["linears"]}
    for method in sorted(methods, key=lambda name: (name == DENSE, name)):
        linears = [linear for linear in report["linears"] if linear["method"] == method]
        dense = sum(linear["dense_bits"] for linear in linears)
        bits = sum(linear["bits"] for linear in linears)
        errors = [linear["error"] for linear in linears if linear["error"] is not None]
        least = min(linear["bits"] / linear["dense_bits"] for linear in linears)
        worst = number(max(errors)) if errors else ABSENT
        sizes = size(dense / 8), size(bits / 8), percent(bits / dense), percent(least)
        rows.append((method, str(len(linears)), *sizes, worst))
    return rows


def describe_least_kept(report: Report) -> str:
    """Name the linear that keeps the smallest fraction of its bits."""
    if not report["linears"]:
        return "no linear was targeted"
    least = min(report["linears"], key=lambda linear: linear["bits"] / linear["dense_bits"])
    return f"least kept: {least['name']}, {percent(least['bits'] / least['dense_bits'])}"


def describe_search(report: Report) -> str | None:
    """Say what a search came to; None for runs without one."""
    search = report["search"]
    if not search:
        return None
    first, *others = search["trials"]
    start = "a size it could not meet"
    if first["heldout"] is not None:
        start = f"held-out KL {number(first['heldout'])}"
    stayed = sum(trial["kept"] for trial in others)
    dropped = sum(trial["heldout"] is None for trial in others)
    sentence = (
        f"search: from {start} to {number(search['heldout'])}; of {len(others)} trials {stayed} "
        "stayed"
    )
    return f"{sentence}, {dropped} were dropped, plan.json says why" if dropped else sentence


def describe_residuals(report: Report) -> str | None:
    """Say what the low-rank residuals of a report are worth; None if it has none, or if they were
    not measured.
    """
    if WITH_RESIDUALS not in report["contest"]:
        return None
    kept, finer = (report["contest"][name] for name in (WITH_RESIDUALS, FINER_BASES))
    verdict = (
        "the residuals are worth their bytes"
        if kept < finer
        else "a finer base is the better use of these bytes"
    )
    return (
        f"low-rank residuals: held-out KL {number(kept)}, with finer bases of no more bytes "
        f"instead {number(finer)}; {verdict}"
    )


def render(report: Report) -> RenderableType:
    """Render the before/after table, the mix of methods, and what deserves a warning."""
    notes = [describe_least_kept(report), *describe_scores(report)]
    if pushed := report.get("pushed"):
        notes.append(f"pushed to {pushed['url']}")
    return Group(
        tables.columns("Before and after", HEADINGS, before_after_rows(report)),
        tables.columns("Linears", MIX, method_rows(report)),
        *map(Text, notes),
    )


def describe_scores(report: Report) -> list[str]:
    """List what to know beside the tables: tokens, search, residuals, missing scores, warnings."""
    notes = [f"tokens evaluated: {number(report['tokens'])}"] if report["tokens"] else []
    notes += filter(None, (describe_search(report), describe_residuals(report)))
    notes += [f"scores missing: {report['reason']}"] if report["reason"] else []
    return notes + [f"warning: {warning}" for warning in report["warnings"]]


def to_json(data: Mapping[str, Any]) -> str:
    """Write JSON with keys in the order given. Raises EvaluationError naming the entry that is NaN
    or infinite.
    """
    try:
        return json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    except ValueError:
        raise EvaluationError(
            f"{_not_finite(data, '')} is not finite, and JSON has no number for that"
        ) from None


def _not_finite(data: Any, place: str) -> str | None:
    """Return the dotted place of the first NaN or infinity."""
    if isinstance(data, float):
        return place if data != data or data in (float("inf"), float("-inf")) else None
    entries = (
        data.items()
        if isinstance(data, dict)
        else enumerate(data)
        if isinstance(data, (list, tuple))
        else ()
    )
    places = (_not_finite(value, f"{place}.{key}" if place else str(key)) for key, value in entries)
    return next((path for path in places if path), None)


def dump_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON so that a reader sees the old or the new file. Raises EvaluationError as
    `to_json`, CheckpointError if it cannot.
    """
    replace_text(path, to_json(data))
