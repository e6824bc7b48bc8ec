"""Every command of README and docs is one that the command line knows; those that are marked run.

A shell or Python block after the comment `<!-- test: run -->` is run, page by page, in a folder of
its own; all others are parsed.
"""

import ast
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from support.markdown import ROOT, Block, anchors, blocks, blocks_of, links, pages

from compressor.cli.app import app
from compressor.cli.options import read_recipe
from compressor.methods.registry import build
from compressor.pipeline.sweep.points import read_points
from compressor.recipe.load import load_recipe, parse_key
from compressor.recipe.presets import presets
from compressor.recipe.sections import Recipe
from compressor.reporting.gate import read_limits

OTHER_PROGRAMS = {"pip", "pre-commit"}  # not ours; their arguments are checked by nobody
USERS_FILES = {"recipe.yaml": "examples/own-text.yaml"}  # what stands in for a file of the reader
SWEEP_SECTIONS = {"base", "grid", "zip", "runs"}
WORKFLOW = ROOT / "examples" / "quality-gate.yml"
PROGRAM = typer.main.get_command(app)
HOUSEKEEPING = [
    *sorted((ROOT / ".github").rglob("*.yml")),
    *(ROOT / name for name in (".pre-commit-config.yaml", "CITATION.cff", "mkdocs.yml")),
]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
RECIPES = [path for path in EXAMPLES if path.name != "sweep.yaml"]


def check_command(words: list[str]) -> None:
    """Raise or fail unless a command of a shell block is one that exists."""
    program, arguments = words[0], words[1:]
    if program == "compressor":
        check_verb(arguments)
    elif program == "accelerate":
        place = arguments.index("-m")
        assert arguments[place + 1] == "compressor"
        check_verb(arguments[place + 2 :])
    elif program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert set(arguments) <= set(targets)
    elif program == "python" and arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]), arguments[1]
    elif program == "python":
        assert (ROOT / arguments[0]).is_file(), arguments[0]
    else:
        assert program in OTHER_PROGRAMS, f"'{program}' is not a program that these pages may name"


def check_verb(arguments: list[str]) -> None:
    """Parse the arguments of `compressor`, and resolve the recipe that they describe."""
    if arguments == ["--version"]:
        return
    command = PROGRAM
    while inner := getattr(command, "commands", None):
        assert arguments and arguments[0] in inner, f"there is no command {arguments[:1]}"
        command, arguments = inner[arguments[0]], arguments[1:]
    if command.name == "lm-eval":
        return
    given = command.make_context(command.name, list(arguments)).params
    if "overrides" in given:
        config = given["config"]
        given |= {"config": USERS_FILES.get(config, config)}
        check_recipe(read_recipe(command.name, given))
    if command.name == "presets" and given["name"]:
        assert given["name"] in presets()


def check_recipe(recipe: Recipe) -> None:
    """Construct every method that a recipe names, with its options."""
    for target in recipe.method:
        for candidate in target.candidates:
            build(candidate.name, candidate.options)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("block", blocks("sh"), ids=str)
def test_commands_parse(block):
    commands = list(block.commands)
    assert commands
    for words in commands:
        check_command(words)


def test_an_unknown_option_a_wrong_key_and_an_unknown_preset_are_noticed():
    for words in (
        "compressor compress A B --kep 1",
        "compressor compress A B --set calibration.widnows=3",
        "compressor compress A B -c svd_lm",
        "compressor compress A B -c gptq_w4 --keep 0.5",
        "compressor compres A B",
        "compressor compress A B --set method.0.candidates.0.options.rnk=3",
        "make nothing",
        "curl somewhere",
    ):
        with pytest.raises((Exception, SystemExit)):
            check_command(words.split())


def test_settings_in_prose_exist():
    """Of `--set key=value` outside of code blocks."""
    found = 0
    for page in pages():
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for key in re.findall(r"`--set '?([a-z_0-9.]+)=", text):
            found += key not in ("a.b",)
            assert key == "a.b" or parse_key(key, f"{page.name}: --set {key}")
    assert found >= 5


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_blocks_are_valid(block, tmp_path):
    check_yaml(block.text, tmp_path / "block.yaml")


