"""Sweep files: which points they describe, and what is refused with its line."""

import pytest

from compressor.errors import ConfigError
from compressor.pipeline.sweep.points import MOST, name_of, read_points


@pytest.fixture
def points(tmp_path):
    def read(text):
        (tmp_path / "sweep.yaml").write_text(text)
        return read_points(tmp_path / "sweep.yaml")

    return read


def test_grid_times_zip_and_named_runs(points):
    found = points("""
base:
  config: svd_llm
  model: {name: reference}
  allocation: {count: parameters}
grid:
  config: [svd, default]
  allocation.keep: [0.8, 0.6]
zip:
  seed: [1, 2]
  calibration.windows: [8, 16]
runs:
  four_bits: {config: gptq_w4, allocation: {count: bits}}
  as_it_is: {}
""")
    assert len(found) == 2 * 2 * 2 + 2
    assert found[0].name == "svd+keep=0.8+seed=1+windows=8"
    assert found[0].settings == {
        "config": "svd",
        "allocation.keep": 0.8,
        "seed": 1,
        "calibration.windows": 8,
    }
    assert [point.recipe.allocation.keep for point in found[:4]] == [0.8, 0.8, 0.6, 0.6]
    assert [(point.recipe.seed, point.recipe.calibration.windows) for point in found[:2]] == [
        (1, 8),
        (2, 16),
    ]
    assert all(point.recipe.model.name == "reference" for point in found)
    assert (
        found[0].recipe.allocation.count == "parameters"
        and found[8].recipe.allocation.kind == "fixed"
    )
    assert found[8].name == "four_bits" and found[8].recipe.allocation.count == "bits"
    assert (
        found[9].recipe.method[0].candidates[0].options["metric"] == "gram"
        and found[9].recipe.allocation.keep == 0.8
    )


def test_names_use_the_shortest_end_that_tells_keys_apart():
    assert (
        name_of({"calibration.batch_size": 2, "evaluation.batch_size": 4})
        == "calibration.batch_size=2+evaluation.batch_size=4"
    )
    assert (
        name_of({"config": "dir/my.yaml", "calibration.source": "a b/c.txt"})
        == "my+source=a-b-c.txt"
    )


REFUSED = {
    "": r"sweep\.yaml:1: empty",
    "[1]": r"sweep\.yaml:1: expected a mapping of base, grid, zip, runs",
    "base: {}": r"sweep\.yaml:1: a sweep without points",
    "grids: {seed: [1]}": r"sweep\.yaml:1: unknown key 'grids' in a sweep; did you mean 'grid'\?",
    "grid: [1]": r"sweep\.yaml:1: grid should be a mapping",
    "grid:\n  seed: 1": r"sweep\.yaml:2: seed should be a list of values, not empty",
    "grid:\n  seed: []": r"sweep\.yaml:2: seed should be a list",
    "zip:\n  seed: [1, 2]\n  calibration.windows: [1, 2, 3]": r"sweep\.yaml:1: lists of zip have 2 and 3 values",
    "grid:\n  seed: [1]\nzip:\n  seed: [2]": r"sweep\.yaml:4: seed is in the grid too",
    "grid:\n  allocation.kep: [0.8]": r"sweep\.yaml:2: there is no 'allocation\.kep' in a recipe; did you mean 'allocation\.keep'\?",
    "grid:\n  allocation.keep: [0.8, 1.4]": r"sweep\.yaml:2: allocation\.keep .*not 1\.4",
    "base:\n  seeed: 1\nruns:\n  a: {}": r"sweep\.yaml:2: there is no 'seeed' in a recipe",
    "base:\n  allocation:\n    kep: 1\nruns:\n  a: {}": r"sweep\.yaml:3: there is no 'allocation\.kep'",
    "runs:\n  a:\n    config: svd_llmm": r"'svd_llmm' is neither a recipe file nor a preset; did you mean 'svd_llm'\?",
    "runs:\n  a/b: {}": r"sweep\.yaml:2: 'a/b' does not name a folder",
    "runs:\n  'a,b': {}": r"sweep\.yaml:2: 'a,b' does not name a folder",
    "runs:\n  a: 3": r"sweep\.yaml:2: a should be a mapping of settings",
    "grid:\n  seed: [1, 1]": r"two points have the output name 'seed=1'",
    "grid:\n  model.name: [a b, a-b]": r"two points have the output name 'name=a-b'",
    "grid:\n  config: [svd]\nruns:\n  SVD: {}": r"two points have the output name 'SVD'",
}


@pytest.mark.parametrize("text", REFUSED)
def test_refused_with_the_line(points, text):
    with pytest.raises(ConfigError, match=REFUSED[text]):
        points(text)


def test_a_million_points_are_counted_not_made(points):
    lists = "\n".join(
        f"  {key}: {list(range(1, 101))}"
        for key in ("seed", "calibration.windows", "calibration.length")
    )
    with pytest.raises(ConfigError, match=rf"1,000,000 points, {MOST:,} are the most"):
        points(f"grid:\n{lists}")


def test_names_of_points_pass_through_the_arguments_of_lm_eval():
    from lm_eval.utils import simple_parse_args_string

    name = name_of({"config": "svd_llm", "allocation.keep": 0.8, "allocation.tie": ["qkv", "up"]})
    assert name == "svd_llm+keep=0.8+tie=-qkv-up"
    assert simple_parse_args_string(f"pretrained=out/{name},dtype=float32") == {
        "pretrained": f"out/{name}",
        "dtype": "float32",
    }
