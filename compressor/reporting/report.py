"""The report of a run: what was kept, what it cost, and the same as a table and as a model card.

Fractions are fractions kept. Sizes count what the linears store in the output dtype, bias included;
`bytes` are the files themselves.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from compressor.errors import EvaluationError
from compressor.files.documents import replace_text
from compressor.plan import DENSE, FINER_BASES, WITH_RESIDUALS, Plan
from compressor.reporting import tables
from compressor.reporting.tables import ABSENT, kept_removed, number, percent, size
from compressor.statistics import dense_lines

MIX = ("method", "linears", "before", "after", "kept", "least kept", "largest error")
HEADINGS = ("", "original", "compressed", "kept / change")


@dataclass(frozen=True)
class Sizes:
    """What the plan does not know."""

    original_bytes: int  # files of the source model
    compressed_bytes: int  # files written
    # tensors outside the targeted linears, as stored in the output (before and after alike)
    other_bits: int
    other_parameters: int
    # tensors that the original stores under another name, and the compressed model by themselves
    untied_bits: int = 0
    untied_parameters: int = 0


def build(
    plan: Plan,
    sizes: Sizes,
    unit: str,
    evaluation: dict[str, Any] | None = None,
    reason: str | None = None,
    calibration: dict[str, Any] | None = None,
    heldout: dict[str, Any] | None = None,
    lm_eval: dict[str, Any] | None = None,
    lm_eval_original: dict[str, Any] | None = None,
    fingerprints: dict[str, str] | None = None,
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Gather `report.json`.

    plan: with measured errors. unit: "bits" or "parameters", what `kept.targets` and `kept.model`
    count. evaluation, calibration, heldout: `Comparison.to_json()` on the three texts, None where
    not measured; `reason` says why the scores are null. lm_eval: of `lm_eval_bridge.scores`, for
    the compressed model and for the original.
    """
    counts = {
        count: _count(
            plan, count, getattr(sizes, f"other_{count}"), getattr(sizes, f"untied_{count}")
        )
        for count in ("bits", "parameters")
    }
    kept = {count: _kept(found["targets"]) for count, found in counts.items()}
    kept_model = {f"model_{count}": _kept(found["model"]) for count, found in counts.items()}
    return {
        "kept": {"unit": unit, "targets": kept[unit], "model": kept_model[f"model_{unit}"]}
        | kept
        | kept_model,
        "bytes": {"original": sizes.original_bytes, "compressed": sizes.compressed_bytes},
        "sizes": {
            scope: {count: counts[count][scope] for count in counts}
            for scope in ("targets", "model")
        },
        **scores(evaluation),
        "reason": reason,
        "calibration": None if calibration is None else scores(calibration),
        "heldout": None if heldout is None else scores(heldout),
        "lm_eval": lm_eval,
        "lm_eval_original": lm_eval_original,
        "price": plan.price,
        "contest": dict(plan.contest),
        "search": plan.search,
        "trained": plan.trained,
        "linears": [{"name": name} | choice.to_json() for name, choice in plan.linears.items()],
        "warnings": dense_lines(
            {name: choice.reason for name, choice in plan.linears.items() if choice.reason}
        )
        + list(warnings),
        "fingerprints": dict(fingerprints or {}),
    }


def _count(plan: Plan, count: str, other: int, untied: int) -> dict[str, dict[str, int]]:
    """Bits or parameters of the targets and of the model, before and after."""
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


def scores(evaluation: dict[str, Any] | None) -> dict[str, Any]:
    """The entries of a report that one `Comparison.to_json()` fills; null where there is none."""
    found = evaluation or {}
    return {
        "perplexity": {
            "original": found.get("perplexity_original"),
            "compressed": found.get("perplexity"),
        },
        "kl": found.get("kl"),
        "tokens": found.get("tokens"),
        "window": found.get("window"),
    }


