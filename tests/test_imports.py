"""The layers of the package: a file imports only from lower levels, or from files before it in its own level."""

import ast
import tomllib
from pathlib import Path

import pytest

import compressor

PACKAGE = Path(compressor.__file__).parent
MAX_LINES, MAX_FUNCTION_LINES = 300, 40

LEVELS = (
    (
        "errors",
        "processes",
        "progress",
        "clock",
        "logs",
        "resources",
        "tables",
        "linalg",
        "yaml_reader",
        "sizes",
        "sections",
        "recipe",
        "config",
    ),
    ("stats", "linears", "plan", "roles", "shards", "sources", "timings"),
    ("methods",),
    ("knapsack", "compensate", "squeeze", "allocate"),
    ("manifest", "folder", "staging", "codec", "store", "cache", "journal", "weights", "artifacts", "hf", "model", "data", "calibrate"),
    (
        "scoring",
        "checkpoint",
        "export",
        "exchange",
        "adapter",
        "report",
        "plots",
        "figures",
        "page",
        "samples",
        "hub",
        "speed",
        "lm_eval_bridge",
        "restart",
        "sequential",
        "learners",
        "optimizers",
        "parallel",
        "pace",
        "training",
        "loras",
        "latents",
        "repair",
        "heal",
        "objectives",
        "gate",
    ),
    ("assignments", "decompose", "curves", "probe", "units", "rules", "planning"),
    (
        "stages",
        "workshop",
        "selection",
        "search",
        "refine",
        "finer",
        "recovery",
        "building",
        "estimate",
        "evaluation",
        "pipeline",
        "together",
        "points",
        "sweep",
    ),
    ("options", "verbs", "adapter_verbs", "worker", "listings", "cli", "__main__"),
)
ORDER = [module for level in LEVELS for module in level]
NO_TORCH = LEVELS[0][:7] + LEVELS[0][8:] + ("plan", "roles", "shards", "manifest", "folder", "staging", "gate")
NO_TORCH += ("hub", "options", "verbs", "adapter_verbs", "listings", "cli")
UNITS = sorted({path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")} - {"__init__"})


def files(unit: str) -> list[Path]:
    return [PACKAGE / f"{unit}.py"] if (PACKAGE / f"{unit}.py").exists() else sorted((PACKAGE / unit).rglob("*.py"))


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    """First names below `compressor`, or names of other packages, that a file imports anywhere or when it is loaded."""
    tree = ast.parse(path.read_text())
    names: set[str] = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def own(names: set[str]) -> set[str]:
    below = {name.split(".")[1] for name in names if name.startswith("compressor.")}
    return {name for name in below if (PACKAGE / name).exists() or (PACKAGE / f"{name}.py").exists()}


@pytest.mark.parametrize("unit", UNITS)
def test_imports_point_down(unit):
    assert unit in ORDER, f"give '{unit}' a level"
    for path in files(unit):
        for name in own(imported(path)) - {unit}:
            assert ORDER.index(name) < ORDER.index(unit), f"{path.relative_to(PACKAGE)} imports '{name}', which is not below it"


@pytest.mark.parametrize("unit", NO_TORCH)
def test_light_modules_import_nothing_heavy_when_loaded(unit):
    for path in files(unit):
        names = imported(path, top_level_only=True)
        assert not {name.split(".")[0] for name in names} & {"torch", "transformers", "datasets", "lm_eval", "accelerate"}
        assert own(names) <= set(NO_TORCH), f"{unit} loads {own(names) - set(NO_TORCH)}"


def test_every_package_is_installed():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    found = {".".join(path.parent.relative_to(PACKAGE.parent).parts) for path in PACKAGE.rglob("__init__.py")}
    assert found <= listed
    assert {"compressor.configs", "compressor.calibration", "compressor.reference"} <= listed


@pytest.mark.parametrize("unit", UNITS)
def test_files_and_functions_stay_short(unit):
    for path in files(unit):
        text = path.read_text()
        assert len(text.splitlines()) <= MAX_LINES, path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= MAX_FUNCTION_LINES, f"{path.name}: {node.name} has {lines} lines"
