"""The report: its keys and sums, strict JSON, a table that fits 100 columns, and a model card that
parses.
"""

import json
import math
from dataclasses import replace

import pytest
import yaml
from rich.console import Console
from support.models import read_json

from compressor.errors import CheckpointError, EvaluationError
from compressor.plan import Choice, Plan
from compressor.reporting.card import model_card
from compressor.reporting.report import (
    Evaluated,
    Sizes,
    add_evaluation,
    before_after_rows,
    build_report,
    dump_json,
    lm_eval_rows,
    render,
    to_json,
    to_scores,
)

EVALUATION = {
    "perplexity": 6.6,
    "perplexity_original": 5.5,
    "kl": 0.25,
    "tokens": 32768,
    "window": 512,
}
SIZES = Sizes(
    original_bytes=20_000, compressed_bytes=15_000, other_bits=16_000, other_parameters=1_000
)


def evaluated_report(plan, *, evaluation=EVALUATION, fingerprints=None, **others):
    """A report with the scores of its evaluation, which `EVALUATION` stands for."""
    report = build_report(plan, SIZES, "bits", fingerprints)
    return add_evaluation(report, Evaluated(to_scores(evaluation), **others))


def choice(method: str, kept: float, error: float | None) -> Choice:
    """A choice for a linear of 1,000 bfloat16 numbers; its mask makes 800 bits that are no
    parameters.
    """
    extra = 0 if method == "dense" else 800
    return Choice(
        method,
        {"rank": 8},
        int(16_000 * kept) + extra,
        int(1_000 * kept),
        16_000,
        1_000,
        predicted=0.1,
        error=error,
    )


@pytest.fixture
def plan():
    return Plan(
        {
            "model.layers.0.self_attn.q_proj": choice("low_rank", 0.25, 0.03),
            "model.layers.0.mlp.down_proj": choice("low_rank", 0.5, 0.01),
            "model.layers.1.mlp.down_proj": choice("dense", 1.0, 0.0),
            "model.layers.1.mlp.up_proj": choice("dictionary", 0.75, None),
        },
        price=0.02,
    )


def text(renderable) -> str:
    console = Console(width=100, no_color=True)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def rows_of(shown: str) -> dict[str, list[str]]:
    """First cell → other cells of every line of the tables."""
    lines = [
        [cell.strip() for cell in line[1:-1].split("│")]
        for line in shown.splitlines()
        if line.startswith("│")
    ]
    return {cells[0]: cells[1:] for cells in lines}


def test_keys_and_sums(plan):
    report = evaluated_report(
        plan, fingerprints={"weights": "ab"}, warnings=["overlap"], fingerprint="cd"
    )
    bits, parameters = (4_000 + 8_000 + 16_000 + 12_000 + 3 * 800) / 64_000, 2_500 / 4_000
    assert report["kept"] == {
        "unit": "bits",
        "targets": pytest.approx(bits),
        "model": pytest.approx((64_000 * bits + 16_000) / 80_000),
        "bits": pytest.approx(bits),
        "parameters": pytest.approx(parameters),
        "model_bits": pytest.approx((64_000 * bits + 16_000) / 80_000),
        "model_parameters": pytest.approx(3_500 / 5_000),
    }
    assert report["bytes"] == {"original": 20_000, "compressed": 15_000}
    assert report["perplexity"] == {"original": 5.5, "compressed": 6.6}
    assert [report[key] for key in ("kl", "tokens", "window", "lm_eval", "reason")] == [
        0.25,
        32768,
        512,
        None,
        None,
    ]
    assert (
        report["linears"][0].items()
        >= {
            "name": "model.layers.0.self_attn.q_proj",
            "method": "low_rank",
            "setting": {"rank": 8},
            "bits": 4_800,
            "dense_bits": 16_000,
            "error": 0.03,
        }.items()
    )
    assert report["fingerprints"] == {"weights": "ab", "evaluation": "cd"} and report[
        "warnings"
    ] == ["overlap"]


def test_kept_follows_the_unit_that_was_allocated(plan):
    kept = build_report(plan, SIZES, "parameters")["kept"]
    assert kept["unit"] == "parameters"
    assert (
        (kept["targets"], kept["model"])
        == (kept["parameters"], kept["model_parameters"])
        != (kept["bits"], kept["model_bits"])
    )


