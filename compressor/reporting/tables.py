"""Tables for people: figures with their units, and what the verbs print, as rich renderables
(nothing is written here).

Units belong to fields: a record in `records` says which of a verb's figures are sizes, fractions or
times. A verb's JSON object and its table have the same keys.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from compressor.reporting.records import Speed, Unit, unit_at, units_of

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


def figure(value: Any, unit: Unit | None = None) -> str:
    """Write a value as text, figures in their unit.

    >>> figure(2048, "bytes"), figure(64, "bits"), figure(0.5, "fraction"), figure(2, "seconds")
    ('2.00 KiB', '8 bytes', '50.0 %', '2.0 s')
    """
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        entries = (f"{name} {figure(entry, unit)}" for name, entry in value.items())
        return ", ".join(entries) or ABSENT
    if isinstance(value, (list, tuple)):
        return ", ".join(figure(entry, unit) for entry in value) or ABSENT
    if not isinstance(value, (int, float)):
        return str(value)
    match unit:
        case "bits":
            return size(value / 8)
        case "bytes":
            return size(value)
        case "fraction":
            return percent(value)
        case "seconds":
            return f"{value:.1f} s"
    return number(value)


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


def render_result(data: Mapping[str, Any], record: type | None = None) -> RenderableType:
    """Render a verb's result: its figures by dotted key, then one table for each list of objects,
    whose columns are their keys. record: says the units.
    """
    units, lines, tables = units_of(record), [], []
    for key, value in _leaves(data):
        if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            tables.append(_record_table(key, value, units))
        else:
            lines.append((key, figure(value, unit_at(units, key))))
    return Group(*([columns(None, ("", "value"), lines, words=(0, 1))] if lines else []), *tables)


def _record_table(
    title: str, data: Sequence[Mapping[str, Any]], units: Mapping[str, Unit]
) -> Table:
    """Return a table with a row for each object; its columns are the keys in order of first
    appearance, words before figures.
    """
    keys = list(dict.fromkeys(key for entry in data for key in entry))
    words = [
        key for key in keys if not any(isinstance(entry.get(key), (int, float)) for entry in data)
    ]
    ordered = words + [key for key in keys if key not in words]
    lines = (
        [figure(entry.get(key), units.get(f"{title}.{key}")) for key in ordered] for entry in data
    )
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
    speed_units = units_of(Speed)
    for key in SPEEDS if evaluation.get("speed") else ():
        values = (evaluation["speed"].get(who) for who in ("original", "compressed"))
        lines.append(
            (
                key.replace("_", " "),
                *(
                    "" if value is None else figure(value[key], speed_units.get(key))
                    for value in values
                ),
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
                figure(row["seconds"], "seconds"),
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


def _leaves(data: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield above + key, value
