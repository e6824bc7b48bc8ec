"""One page about one or several checkpoints, as HTML that needs no other file and no network, or as
Markdown.

Everything comes from `report.json`, `plan.json`, `curves.json` and `recipe.yaml`; no model is
loaded. Only HTML has figures.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from compressor.errors import CheckpointError, ConfigError
from compressor.files.documents import read_json, replace_text
from compressor.files.yaml import parse_yaml
from compressor.plan import DENSE, rename_keys
from compressor.reporting import figures, plots, report
from compressor.reporting.records import Report
from compressor.reporting.tables import ABSENT, number, percent, size

TEMPLATES = Path(__file__).parent / "templates"
FORMATS = (".html", ".md")
COMPARED = (
    "checkpoint",
    "methods",
    "targets kept",
    "files",
    "perplexity",
    "KL",
    "best at its size",
)
FIGURED = 8  # checkpoints on one page that get figures of their own
SETTINGS = 3  # named in the label of a series, at most
TITLED = 4  # checkpoints named in the title of a page, at most
SAMPLES = ("prompt", "original", "compressed")
LINEARS = ("linear", "method", "setting", "kept", "error", "damage, nats")


@dataclass(frozen=True)
class Run:
    """What a checkpoint folder says about itself."""

    name: str
    report: Report
    contest: dict[str, float]  # held-out divergence of competing plans, empty if there was one only
    recipe: str
    curves: tuple[
        dict[str, Any], ...
    ] = ()  # what each linear could have been, see `curves`; none in folders of older versions
    samples: tuple[
        tuple[str, str, str], ...
    ] = ()  # prompt, continuation by the original, by the compressed model

    @property
    def methods(self) -> str:
        """Methods chosen, as the name of a series."""
        return (
            " + ".join(sorted({linear["method"] for linear in self.report["linears"]} - {DENSE}))
            or DENSE
        )

    @property
    def size(self) -> int:
        """Bytes of the weight files."""
        return self.report["bytes"]["compressed"]


def checked(output: Path, folders: Sequence[Path]) -> Sequence[Path]:
    """The folders, once the output has an ending that can be written. Raises ConfigError
    otherwise.
    """
    if output.suffix not in FORMATS:
        raise ConfigError(f"{output}: a report ends in {' or '.join(FORMATS)}")
    return folders


def read(folders: Sequence[Path]) -> list[Run]:
    """Read checkpoint folders, each named by its last part, or in full where two would have one
    name.
    """
    lasts = [folder.resolve().name for folder in folders]
    names = [
        last if lasts.count(last) == 1 else str(folder)
        for last, folder in zip(lasts, folders, strict=True)
    ]
    return [_read(folder, name) for folder, name in zip(folders, names, strict=True)]


def _read(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: no such folder; give folders that `compressor compress` wrote"
        )
    for needed in ("report.json", "plan.json", "recipe.yaml"):
        if not (folder / needed).is_file():
            raise CheckpointError(
                f"{folder / needed}: no such file; give folders that `compressor compress` wrote"
            )
    contest = rename_keys(read_json(folder / "plan.json").get("contest") or {})
    drawn = (
        read_json(folder / "curves.json").get("curves", [])
        if (folder / "curves.json").is_file()
        else []
    )
    try:
        run = Run(
            name,
            cast(Report, read_json(folder / "report.json")),
            contest,
            (folder / "recipe.yaml").read_text(encoding="utf-8"),
            tuple(drawn),
        )
        _summary(run)
        series([run])
        figures.lines_of(run.report["linears"], run.curves)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / 'report.json'}: is not a report of `compressor compress` ({error!r})"
        ) from None
    return run


def with_samples(
    runs: Sequence[Run], samples: Sequence[Sequence[tuple[str, str, str]]]
) -> list[Run]:
    """The runs with their samples, rows of SAMPLES each."""
    return [replace(run, samples=tuple(found)) for run, found in zip(runs, samples, strict=True)]


def write(runs: Sequence[Run], output: Path) -> dict[str, Any]:
    """Write a page about these runs: {output, checkpoints, bytes}. Raises ConfigError for another
    ending than .html and .md.
    """
    checked(output, ())
    text = render(runs, output.suffix)
    replace_text(output, text)
    return {
        "output": str(output),
        "checkpoints": [run.name for run in runs],
        "bytes": len(text.encode()),
    }


def render(runs: Sequence[Run], ending: str) -> str:
    """The page as text, from the template of its ending."""
    html = ending == ".html"
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=html, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["cell"] = lambda text: (
        text if html else " ".join(text.split("\n")).replace("|", "\\|")
    )
    summaries = [_summary(run) for run in runs]
    trade_off = None
    if html:
        trade_off = _trade_off(runs) if len(runs) > 1 else None
        for index, (run, summary) in enumerate(zip(runs, summaries, strict=True)):
            drawn = enumerate(figures.of(run.report, run.curves) if index < FIGURED else ())
            summary["figures"] = [
                (caption, Markup(plots.prefixed(svg, f"run{index}-{which}-")))
                for which, (caption, svg) in drawn
            ]
    text = environment.get_template(f"report{ending}.j2").render(
        title=", ".join(run.name for run in runs)
        if len(runs) <= TITLED
        else f"{len(runs)} checkpoints",
        runs=summaries,
        compared=COMPARED,
        comparison=_comparison(runs) if len(runs) > 1 else None,
        notes=_notes(runs),
        trade_off=trade_off and Markup(trade_off),
        score=_score_label(runs),
        headings=report.HEADINGS,
        mix_headings=report.MIX,
        linear_headings=LINEARS,
        sample_headings=SAMPLES,
    )
    return text.rstrip() + "\n"


def _summary(run: Run) -> dict[str, Any]:
    longest = max(map(len, re.findall("`+", run.recipe)), default=0)
    return {
        "name": run.name,
        "table": report.before_after_rows(run.report),
        "mix": report.method_rows(run.report),
        "notes": [report.describe_least_kept(run.report), *_run_notes(run.report)],
        "contest": [
            (name, number(value))
            for name, value in sorted(run.contest.items(), key=lambda item: item[1])
        ],
        "linears": [_linear_row(linear) for linear in run.report["linears"]],
        "recipe": run.recipe.strip(),
        "fence": "`" * max(3, longest + 1),
        "samples": run.samples,
        "figures": [],
    }


def _run_notes(found: Mapping[str, Any]) -> list[str]:
    notes = [f"tokens evaluated: {number(found['tokens'])}"] if found["tokens"] else []
    notes += [f"scores missing: {found['reason']}"] if found["reason"] else []
    return notes + [f"warning: {warning}" for warning in found["warnings"]]


def _linear_row(linear: Mapping[str, Any]) -> tuple[str, ...]:
    setting = ", ".join(f"{name} {value}" for name, value in linear["setting"].items())
    values = [ABSENT if linear[key] is None else number(linear[key]) for key in ("error", "kl")]
    return (
        linear["name"],
        linear["method"],
        setting,
        percent(linear["bits"] / linear["dense_bits"]),
        *values,
    )


def _scored(runs: Sequence[Run]) -> tuple[str, list[float | None]]:
    """KL of every run, or perplexity where one was evaluated without KL: its name and its
    values.
    """
    divergences = [run.report["kl"] for run in runs]
    if any(value is not None for value in divergences):
        return "kl", divergences
    return "perplexity", [run.report["perplexity"]["compressed"] for run in runs]


def _score_label(runs: Sequence[Run]) -> str:
    return (
        "KL(original‖compressed), nats per token"
        if _scored(runs)[0] == "kl"
        else "perplexity per token"
    )


def _comparison(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Rows of COMPARED, by size of the files."""
    measured = [
        (run, score) for run, score in zip(runs, _scored(runs)[1], strict=True) if score is not None
    ]
    front = {
        measured[index][0].name
        for index in plots.pareto_front([(run.size, score) for run, score in measured])
    }
    rows = []
    for run in sorted(runs, key=lambda run: run.size):
        scores = [run.report["perplexity"]["compressed"], run.report["kl"]]
        shown = [ABSENT if score is None else number(score) for score in scores]
        kept = percent(run.report["kept"]["targets"])
        rows.append(
            (
                run.name,
                run.methods,
                kept,
                size(run.size),
                *shown,
                "yes" if run.name in front else "",
            )
        )
    return rows


