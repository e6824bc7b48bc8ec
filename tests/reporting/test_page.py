"""Pages about checkpoints: what they show, that they need nothing else, and that a name cannot
break them.
"""

import re
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from support.pages import MARKS, checkpoint
from typer.testing import CliRunner

from compressor import load
from compressor.cli.app import app
from compressor.errors import CheckpointError, ConfigError
from compressor.evaluation import samples
from compressor.reporting import figures, page, plots


@pytest.fixture
def two(tmp_path) -> list[Path]:
    return [
        checkpoint(tmp_path / "big <i>"),
        checkpoint(tmp_path / "small $x$", kl=0.5, size=2**19, method="sparse"),
    ]


class Collected(HTMLParser):
    """Ids, the tags that are open, and every address that a page names."""

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.addresses, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        self.addresses += [
            value
            for name, value in attrs
            if name in ("src", "href", "xlink:href", "srcset", "data")
        ]
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_holds_tables_figures_and_recipe_and_needs_nothing_else(two, tmp_path):
    output = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", *map(str, two), "-o", str(output)])
    assert result.exit_code == 0, result.stderr
    text = output.read_text()
    collected = Collected(text)
    assert collected.open == []
    assert len(collected.ids) == len(set(collected.ids))
    assert all(address.startswith(("#", "data:")) for address in collected.addresses)
    assert not re.search(r"@import|<script|url\((?!#)", text)
    assert text.count("<svg") == 1 + 2 * (4 + 2)
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert "big &lt;i&gt;" in text and "<i>" not in text and "<b>" not in text
    assert "5 % &lt; 10 %" in text and "seed: 7" in text and "low_rank alone" in text
    assert plots.INK not in text and "mathdefault" not in text
    assert "<title>small $x$: 0.5 MiB, 0.5</title>" in text
    assert "<title>block 1, mlp.experts.*.w1: 0.4719</title>" in text
    assert "<title>model.layers.0.attn.q_proj: low_rank, 50.0 % kept</title>" in text
    assert "<title>model.layers.1.mlp.experts.1.w1</title>" in text
    assert "<title>model.layers.0.attn.q_proj: 50.0 % kept, 0.02</title>" in text


def test_markdown_holds_the_same_tables(two, tmp_path):
    page.write(page.read(two), tmp_path / "page.md")
    lines = (tmp_path / "page.md").read_text().splitlines()
    assert "| small $x$ | sparse | 51.6 % | 512.00 KiB | 6.6 | 0.5 | yes |" in lines
    rows = [line for line in lines if line.startswith("|")]
    tables = "\n".join(lines).split("\n\n")
    assert all(
        len({row.count(" | ") for row in table.splitlines() if " | " in row}) <= 1
        for table in tables
        if table.startswith("|")
    )
    assert len(rows) > 20 and "seed: 7 # <b>bold</b>" in lines


@pytest.mark.slow
def test_the_same_checkpoints_give_the_same_page(two):
    assert page.render(page.read(two), ".html") == page.render(page.read(two), ".html")


def test_one_checkpoint_without_scores_is_shown_with_the_reason(tmp_path):
    folder = checkpoint(
        tmp_path / "a",
        reason="overflow",
        kl=None,
        perplexity={"original": None, "compressed": None},
    )
    text = page.render(page.read([folder]), ".html")
    assert "scores missing: overflow" in text
    assert text.count("<svg") == 4 + 2
    (folder / "curves.json").unlink()  # as in folders of older versions
    assert page.render(page.read([folder]), ".html").count("<svg") == 4


@pytest.mark.slow
def test_runs_without_kl_are_compared_by_perplexity_and_runs_without_scores_have_no_mark(tmp_path):
    scored = [
        checkpoint(tmp_path / name, kl=None, size=size)
        for name, size in (("a", 2**20), ("b", 2**19))
    ]
    null = checkpoint(tmp_path / "c", kl=None, perplexity={"original": None, "compressed": None})
    text = page.render(page.read([*scored, null]), ".html")
    assert "perplexity per token, against the size" in text
    assert text.count(" MiB, 6.6</title>") == 2


def test_runs_that_do_not_compare_say_so(tmp_path):
    folders = [
        checkpoint(tmp_path / "a"),
        checkpoint(tmp_path / "b", fingerprints=MARKS | {"evaluation": "other"}),
    ]
    assert "were evaluated on different windows" in page.render(page.read(folders), ".md")


@pytest.mark.slow
def test_many_checkpoints_have_one_plot_and_few_figures(tmp_path):
    folders = [
        checkpoint(tmp_path / f"run{number}", size=2**20 + number)
        for number in range(page.FIGURED + 2)
    ]
    text = page.render(page.read(folders), ".html")
    assert text.count("<svg") == 1 + page.FIGURED * (4 + 2)
    assert "shown for the first 8 of 10; give fewer" in text
    assert all(f"<title>run{number}: 1 MiB, 0.25</title>" in text for number in range(10))


