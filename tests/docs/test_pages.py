"""Pages say what the code says: lists are complete, generated pages hold what they are made from."""

import dataclasses
import json
import re
import runpy
import tomllib
import typing
from pathlib import Path

import pytest
import typer
from support.markdown import ROOT, blocks_of

from compressor import __version__
from compressor.cli.app import app
from compressor.linears import KINDS
from compressor.methods import METHODS
from compressor.plan import Choice, Plan
from compressor.recipe.presets import presets
from compressor.recipe.sections import Recipe

DOCS = ROOT / "docs"


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def generated():
    return runpy.run_path(str(DOCS / "generate.py"))["pages"]()


def test_the_readme_fits_and_opens_with_the_two_commands():
    lines = read("README.md").splitlines()
    assert len(lines) <= 200
    assert any(line.startswith("make run") for line in lines[:20])
    assert any(line.startswith("make test") for line in lines[:20])


def test_the_number_of_presets_is_that_of_the_files():
    count = len(presets())
    assert f"[All {count} →]" in read("README.md")
    assert f"- {count} [presets]" in read("docs/index.md")


def test_the_number_of_faults_is_that_of_the_page():
    count = sum(line.startswith("| F") for line in read("docs/reliability.md").splitlines())
    assert f" lists {count} faults" in read("README.md")


def test_the_guide_lists_every_preset_once():
    rows = read("docs/guides/choose-a-preset.md").partition("## All of them")[2].splitlines()
    cells = [row.split("|")[1] for row in rows if row.startswith("| `")]
    names = [name.strip(" `") for cell in cells for name in cell.split(",")]
    assert sorted(names) == sorted(presets())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_and_option_is_explained(name):
    text = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "methods").glob("*.md"))
    for word in (name, *(field.name for field in dataclasses.fields(METHODS[name]))):
        assert f"`{word}`" in text, word


@pytest.mark.parametrize(
    ("section", "field", "page"),
    [
        ("allocation", "kind", "docs/methods/allocation.md"),
        ("allocation", "damage", "docs/methods/allocation.md"),
        ("compensation", "metric", "docs/methods/residuals.md"),
        ("heal", "train", "docs/methods/training.md"),
        ("repair", "optimizer", "docs/methods/training.md"),
    ],
)
def test_every_choice_of_a_field_is_explained(section, field, page):
    model = Recipe.model_fields[section].annotation
    values = typing.get_args(model.model_fields[field].annotation)
    assert [value for value in values if not re.search(rf"[`: ]{value}\b", read(page))] == []


def test_every_storage_kind_is_described():
    for page in ("docs/concepts.md", "docs/reference/checkpoint-format.md"):
        assert all(f"`{kind}`" in read(page) for kind in KINDS)


def test_every_key_of_a_plan_is_described():
    text = read("docs/reference/plan-json.md")
    keys = [field.name for field in dataclasses.fields(Choice)] + list(Plan({}).to_json())
    assert [key for key in keys if f"`{key}`" not in text] == []


def test_the_command_page_has_every_command_and_option(generated):
    page = generated["reference/cli.md"]
    commands = typer.main.get_command(app).commands
    assert [name for name in commands if f"\n## {name}" not in page] == []
    options = [option for command in commands.values() for option in getattr(command, "params", ())]
    assert [option.opts for option in options if f"`{', '.join(option.opts)}" not in page] == [
        option.opts for option in options if not option.opts[0].startswith("-")
    ]


def test_the_recipe_page_has_every_field_with_its_meaning(generated):
    page = generated["reference/recipe.md"]
    sections = {
        name: field.annotation.model_fields
        for name, field in Recipe.model_fields.items()
        if hasattr(field.annotation, "model_fields")
    }
    assert [name for name in sections if f"\n## {name}\n" not in page] == []
    rows = {
        row.split("|")[1].strip(" `"): row for row in page.splitlines() if row.startswith("| `")
    }
    assert {name for fields in sections.values() for name in fields} <= rows.keys()
    assert [name for name, row in rows.items() if row.rstrip(" |").count("|") < 4] == []


def test_the_preset_page_has_every_preset_with_its_deviations(generated):
    page = generated["reference/presets.md"]
    assert [name for name in presets() if f"\n## {name}\n" not in page] == []
    assert page.count("Deviations from the paper") == len(presets())


def test_the_options_page_has_values_defaults_and_meanings(generated):
    page = generated["reference/method-options.md"]
    row = next(row for row in page.splitlines() if row.startswith("| `max_rank` "))
    assert row.startswith("| `max_rank` | number > 0, ≤ 1 | `1` | largest rank offered")
    assert [name for name in METHODS if f"\n## {name}\n" not in page] == []
    assert [row for row in page.splitlines() if row.endswith("|  |")] == []


def test_the_architecture_page_has_the_layers():
    contract = tomllib.loads(read("pyproject.toml"))["tool"]["importlinter"]["contracts"][0]
    layers = [set(layer.split(" | ")) for layer in contract["layers"]]
    rows = re.findall(
        r"^\| (\d+) \| `(\w+)`", read("docs/developing/architecture.md"), re.MULTILINE
    )
    numbers = sorted({int(number) for number, _ in rows}, reverse=True)
    assert [{name for at, name in rows if int(at) == number} for number in numbers] == layers


def test_versions_agree():
    assert f"\nversion: {__version__}\n" in read("CITATION.cff")
    assert f"compressor=={__version__} " in read("examples/quality-gate.yml")
    assert f"## {__version__}\n" in read("CHANGELOG.md")


def test_the_same_block_shows_the_same_table():
    """README and quickstart show one run."""
    table = next(
        block.text for block in blocks_of(ROOT / "README.md") if block.text.startswith("┃")
    )
    assert all(line in read("docs/quickstart.md") for line in table.splitlines())


def test_figures_are_drawn_from_the_measured_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    drawn = runpy.run_path(str(DOCS / "figures.py"))["draw"](tmp_path)
    assert {path.name for path in drawn} <= {path.name for path in (DOCS / "assets").iterdir()}
    shown = json.loads(read("docs/assets/figures.json"))["smollm2"]["series"]
    ours = next(series["points"] for series in shown if series.get("ours"))
    assert all(f"**{divergence:g}**" in read("docs/results.md") for _, divergence in ours)


def test_every_page_is_in_the_navigation():
    listed = read("mkdocs.yml")
    paths = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    assert [path for path in paths if f": {path}\n" not in listed] == []


@pytest.mark.slow
def test_every_key_of_a_report_is_described(tmp_path):
    from compressor import compress
    from compressor.recipe.load import load_recipe

    small = {"calibration.windows": 8, "calibration.length": 64, "evaluation.windows": 2}
    options = {"model.name": "reference"} | small
    found = compress(load_recipe("svd_llm", options=options), tmp_path / "out")
    text = read("docs/reference/report-json.md")
    assert [key for key in found if f"`{key}`" not in text and f"`{key}." not in text] == []
    timings = json.loads((tmp_path / "out" / "timings.json").read_text())
    assert [key for key in (*timings["seconds"], *timings["host"]) if f"{key}`" not in text] == []
    written = {path.suffix or path.name for path in Path(tmp_path / "out").iterdir()}
    described = read("docs/reference/checkpoint-format.md")
    assert [name for name in written if name.strip(".") not in described] == []