def check_yaml(text: str, file: Path) -> None:
    """Read a recipe, a sweep, limits or the workflow by what reads it."""
    file.write_text(text, encoding="utf-8")
    keys = set(yaml.safe_load(text))
    if keys <= Recipe.model_fields.keys():
        check_recipe(load_recipe(file))
    elif keys <= SWEEP_SECTIONS:
        assert read_points(file)
    elif keys == {"limits"}:
        assert read_limits(file)
    else:
        assert f"{text}\n" == WORKFLOW.read_text(encoding="utf-8")


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json_blocks_are_valid(block):
    text = block.text if block.text.startswith("{") else f"{{{block.text}}}"
    assert json.loads(text)


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_blocks_compile_and_their_imports_exist(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Import):
            for name in node.names:
                importlib.import_module(name.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, name.name) for name in node.names), node.module


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    generated = {"cli.md", "recipe.md", "presets.md", "method-options.md", "python-api.md"}
    for link in links(page):
        path, _, anchor = link.partition("#")
        if "://" in path or Path(path).name in {*generated, "changelog.md"}:
            continue
        target = page if not path else (page.parent / path).resolve()
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_workflow_installs_the_package_and_its_commands_parse():
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    steps = [step["run"] for step in workflow["jobs"]["gate"]["steps"] if "run" in step]
    assert not any(re.search(r"pip install \.", step) for step in steps)
    assert re.fullmatch(r"compressor==\d+\.\d+\.\d+", workflow["env"]["COMPRESSOR"])
    for step in steps:
        block = Block(WORKFLOW, 1, "sh", step.replace('"$MODEL"', "MODEL"), runs=False)
        for words in block.commands:
            check_command(words)


@pytest.mark.parametrize("path", HOUSEKEEPING, ids=lambda path: path.name)
def test_housekeeping_is_valid_yaml_and_names_targets_of_make(path):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for job in content.get("jobs", {}).values():
        for step in job["steps"]:
            for words in Block(path, 1, "sh", step.get("run", ""), runs=False).commands:
                check_command(words)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_valid(path, tmp_path):
    text = path.read_text(encoding="utf-8")
    check_yaml(text, tmp_path / "example.yaml")
    for line in text.splitlines():
        if line.startswith("#   compressor"):
            check_command(line.removeprefix("#").split())


SMALL = {
    "calibration.windows": "8",
    "calibration.length": "64",
    "calibration.batch_size": "4",
    "evaluation.windows": "2",
}


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_example_recipes_run(path, tmp_path):
    """On few and short windows, which changes no method and no allocation."""
    sets = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    program = [sys.executable, "-m", "compressor", "compress", "reference", tmp_path / "out"]
    ended = subprocess.run(
        [*program, "-c", path, *sets, "--quiet"], capture_output=True, text=True, timeout=1200
    )
    assert ended.returncode == 0, ended.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert 0 < report["kl"] < 5
    assert report["kept"]["targets"] < 0.85


def runnable() -> list[Path]:
    return [page for page in pages() if any(block.runs for block in blocks_of(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", runnable(), ids=lambda page: page.name)
def test_marked_blocks_run(page, tmp_path):
    """One after the other in an empty folder that holds `examples`."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": programs, "HF_HUB_OFFLINE": "1"}
    for block in blocks_of(page):
        if block.runs:
            shell = ["bash", "-euo", "pipefail", "-c", block.text]
            command = shell if block.language == "sh" else [sys.executable, "-c", block.text]
            ended = subprocess.run(
                command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
            )
            assert ended.returncode == 0, f"{block}: {ended.stderr}"


@pytest.mark.slow
def test_the_custom_method_runs(tmp_path):
    ended = subprocess.run(
        [sys.executable, ROOT / "examples" / "custom_method.py", tmp_path / "custom"],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("kept 0.9")
    assert (tmp_path / "custom" / "report.json").exists()


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("svg")
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "examples" / "explore.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, object] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert (tmp_path / "out" / "explore" / "divergence.svg").stat().st_size > 1000
    assert len(names["rows"]) == 4
