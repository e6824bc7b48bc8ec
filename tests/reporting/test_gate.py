"""The quality gate: limits of every kind and from both sides, what is refused, and what it says to
people and to CI.
"""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support.models import read_json
from typer.testing import CliRunner

from compressor.cli.app import app
from compressor.errors import CheckpointError, ConfigError
from compressor.pipeline import run as pipeline
from compressor.recipe.load import load_recipe
from compressor.reporting import gate
from compressor.reporting.gate import Limits

REGRESSION = 1.03
REPORT = {
    "bytes": {"original": 2000, "compressed": 1000},
    "perplexity": {"original": 8.0, "compressed": 10.0},
    "kl": 0.04,
    "tokens": 640,
    "window": 64,
    "reason": None,
    "lm_eval": {"quiz": {"acc": 0.5, "acc_stderr": None, "samples": 20, "max_length": 64}},
    "fingerprints": {"evaluation": "abc"},
}


@pytest.fixture
def write(tmp_path):
    def write_report(name: str, **changes) -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(REPORT | changes))
        return path

    return write_report


def perplexity(value: float) -> dict:
    return {"original": 8.0, "compressed": value}


def run(*arguments):
    return CliRunner().invoke(app, ["gate", *map(str, arguments)])


@pytest.fixture(scope="module")
def checkpoint(tiny_llama, text_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gate") / "out"
    small = [
        "calibration.windows=8",
        "calibration.length=32",
        "calibration.heldout=2",
        "evaluation.windows=6",
        "allocation.keep=0.6",
    ]
    named = {
        "model.name": str(tiny_llama),
        "calibration.source": str(text_file),
        "evaluation.source": str(text_file),
    }
    pipeline.compress(load_recipe("ci", small, named | {"model.device": "cpu"}), folder)
    return folder


def test_a_regression_of_three_percent_is_caught_and_the_noise_of_another_batching_is_not(
    checkpoint, tiny_llama, text_file, tmp_path
):
    baseline, again = tmp_path / "baseline.json", tmp_path / "again.json"
    assert run("--update", checkpoint, "--baseline", baseline).exit_code == 0
    report = read_json(checkpoint / "report.json")
    measured = pipeline.evaluate(
        str(checkpoint),
        str(tiny_llama),
        text=str(text_file),
        window=32,
        windows=6,
        batch_size=1,
        device="cpu",
    )
    again.write_text(
        json.dumps(
            report | {"perplexity": perplexity(measured["perplexity"]), "kl": measured["kl"]}
        )
    )
    assert measured["fingerprint"] == report["fingerprints"]["evaluation"]
    assert (
        run(
            again,
            "--baseline",
            baseline,
            "--tolerance",
            "perplexity=0.1%",
            "--tolerance",
            "kl=0.1%",
        ).exit_code
        == 0
    )
    worse = REGRESSION * report["perplexity"]["compressed"]
    again.write_text(json.dumps(report | {"perplexity": perplexity(worse)}))
    result = run(again, "--baseline", baseline)
    assert result.exit_code == 3
    assert [
        line.split(" is ")[0]
        for line in result.stdout.splitlines()
        if line.startswith("regression: ")
    ] == ["regression: perplexity"]


@pytest.mark.parametrize(
    ("limits", "measured", "passed"),
    [
        (Limits(max="10.5"), 10.5, True),
        (Limits(max="10.5"), 10.6, False),
        (Limits(max="1.1x"), 11.0, True),
        (Limits(max="1.1x"), 11.1, False),
        (Limits(min="9"), 9.0, True),
        (Limits(min="9"), 8.9, False),
        (Limits(min="0.95x"), 9.5, True),
        (Limits(min="0.95x"), 9.4, False),
        (Limits(max_increase="2%"), 10.2, True),
        (Limits(max_increase="2%"), 10.3, False),
        (Limits(max_increase="2%"), 1.0, True),
        (Limits(max_increase="0.5"), 10.5, True),
        (Limits(max_increase="0.5"), 10.6, False),
        (Limits(max_decrease="2%"), 9.8, True),
        (Limits(max_decrease="2%"), 9.7, False),
        (Limits(max_decrease="2%"), 99.0, True),
        (Limits(tolerance="2%"), 10.1, True),
        (Limits(tolerance="2%"), 10.3, False),
        (Limits(tolerance="2%"), 9.7, False),
        (Limits(tolerance="0"), 10.0, True),
    ],
)
def test_limits_hold_up_to_their_bound(write, limits, measured, passed):
    found = gate.compare(
        write("new", perplexity=perplexity(measured)), write("old"), {"perplexity": limits}
    )
    assert [check["passed"] for check in found["checks"]] == [passed]
    assert len(found["broken"]) == (not passed)


def test_a_broken_limit_is_one_line_with_score_measurement_baseline_and_limit(write):
    new, old = write("new", perplexity=perplexity(9.0), kl=0.06), write("old")
    result = run(
        new,
        "--baseline",
        old,
        "--max-kl",
        "0.05",
        "--tolerance",
        "perplexity=2%",
        "--min",
        "quiz.acc=0.95x",
    )
    assert result.exit_code == 3
    assert result.stdout.splitlines()[-2:] == [
        "regression: kl is 0.06, at most 0.05 is allowed (max 0.05, baseline 0.04)",
        "regression: perplexity is 9, at least 9.8 is allowed (tolerance 2%, baseline 10)",
    ]
    as_json = run(new, "--baseline", old, "--max-kl", "0.05", "--json")
    assert (as_json.exit_code, len(json.loads(as_json.stdout)["broken"])) == (3, 1)


def test_without_limits_perplexity_may_rise_by_two_percent(write):
    assert (
        run(write("new", perplexity=perplexity(10.19)), "--baseline", write("old")).exit_code == 0
    )
    assert (
        run(write("new", perplexity=perplexity(10.21)), "--baseline", write("old")).exit_code == 3
    )


def test_a_file_of_limits_is_added_to_by_options_which_win(write, tmp_path):
    file = tmp_path / "limits.yaml"
    file.write_text("limits:\n  kl: {max: 1e-3}\n  bytes: {max_increase: 1%}\n")
    new, old = write("new"), write("old")
    assert run(new, "--baseline", old, "--limits", file).exit_code == 3
    result = run(
        new,
        "--baseline",
        old,
        "--limits",
        file,
        "--max-kl",
        "0.05",
        "--max-perplexity-increase",
        "0.5",
        "--json",
    )
    assert result.exit_code == 0
    assert [check["score"] for check in json.loads(result.stdout)["checks"]] == [
        "kl",
        "bytes",
        "perplexity",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "limits:\n  kl:\n    maks: 0.05\n",
            [":3: unknown key 'maks' in limits.kl", "did you mean 'max'?"],
        ),
        ("limit: {}\n", [":1: unknown key 'limit'", "'limits'"]),
        (
            "limits:\n  kl: {max: 2%}\n",
            [
                ":2: limits.kl.max must be a number or a multiple of the baseline such as 0.95x, "
                "not '2%'"
            ],
        ),
        ("limits:\n  kl: {max_increase: 0.9x}\n", [":2: limits.kl.max_increase", "2%"]),
        ("limits:\n  kl: {max: true}\n", [":2: limits.kl.max", "True"]),
        ("limits: 3\n", [":1: limits should be a mapping"]),
        ("limits: {kl: 0.05}\n", [":1: limits.kl should be a mapping"]),
        ("[1]\n", [":1: should be a mapping"]),
        ("limits: {}\n", ["the limits bound nothing"]),
    ],
)
def test_bad_files_of_limits_are_refused_with_their_place(write, tmp_path, text, words):
    file = tmp_path / "limits.yaml"
    file.write_text(text)
    result = run(write("new"), "--baseline", write("old"), "--limits", file)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words), result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-kl", "5%"], ["--max kl", "0.95x"]),
        (["--max-perplexity-increase", "1.02x"], ["--max-perplexity-increase", "2%"]),
        (["--min", "quiz.acc"], ["--min quiz.acc: expected score=value"]),
        (["--min", "quiz.ac=0.9x"], ["no score 'quiz.ac'", "'quiz.acc'"]),
        (["--update", "--max-kl", "1"], ["--update"]),
    ],
)
def test_bad_options_are_refused(write, options, words):
    result = run(write("new"), "--baseline", write("old"), *options)
    assert result.exit_code == 2
    assert all(word in result.stderr for word in words), result.stderr


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"fingerprints": {"evaluation": "abd"}}, ConfigError, "different windows"),
        ({"fingerprints": {}}, CheckpointError, "fingerprints.evaluation"),
        (
            {"perplexity": perplexity(None), "reason": "overflow"},
            CheckpointError,
            r"no scores \(overflow\)",
        ),
        ({"kl": None}, CheckpointError, "no scores"),
        ({"kl": float("nan")}, CheckpointError, "kl is nan, expected a finite number"),
        ({"kl": "0.1"}, CheckpointError, "finite number"),
        ({"perplexity": 3}, CheckpointError, "is not a report"),
        (
            {"lm_eval": {"quiz": {"acc": 0.5, "samples": 10, "max_length": 64}}},
            ConfigError,
            "samples is 10 .* and 20",
        ),
        ({"lm_eval": None}, ConfigError, "no score 'quiz.acc'"),
    ],
)
def test_reports_that_do_not_compare_are_refused(write, changes, error, words):
    with pytest.raises(error, match=words):
        gate.compare(
            write("new", **changes),
            write("old"),
            {"quiz.acc": Limits(min="0.9x"), "kl": Limits(max="1")},
        )