def before_after(report: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows (quantity, original, compressed, kept or change) of the table that tables and model
    cards show.
    """
    found = []
    for scope, label in (("targets", "Targeted linears"), ("model", "Whole model")):
        for count, shown in (("bits", lambda bits: size(bits / 8)), ("parameters", number)):
            counted = report["sizes"][scope][count]
            found.append(
                (
                    f"{label}, stored {count}",
                    shown(counted["original"]),
                    shown(counted["compressed"]),
                    kept_removed(_kept(counted)),
                )
            )
    files = report["bytes"]
    found.append(
        ("Files", size(files["original"]), size(files["compressed"]), kept_removed(_kept(files)))
    )
    for label, scores in (
        ("", report),
        ("held-out ", report["heldout"]),
        ("calibration ", report["calibration"]),
    ):
        if scores is not None:
            found += _score_rows(label, scores)
    found += [
        (label, *(ABSENT if value is None else number(value) for value in values), _change(*values))
        for label, *values in tables.metric_rows(report["lm_eval"], report["lm_eval_original"])
    ]
    return found


def _score_rows(label: str, scores: dict[str, Any]) -> list[tuple[str, str, str, str]]:
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


def method_mix(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of `MIX`, one for each method chosen."""
    found = []
    for method in sorted(
        {linear["method"] for linear in report["linears"]}, key=lambda name: (name == DENSE, name)
    ):
        linears = [linear for linear in report["linears"] if linear["method"] == method]
        dense, bits = (sum(linear[key] for linear in linears) for key in ("dense_bits", "bits"))
        errors = [linear["error"] for linear in linears if linear["error"] is not None]
        least = min(linear["bits"] / linear["dense_bits"] for linear in linears)
        worst = number(max(errors)) if errors else ABSENT
        found.append(
            (
                method,
                str(len(linears)),
                size(dense / 8),
                size(bits / 8),
                percent(bits / dense),
                percent(least),
                worst,
            )
        )
    return found


def least_kept(report: dict[str, Any]) -> str:
    """A sentence naming the linear that keeps the smallest fraction of its bits."""
    least = min(
        report["linears"], key=lambda linear: linear["bits"] / linear["dense_bits"], default=None
    )
    return (
        "no linear was targeted"
        if least is None
        else f"least kept: {least['name']}, {percent(least['bits'] / least['dense_bits'])}"
    )


def searched(report: dict[str, Any]) -> str | None:
    """A sentence on what a search has found; None for runs without one."""
    if not (found := report["search"]):
        return None
    first, *others = found["trials"]
    start = (
        "a size it could not meet"
        if first["heldout"] is None
        else f"held-out KL {number(first['heldout'])}"
    )
    stayed = sum(one["kept"] for one in others)
    left = sum(one["heldout"] is None for one in others)
    whole = (
        f"search: from {start} to {number(found['heldout'])}; of {len(others)} trials {stayed} "
        "stayed"
    )
    return f"{whole}, {left} were dropped, plan.json says why" if left else whole


def residuals(report: dict[str, Any]) -> str | None:
    """A sentence on what the low-rank residuals of a report are worth; None if it has none, or if
    they were not measured.
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


def render(report: dict[str, Any]) -> RenderableType:
    """Before/after table, the mix of methods, and what deserves a warning."""
    notes = [least_kept(report)]
    notes += [f"tokens evaluated: {number(report['tokens'])}"] if report["tokens"] else []
    notes += [line for line in (searched(report), residuals(report)) if line]
    notes += [f"scores missing: {report['reason']}"] if report["reason"] else []
    notes += [f"warning: {warning}" for warning in report["warnings"]]
    notes += [f"pushed to {report['pushed']['url']}"] if report.get("pushed") else []
    mix = tables.columns("Linears", MIX, method_mix(report))
    return Group(
        tables.columns("Before and after", HEADINGS, before_after(report)), mix, *map(Text, notes)
    )


def to_json(data: dict[str, Any]) -> str:
    """JSON text with keys in the order given. Raises EvaluationError naming the entry that is NaN
    or infinite.
    """
    try:
        return json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    except ValueError:
        raise EvaluationError(
            f"{_not_finite(data, '')} is not finite, and JSON has no number for that"
        ) from None


def _not_finite(data: Any, place: str) -> str | None:
    """Dotted place of the first NaN or infinity."""
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
    return next((found for found in places if found), None)


def dump_json(path: Path, data: dict[str, Any]) -> None:
    """Write JSON so that a reader sees the old or the new file. Raises EvaluationError as
    `to_json`, CheckpointError if it cannot.
    """
    replace_text(path, to_json(data))
