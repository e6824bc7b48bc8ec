"""Figures and their units, and tables that fit 100 columns."""

import doctest
from typing import Annotated, TypedDict

import pytest
from rich.console import Console

from compressor.reporting import records, tables
from compressor.reporting.records import Outline, unit_at, units_of
from compressor.reporting.tables import columns, figure, render_evaluation, render_result, size


def text(renderable, width: int = 100) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_examples_of_the_docstrings():
    for module in (tables, records):
        assert doctest.testmod(module).failed == 0 and doctest.testmod(module).attempted


@pytest.mark.parametrize(
    "count, shown",
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.00 KiB"),
        (3.2 * 2**30, "3.20 GiB"),
        (2**52, "4096.00 TiB"),
    ],
)
def test_sizes(count, shown):
    assert size(count) == shown


@pytest.mark.parametrize(
    "value, unit, shown",
    [
        (None, None, "–"),
        (True, None, "yes"),
        ({"rank": 1200, "bits": 3}, None, "rank 1,200, bits 3"),
        ({"original": 1024}, "bytes", "original 1.00 KiB"),
        (["gram", "sum"], None, "gram, sum"),
        ([], None, "–"),
        (0.373123, None, "0.37312"),
        (0.9312, "fraction", "93.1 %"),
        (8 * 1024, "bits", "1.00 KiB"),
        (12.34, "seconds", "12.3 s"),
        ("bits", "fraction", "bits"),
    ],
)
def test_figures(value, unit, shown):
    assert figure(value, unit) == shown


def test_units_belong_to_the_fields_of_a_record_not_to_their_names():
    units = units_of(Outline)
    assert unit_at(units, "bytes.source") == "bytes"
    assert unit_at(units, "estimated_seconds.probe") == "seconds"
    assert unit_at(units, "linears.dense_bits") == "bits"
    assert unit_at(units, "unit") is None and unit_at(units, "linears.candidates") is None
    shown = text(render_result({"methods": [{"name": "rtn", "options": {"bits": 4}}], "bits": 4}))
    assert "bits 4" in shown and "bytes" not in shown


def test_any_result_is_shown_with_its_lists_as_tables():
    class Linear(TypedDict):
        bits: Annotated[int, "bits"]

    class Result(TypedDict):
        kept: Annotated[dict, "fraction"]
        linears: list[Linear]

    linears = [
        {
            "name": f"model.layers.{i}.self_attn.q_proj",
            "bits": 8 * 1024,
            "method": "low_rank",
            "setting": {"rank": 10 + i},
        }
        for i in (0, 31)
    ]
    shown = text(
        render_result(
            {
                "kept": {"unit": "bits", "targets": 0.7},
                "linears": [*linears, {"name": "x", "bits": None}],
                "files": [],
            },
            Result,
        )
    )
    assert all(len(line) <= 100 for line in shown.splitlines()) and "…" not in shown
    rows = [line.split() for line in shown.splitlines()]
    assert ["│", "kept.targets", "│", "70.0", "%", "│"] in rows
    assert [
        "│",
        "model.layers.31.self_attn.q_proj",
        "│",
        "low_rank",
        "│",
        "rank",
        "41",
        "│",
        "1.00",
        "KiB",
        "│",
    ] in rows
    assert [
        "┃",
        "name",
        "┃",
        "method",
        "┃",
        "setting",
        "┃",
        "bits",
        "┃",
    ] in rows  # words before figures
    assert ["│", "files", "│", "–", "│"] in rows


def test_words_are_folded_before_figures_are_broken():
    shown = text(
        columns(None, ("name", "size"), [("a long name " * 3, "1,234,567 bytes")]), width=36
    )
    assert "1,234,567 bytes" in shown and "…" not in shown


def test_markup_in_names_is_not_interpreted():
    assert "[red]name[/red]" in text(render_result({"model": "[red]name[/red]"}))


def test_evaluation_shows_unit_window_and_both_models():
    speed = {
        "prefill_tokens_per_second": 1000.0,
        "decode_tokens_per_second": 50.0,
        "peak_memory_bytes": 2**30,
    }
    shown = text(
        render_evaluation(
            {
                "perplexity": 6.5,
                "perplexity_original": 5.5,
                "kl": 0.25,
                "tokens": 32768,
                "window": 512,
                "lm_eval": {
                    "arc": {
                        "acc": 0.5,
                        "acc_stderr": 0.01,
                        "exact,strict_stderr": None,
                        "samples": 10,
                        "max_length": 512,
                    }
                },
                "speed": {
                    "original": speed,
                    "compressed": speed | {"decode_tokens_per_second": 75.0},
                },
            }
        )
    )
    rows = [line.strip("│ ").split("│") for line in shown.splitlines()]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows if len(row) == 3}
    assert cells == {
        "perplexity per token, window 512": ["5.5", "6.5"],
        "KL(original‖model), nats per token": ["0", "0.25"],
        "arc: acc": ["", "0.5"],
        "prefill tokens per second": ["1,000", "1,000"],
        "decode tokens per second": ["50", "75"],
        "peak memory bytes": ["1.00 GiB", "1.00 GiB"],
    }
    assert "32,768 tokens in non-overlapping windows of 512" in shown


def test_evaluation_of_one_model_alone():
    shown = text(
        render_evaluation(
            {"perplexity": 6.5, "kl": None, "tokens": 64, "window": 32, "lm_eval": None}
        )
    )
    assert "KL" not in shown and "speed" not in shown and "6.5" in shown