def test_scores_that_are_missing_are_null_with_a_reason(plan):
    report = build_report(plan, SIZES, "bits", reason="batch 3 of 8 is nan")
    assert report["perplexity"] == {"original": None, "compressed": None}
    assert [report[key] for key in ("kl", "tokens", "window", "calibration", "heldout")] == [
        None
    ] * 5
    shown = text(render(report))
    assert "scores missing: batch 3 of 8 is nan" in shown
    assert rows_of(shown)["Perplexity per token"] == ["–", "–", ""]
    assert "Scores are missing: batch 3 of 8 is nan" in model_card(report, "seed: 0", "reference")


def test_table_shows_kept_and_removed_in_both_counts_for_targets_model_and_files(plan):
    shown = text(render(evaluated_report(plan)))
    assert all(len(line) <= 100 for line in shown.splitlines()) and "…" not in shown
    rows = rows_of(shown)
    assert rows["Targeted linears, stored bits"] == [
        "7.81 KiB",
        "5.18 KiB",
        "66.2 % kept, 33.8 % removed",
    ]
    assert rows["Targeted linears, stored parameters"] == [
        "4,000",
        "2,500",
        "62.5 % kept, 37.5 % removed",
    ]
    assert rows["Whole model, stored bits"] == [
        "9.77 KiB",
        "7.13 KiB",
        "73.0 % kept, 27.0 % removed",
    ]
    assert rows["Whole model, stored parameters"] == [
        "5,000",
        "3,500",
        "70.0 % kept, 30.0 % removed",
    ]
    assert rows["Files"] == ["19.53 KiB", "14.65 KiB", "75.0 % kept, 25.0 % removed"]
    assert rows["Perplexity per token, window 512"] == ["5.5", "6.6", "+20.0 %"]
    assert rows["KL(original‖compressed), nats per token"] == ["0", "0.25", ""]
    assert "tokens evaluated: 32,768" in shown


def test_table_shows_the_mix_of_methods_dense_last(plan):
    shown = text(render(build_report(plan, SIZES, "bits")))
    rows = rows_of(shown)
    assert list(rows)[-3:] == ["dictionary", "low_rank", "dense"]
    assert rows["low_rank"] == ["2", "3.91 KiB", "1.66 KiB", "42.5 %", "30.0 %", "0.03"]
    assert rows["dictionary"] == ["1", "1.95 KiB", "1.56 KiB", "80.0 %", "80.0 %", "–"]
    assert rows["dense"] == ["1", "1.95 KiB", "1.95 KiB", "100.0 %", "100.0 %", "0"]
    assert "least kept: model.layers.0.self_attn.q_proj, 30.0 %" in shown


def test_held_out_and_calibration_figures_and_lm_eval_stand_beside_the_evaluation(plan):
    scores, original = (
        {"arc": {"acc": 0.45, "acc_stderr": 0.01, "samples": 9}},
        {"arc": {"acc": 0.5}},
    )
    heldout, calibration = EVALUATION | {"kl": 0.2}, EVALUATION | {"kl": 0.1}
    report = evaluated_report(
        plan,
        heldout=to_scores(heldout),
        calibration=to_scores(calibration),
        lm_eval=scores,
        lm_eval_original=original,
        warnings=["w1"],
    )
    assert (report["heldout"]["kl"], report["calibration"]["kl"], report["kl"]) == (0.2, 0.1, 0.25)
    assert report["lm_eval"] == scores and report["lm_eval_original"] == original
    assert lm_eval_rows(report) == [("arc: acc", "0.5", "0.45", "-10.0 %")]
    shown = text(render(report))
    assert all(len(line) <= 100 for line in shown.splitlines())
    rows = rows_of(shown)
    assert rows["arc: acc"] == ["0.5", "0.45", "-10.0 %"]
    quantities = {label: cells for label, *cells in before_after_rows(report)}
    for text_of in ("Held-out", "Calibration"):
        assert quantities[f"{text_of} perplexity per token, window 512"] == [
            "5.5",
            "6.6",
            "+20.0 %",
        ]
    assert quantities["Held-out KL(original‖compressed), nats per token"] == ["0", "0.2", ""]
    assert "warning: w1" in shown
    assert "arc: acc" in text(render(report | {"lm_eval_original": None}))