def test_missing_reports_and_baselines_name_the_cure(write, tmp_path):
    with pytest.raises(ConfigError, match="gate --update"):
        gate.compare(write("new"), tmp_path / "none.json")
    with pytest.raises(ConfigError, match="no such file or folder"):
        gate.compare(tmp_path / "none", write("old"))
    with pytest.raises(CheckpointError, match="compressor compress"):
        gate.compare(tmp_path, write("old"))


def test_a_multiple_of_a_negative_baseline_is_refused(write):
    negative = {"quiz": {"loglikelihood": -2.0, "samples": 20, "max_length": 64}}
    new, old = write("new", lm_eval=negative), write("old", lm_eval=negative)
    with pytest.raises(ConfigError, match="limit its change"):
        gate.compare(new, old, {"quiz.loglikelihood": Limits(min="0.95x")})
    assert not gate.compare(new, old, {"quiz.loglikelihood": Limits(max_decrease="5%")})["broken"]


def test_update_writes_a_small_baseline_and_replaces_nothing_else(write, tmp_path):
    report, baseline = write("new", linears=[{"name": "x"}]), tmp_path / "baseline.json"
    for _ in range(2):
        gate.update(report, baseline)
    assert read_json(baseline) == {key: value for key, value in REPORT.items() if key != "reason"}
    assert not gate.compare(report, baseline)["broken"]
    assert {path.name for path in tmp_path.iterdir()} == {"new", "baseline.json"}
    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(ConfigError, match="is no baseline"):
        gate.update(report, other)
    assert other.read_text() == "{}"