def test_series_tell_apart_what_differs_in_more_than_size(tmp_path):
    runs = page.read([checkpoint(tmp_path / name) for name in "abcd"])
    recipes = [
        "allocation: {keep: 0.5}\nmethod: [{candidates: [{name: low_rank, options: {metric: "
        "gram}}]}]",
        "allocation: {keep: 0.6}\nmethod: [{candidates: [{name: low_rank, options: {metric: "
        "gram}}]}]",
        "allocation: {keep: 0.5}\nmethod: [{candidates: [{name: low_rank, options: {metric: "
        "identity}}]}]",
    ]
    runs = [replace(run, recipe=text) for run, text in zip(runs[:3], recipes, strict=True)]
    assert page.series(runs) == [
        "low_rank (metric gram)",
        "low_rank (metric gram)",
        "low_rank (metric identity)",
    ]
    assert page.series(runs[:2]) == ["low_rank", "low_rank"]


def test_curves_of_groups_have_a_panel_of_their_own_and_panels_hold_so_many_lines():
    linears = [
        {
            "name": f"layers.{n}.attn.{part}",
            "method": "m",
            "bits": 50,
            "dense_bits": 100,
            "predicted": 0.1,
            "measured": None,
        }
        for n in range(60)
        for part in "qk"
    ]
    shared = [
        {"linear": "x", "members": [f"layers.{n}.attn.q", f"layers.{n}.attn.k"], "method": "m"}
        for n in range(60)
    ]
    lines = figures.lines_of(
        linears, [*shared, {"linear": "y", "members": ["layers.3.attn.q"], "method": "other"}]
    )
    assert {line["panel"] for line in lines} == {"attn.{q,k}", "attn.q"}
    assert lines[5]["mark"] == (0.5, 0.1) and lines[5]["block"] == 5 and lines[-1]["mark"] is None
    assert [line["block"] for line in figures.thinned(lines)][:3] == [0, 2, 4]
    assert figures.place_of("lm_head") is None


def test_samples_stand_side_by_side_and_cannot_break_the_page(tmp_path):
    runs = page.with_samples(
        page.read([checkpoint(tmp_path / "a")]), [[("a <b>", "one | two\nthree", "four")]]
    )
    html, markdown = (page.render(runs, ending) for ending in (".html", ".md"))
    assert "a &lt;b&gt;" in html and "<b>" not in html
    assert "| a <b> | one \\| two three | four |" in markdown.splitlines()


def test_samples_are_the_continuations_of_the_original_and_of_the_checkpoint(tiny_llama, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_llama, copy)
    (copy / "recipe.yaml").write_text(f"model: {{name: '{tiny_llama}'}}\n")
    ((prompt, original, compressed),) = samples.side_by_side([copy], ["w3 w4 w5"], 6)[0]
    model, tokenizer = load(tiny_llama)
    ids = tokenizer("w3 w4 w5", return_tensors="pt").input_ids
    for _ in range(6):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert prompt == "w3 w4 w5"
    assert original == compressed == tokenizer.decode(ids[0, 3:], skip_special_tokens=True)
    with pytest.raises(ConfigError, match="--sample needs some text"):
        samples.side_by_side([copy], [" "], 6)
    with pytest.raises(ConfigError, match="exceed its 128 positions"):
        samples.side_by_side([copy], ["w3"], 128)


def test_folders_of_one_name_are_told_apart(tmp_path):
    for parent in ("x", "y"):
        (tmp_path / parent).mkdir()
        checkpoint(tmp_path / parent / "out")
    assert (
        len({run.name for run in page.read([tmp_path / "x" / "out", tmp_path / "y" / "out"])}) == 2
    )


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(1, 3), (2, 2), (3, 1)], [0, 1, 2]),
        ([(2, 2), (1, 1)], [1]),
        ([(1, 1), (1, 2), (2, 1)], [0]),
        ([], []),
    ],
)
def test_pareto_front(points, front):
    assert plots.pareto_front(points) == front


def test_figures_name_their_marks_and_take_the_colour_of_the_page():
    figure = plots.heat_map({(0, "q"): 0.0, (3, "q & k"): 0.0}, "error", "viridis")
    root = ElementTree.fromstring(figure)
    assert [title.text for title in root.iter(f"{{{plots.SVG}}}title")] == [
        "block 0, q: 0",
        "block 3, q & k: 0",
    ]
    assert "currentColor" in figure and "width" not in root.attrib


def test_what_is_no_checkpoint_is_refused(tmp_path):
    folder = checkpoint(tmp_path / "a")
    with pytest.raises(ConfigError, match=r"ends in \.html or \.md"):
        page.write(page.read([folder]), tmp_path / "page.pdf")
    with pytest.raises(ConfigError, match="no such folder"):
        page.read([tmp_path / "none"])
    with pytest.raises(CheckpointError, match=r"report\.json: no such file"):
        page.read([tmp_path])
    curves = (folder / "curves.json").read_text()
    for text in ('{"curves": 3}', '{"curves": [{"members": ["none"]}]}'):
        (folder / "curves.json").write_text(text)
        with pytest.raises(CheckpointError, match="is not a report"):
            page.read([folder])
    (folder / "curves.json").write_text(curves)
    (folder / "report.json").write_text('{"kept": 3}')
    with pytest.raises(CheckpointError, match="is not a report"):
        page.read([folder])
    assert not list(tmp_path.glob("page*"))


def test_html_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    runs = page.read([checkpoint(tmp_path / "a")])
    with pytest.raises(ConfigError, match=r"compressor\[report\]"):
        page.render(runs, ".html")
    assert page.render(runs, ".md")