def test_a_plan_without_linears_keeps_everything():
    report = build_report(Plan({}), SIZES, "bits")
    assert report["kept"]["targets"] == report["kept"]["model"] == 1.0
    assert "no linear was targeted" in text(render(report))


def test_model_card_has_front_matter_load_code_table_and_recipe(plan):
    recipe = "seed: 0\nmodel:\n  name: org/base\n"
    report = evaluated_report(plan, lm_eval={"a|b": {"acc": 0.5}}, warnings=["overlap of 12 %"])
    card = model_card(report, recipe, "org/base", license="apache-2.0")
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "org/base",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["compressor", "compression", "dictionary", "low_rank"],
    }
    code = body.split("```python\n")[1].split("```")[0]
    assert code.startswith("import compressor.hf")
    compile(code, "card", "exec")
    assert yaml.safe_load(body.split("```yaml\n")[1].split("```")[0]) == yaml.safe_load(recipe)
    for line in (
        "| Perplexity per token, window 512 | 5.5 | 6.6 | +20.0 % |",
        "| low_rank | 2 | 3.91 KiB | 1.66 KiB | 42.5 % | 30.0 % | 0.03 |",
        "| a\\|b: acc | – | 0.5 |  |",
        "Warning: overlap of 12 %",
        "32768 tokens in non-overlapping windows of 512",
        "`trust_remote_code` stays False",
    ):
        assert line in body
    tables = [block.splitlines() for block in body.split("\n\n") if block.startswith("|")]
    assert len(tables) == 2
    assert all(
        len({line.replace("\\|", "").count("|") for line in table}) == 1 and len(table) > 2
        for table in tables
    )


def test_model_card_of_a_folder_names_no_place_on_this_machine_and_claims_no_licence(plan):
    card = model_card(build_report(plan, SIZES, "bits"), "seed: 0", "/home/someone/my model")
    front = yaml.safe_load(card.split("---\n")[1])
    assert "/home" not in card and "# my model, compressed" in card
    assert "license" not in front and "base_model" not in front


def test_model_card_says_what_was_trained_and_what_was_searched(plan):
    card = model_card(build_report(plan, SIZES, "bits"), "seed: 0", "org/base")
    assert "Nothing was trained" in card and "earch" not in card
    trials = [
        {"heldout": 0.5, "kept": True},
        {"heldout": None, "kept": False},
        {"heldout": 0.25, "kept": True},
    ]
    trained = {"repair": {"kept": False}, "heal": {"kept": True}}
    card = model_card(
        build_report(
            replace(plan, trained=trained, search={"trials": trials, "heldout": 0.25}),
            SIZES,
            "bits",
        ),
        "seed: 0",
        "org/base",
    )
    assert "Nothing was trained" not in card and "calibration text (heal; no labels" in card
    assert (
        "Search: from held-out KL 0.5 to 0.25; of 2 trials 1 stayed, 1 were dropped, plan.json "
        "says why." in card
    )


def test_recipe_with_backticks_stays_inside_its_fence(plan):
    card = model_card(
        build_report(plan, SIZES, "bits"), "text: |\n  ```\n  # not a heading\n", "reference"
    )
    assert "````yaml\ntext: |\n  ```\n  # not a heading\n````\n" in card


def test_json_is_strict_and_keeps_its_order(tmp_path, plan):
    path = tmp_path / "report.json"
    report = evaluated_report(plan)
    dump_json(path, report)
    first = path.read_bytes()
    assert read_json(path) == json.loads(to_json(report)) == report
    assert list(read_json(path)) == list(report)
    dump_json(path, evaluated_report(plan))
    assert path.read_bytes() == first and [entry.name for entry in tmp_path.iterdir()] == [
        "report.json"
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_are_refused_by_name(tmp_path, plan, value):
    report = evaluated_report(plan)
    report["linears"][1]["error"] = value
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(EvaluationError, match=r"linears.1.error is not finite"):
        dump_json(path, report)
    assert path.read_text() == "old"


def test_writing_over_a_link_is_refused(tmp_path):
    (tmp_path / "report.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"report.json"):
        dump_json(tmp_path / "report.json", {})