def test_junit_and_github_name_what_is_broken(write, tmp_path):
    junit = tmp_path / "gate.xml"
    options = ["--max-kl", "0.01", "--max-perplexity-increase", "2%", "--junit", junit, "--github"]
    result = run(write("new", perplexity=perplexity(11.0)), "--baseline", write("old"), *options)
    assert result.exit_code == 3
    suite = ElementTree.parse(junit).getroot()
    assert (suite.attrib["tests"], suite.attrib["failures"]) == ("2", "2")
    assert suite.find("testcase").attrib["name"] == "kl max 0.01"
    assert "kl is 0.04" in suite.find("testcase/failure").attrib["message"]
    annotations = [
        line
        for line in result.stdout.splitlines()
        if line.startswith("::error title=Quality gate::")
    ]
    assert len(annotations) == 2
    assert "(max increase 2%25, baseline 10)" in annotations[1]


def test_the_gate_needs_no_torch(write):
    code = (
        "import sys\nfrom compressor.cli.app import app\napp(sys.argv[1:], "
        "standalone_mode=False)\nsys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "gate", write("new"), "--baseline", write("old")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_committed_baseline_and_limits_fit_the_recipe_of_the_repository():
    folder = Path(__file__).parents[2] / "benchmarks" / "gate"
    found = gate.compare(
        folder / "baseline.json", folder / "baseline.json", gate.read_limits(folder / "limits.yaml")
    )
    assert not found["broken"]
    assert {check["score"] for check in found["checks"]} == {"perplexity", "kl", "bytes"}
    recipe = load_recipe("ci")
    assert (
        read_json(folder / "baseline.json")["tokens"]
        == recipe.evaluation.windows * recipe.evaluation_window
    )
