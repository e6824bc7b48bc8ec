"""Tables for people: figures with their units, and what the verbs print, as rich renderables
(nothing is written here).

The unit of a figure is read from its dotted key: under `…bits` and `…bytes` it becomes KiB, MiB or
GiB, under `kept` and `…share` a percentage, under `…seconds` it gets an s. So a verb's JSON object
and its table have the same keys.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

ABSENT = "–"
SPEEDS = ("prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory_bytes")


def size(count: float) -> str:
    """Bytes in the largest binary unit that leaves at least 1.

    >>> size(1536), size(900)
    ('1.50 KiB', '900 bytes')
    """
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    power = 0
    while abs(count) >= 1024 and power < len(units) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.0f} bytes" if power == 0 else f"{count:.2f} {units[power]}"


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def kept_removed(fraction: float) -> str:
    """A fraction kept, with what it removes.

    >>> kept_removed(0.7)
    '70.0 % kept, 30.0 % removed'
    >>> kept_removed(1.2)
    '120.0 % kept, 20.0 % added'
    """
    change = (
        f"{percent(1 - fraction)} removed" if fraction <= 1 else f"{percent(fraction - 1)} added"
    )
    return f"{percent(fraction)} kept, {change}"


def number(value: float) -> str:
    """Integers with thousands separators, other numbers with five significant digits.

    >>> number(6950400), number(0.123456)
    ('6,950,400', '0.12346')
    """
    return f"{value:,}" if isinstance(value, int) else f"{value:,.5g}"


def figure(key: str, value: Any) -> str:
    """A value as text, in the unit that its dotted key names.

    >>> figure("bytes.original", 2048), figure("dense_bits", 64), figure("kept.targets", 0.5),
    figure("probe_seconds", 2) ('2.00 KiB', '8 bytes', '50.0 %', '2.0 s')
    """
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {figure(name, entry)}" for name, entry in value.items()) or ABSENT
    if isinstance(value, (list, tuple)):
        return ", ".join(figure(key, entry) for entry in value) or ABSENT
    if not isinstance(value, (int, float)):
        return str(value)
    units = {part.rsplit("_", 1)[-1] for part in key.split(".")}
    if units & {"bits", "bytes"}:
        return size(value if "bytes" in units else value / 8)
    if units & {"kept", "share"}:
        return percent(value)
    return f"{value:.1f} s" if "seconds" in units else number(value)


def columns(
    title: str | None,
    headings: Sequence[str],
    lines: Iterable[Sequence[str]],
    words: Collection[int] = (0,),
) -> Table:
    """A table of strings. Columns listed in `words` hold words, to the left and folded where space
    is short; the others figures.
    """
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        worded = index in words
        table.add_column(
            Text(heading),
            justify="left" if worded else "right",
            overflow="fold",
            no_wrap=not worded,
            min_width=len(heading),
        )
    for line in lines:
        table.add_row(*map(Text, line))
    return table


def render_result(data: dict[str, Any]) -> RenderableType:
    """Any verb's result: its figures by dotted key, then one table for each list of objects, whose
    columns are their keys.
    """
    lines, records = [], []
    for key, value in _leaves(data):
        if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            records.append(_records(key, value))
        else:
            lines.append((key, figure(key, value)))
    return Group(*([columns(None, ("", "value"), lines, words=(0, 1))] if lines else []), *records)


def _records(title: str, data: Sequence[dict[str, Any]]) -> Table:
    """One row an object; columns are the keys in order of first appearance, words before
    figures.
    """
    keys = list(dict.fromkeys(key for entry in data for key in entry))
    words = [
        key for key in keys if not any(isinstance(entry.get(key), (int, float)) for entry in data)
    ]
    ordered = words + [key for key in keys if key not in words]
    lines = ([figure(key, entry.get(key)) for key in ordered] for entry in data)
    return columns(
        title, [key.replace("_", " ") for key in ordered], lines, words=range(len(words))
    )


def render_evaluation(evaluation: dict[str, Any]) -> RenderableType:
    """`compressor evaluate`: {perplexity, perplexity_original, kl, tokens, window, lm_eval, speed},
    absent ones None or left out.
    """
    window = evaluation.get("window")
    body = [
        (
            f"perplexity per token, window {window}",
            evaluation.get("perplexity_original"),
            evaluation.get("perplexity"),
        )
    ]
    if evaluation.get("kl") is not None:
        body.append(("KL(original‖model), nats per token", 0.0, evaluation["kl"]))
    body += metric_rows(evaluation.get("lm_eval"), None)
    lines = [
        (label, *("" if value is None else number(value) for value in values))
        for label, *values in body
    ]
    for key in SPEEDS if evaluation.get("speed") else ():
        values = (evaluation["speed"].get(who) for who in ("original", "compressed"))
        lines.append(
            (
                key.replace("_", " "),
                *("" if value is None else figure(key, value[key]) for value in values),
            )
        )
    counted = Text(
        f"{number(evaluation.get('tokens') or 0)} tokens in non-overlapping windows of {window}"
    )
    return Group(columns("Evaluation", ("", "original", "model"), lines), counted)


def render_sweep(points: Sequence[dict[str, Any]]) -> RenderableType:
    """Rows of `results.jsonl`, smallest files first; those that no other beats in both size and
    divergence are marked.
    """
    done = sorted(
        (row for row in points if row["status"] == "done"),
        key=lambda row: (row["bytes"], row["kl"] or 0.0, row["name"]),
    )
    lines = []
    for row in done:
        scores = (ABSENT if row[key] is None else number(row[key]) for key in ("kl", "perplexity"))
        mark = "●" if row.get("best") else ""
        lines.append(
            (
                row["name"],
                mark,
                percent(row["kept"]),
                size(row["bytes"]),
                *scores,
                figure("seconds", row["seconds"]),
            )
        )
    headings = (
        "point",
        "best at its size",
        "targets kept",
        "files",
        "KL, nats per token",
        "perplexity",
        "time",
    )
    failed = [(row["name"], row["error"]) for row in points if row["status"] != "done"]
    tables = [columns("Sweep", headings, lines)] if lines else []
    return Group(
        *tables, *([columns("Failed", ("point", "why"), failed, words=(0, 1))] if failed else [])
    )


def metric_rows(
    scores: dict[str, Any] | None, original: dict[str, Any] | None
) -> list[tuple[str, float | None, float | None]]:
    """lm-eval scores as (label, original, model), without standard errors and counts."""
    found = []
    for task, metrics in (scores or {}).items():
        for metric, value in metrics.items():
            if metric in ("samples", "max_length") or "_stderr" in metric:
                continue
            found.append((f"{task}: {metric}", (original or {}).get(task, {}).get(metric), value))
    return found


def _leaves(data: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield above + key, value