def _notes(runs: Sequence[Run]) -> list[str]:
    """Why the runs may not compare, and what is left out."""
    texts = {
        "evaluation": "were evaluated on different windows",
        "model": "come from different models",
    }
    marks = {key: {run.report["fingerprints"].get(key) for run in runs} for key in texts}
    found = [
        f"These checkpoints {texts[key]}: their scores do not compare."
        for key in texts
        if len(marks[key]) > 1
    ]
    many = (
        f"Figures of single checkpoints are shown for the first {FIGURED} of {len(runs)}; give "
        "fewer for the others."
    )
    return found + ([many] if len(runs) > FIGURED else [])


def series(runs: Sequence[Run]) -> list[str]:
    """For each run its methods, and where others with the same methods differ in more than the
    size, what is set otherwise there.
    """
    settings = [_settings(parse_yaml(run.recipe, run.name)) for run in runs]
    labels = []
    for run, mine in zip(runs, settings, strict=True):
        alike = [
            other for other, each in zip(settings, runs, strict=True) if each.methods == run.methods
        ]
        differing = [key for key in mine if any(other.get(key) != mine[key] for other in alike)]
        shown = ", ".join(f"{key.rpartition('.')[2]} {mine[key]}" for key in differing[:SETTINGS])
        labels.append(f"{run.methods} ({shown})" if shown else run.methods)
    return labels


def _settings(section: Any, path: str = "") -> dict[str, Any]:
    """Dotted settings of a recipe that make another method of it, not another size, model or
    evaluation.
    """
    if path in (
        "model",
        "evaluation",
        "output",
        "seed",
        "allocation.keep",
        "allocation.target_size",
        "compensation.keep",
    ):
        return {}
    items = (
        section.items()
        if isinstance(section, dict)
        else enumerate(section)
        if isinstance(section, list)
        else ()
    )
    found: dict[str, Any] = {}
    for key, value in items:
        found |= _settings(value, f"{path}.{key}" if path else str(key))
    return found if isinstance(section, dict | list) and section else {path: section}


def _trade_off(runs: Sequence[Run]) -> str | None:
    measured = [
        each
        for each in zip(runs, series(runs), _scored(runs)[1], strict=True)
        if each[2] is not None
    ]
    points = [
        {"name": run.name, "series": label, "mib": run.size / 2**20, "score": score}
        for run, label, score in measured
    ]
    return plots.trade_off(points, _score_label(runs)) if points else None
