import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import compressor
from compressor.cli.app import app
from compressor.errors import EvaluationError
from compressor.recipe.load import dump_yaml, load_recipe, schema
from compressor.recipe.presets import presets
from compressor.reporting import report

VERBS = [
    "compress",
    "plan",
    "calibrate",
    "evaluate",
    "sweep",
    "clean",
    "inspect",
    "verify",
    "export",
    "report",
    "gate",
    "methods",
    "presets",
    "schema",
    "adapter",
    "lm-eval",
]
MAX_BODY_LINES = 15
MAX_HELP_SECONDS = 0.5  # of processor time


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def pipeline(monkeypatch):
    """A pipeline that records how it was called and returns what `returns` holds for the
    function.
    """

    class Recorder(types.ModuleType):
        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)

            def record(*arguments, **keywords):
                self.calls[name] = (arguments, keywords)
                found = self.returns.get(name, {"done": name})
                if isinstance(found, Exception):
                    raise found
                return found

            return record

    recorder = Recorder("compressor.pipeline.run")
    recorder.calls, recorder.returns = {}, {"verify": []}
    monkeypatch.setitem(sys.modules, "compressor.pipeline.run", recorder)
    monkeypatch.setattr("compressor.pipeline.run", recorder, raising=False)
    monkeypatch.setattr(report, "render", lambda found: f"table of {sorted(found)}")
    return recorder


def options_of(name: str) -> set[str]:
    command = typer.main.get_command(app).commands[name]
    return {
        option
        for parameter in command.params
        for option in parameter.opts
        if option.startswith("--")
    }


def test_help_lists_every_verb():
    result = run("--help")
    assert result.exit_code == 0
    assert all(f" {verb} " in result.stdout for verb in VERBS)
    assert sorted(typer.main.get_command(app).commands) == sorted(VERBS)


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb not in ("lm-eval", "adapter")])
def test_every_verb_explains_itself_and_speaks_json(verb):
    result = run(verb, "--help")
    assert result.exit_code == 0
    assert {"--json", "--verbose", "--quiet"} <= options_of(verb)


def test_plan_takes_the_options_of_compress():
    assert options_of("compress") - options_of("plan") == {
        "--plan",
        "--restart",
        "--push-to",
        "--public",
    }


def test_dangerous_options_stand_apart():
    text = run("compress", "--help").stdout
    assert text.index("Dangerous") < text.index("--overwrite")
    assert text.index("--seed") < text.index("Dangerous")


def test_version():
    assert run("--version").stdout == f"{compressor.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["inspekt"],
        ["compress", "model"],
        ["compress", "model", "out", "--nope"],
        ["export", "a", "b", "--format", "x"],
    ],
)
def test_wrong_usage_ends_with_2(arguments):
    assert run(*arguments).exit_code == 2


def test_help_is_fast_and_loads_no_torch():
    code = """
import sys, time
from compressor.cli.app import app
try:
    app(["--help"])
except SystemExit as end:
    assert end.code == 0
assert not {"torch", "transformers", "datasets", "lm_eval"} & set(sys.modules)
print(time.process_time(), file=sys.stderr)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert float(result.stderr) < MAX_HELP_SECONDS


def test_import_loads_no_torch_and_knows_its_functions():
    code = (
        "import compressor, sys; assert 'torch' not in sys.modules; assert 'compress' in "
        "compressor.__all__"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_module_can_be_run():
    result = subprocess.run(
        [sys.executable, "-m", "compressor", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == compressor.__version__


def test_compress_hands_over_the_recipe_of_its_options(pipeline):
    result = run(
        *[
            "compress",
            "some/model",
            "out",
            "--config",
            "svd_llm",
            "--method",
            "utilized_rank",
            "--keep",
            "0.7",
            "--calibration",
            "text.txt",
        ],
        *[
            "--set",
            "calibration.windows=10",
            "--set",
            "method.0.candidates.0.options.metric=gram",
            "--device",
            "cpu",
            "--dtype",
            "float16",
            "--seed",
            "7",
        ],
        *["--overwrite", "--stats", "sums"],
    )
    assert result.exit_code == 0, result.stderr
    (recipe, output), keywords = pipeline.calls["compress"]
    assert output == Path("out")
    assert (keywords["stats"], keywords["plan"]) == (Path("sums"), None)
    expected = load_recipe(
        "svd_llm",
        [
            "calibration.windows=10",
            "model.name=some/model",
            "calibration.source=text.txt",
            "method.0.candidates.0.options.metric=gram",
            "model.device=cpu",
            "output.dtype=float16",
        ],
        {"method": "utilized_rank", "allocation.keep": 0.7, "seed": 7, "output.overwrite": True},
    )
    assert recipe == expected
    assert result.stdout == "table of ['done']\n"


def test_options_left_out_leave_the_recipe_alone(pipeline, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "seed: 3\nmodel: {device: cpu}\noutput: {overwrite: true, dtype: float32}\nallocation: "
        "{target_size: 3MB}\n"
    )
    assert run("compress", "m", "out", "-c", str(file)).exit_code == 0
    assert pipeline.calls["compress"][0][0] == load_recipe(file, ["model.name=m"])


def test_target_size_takes_the_place_of_keep(pipeline):
    run("plan", "m", "--target-size", "3MB")
    allocation = pipeline.calls["plan"][0][0].allocation
    assert (allocation.keep, allocation.target_size) == (None, "3MB")


def test_failed_evaluation_prints_the_report_and_ends_with_1(pipeline):
    pipeline.returns["compress"] = {"kl": None, "failure": "the evaluation failed: overflow"}
    result = run("compress", "m", "out", "--json")
    assert json.loads(result.stdout)["kl"] is None
    assert result.stderr.endswith("error: the evaluation failed: overflow\n")
    assert result.exit_code == 1


def test_calibrate_passes_folder_and_overwrite(pipeline):
    assert run("calibrate", "m", "sums", "--overwrite").exit_code == 0
    (recipe, folder), keywords = pipeline.calls["calibrate"]
    assert (recipe.model.name, folder, keywords["overwrite"]) == ("m", Path("sums"), True)


def test_evaluate_passes_its_options(pipeline):
    pipeline.returns["evaluate"] = {
        "perplexity": 12.5,
        "kl": 0.25,
        "tokens": 640,
        "window": 64,
        "lm_eval": None,
    }
    result = run(
        *[
            "evaluate",
            "m",
            "--against",
            "o",
            "--text",
            "t.txt",
            "--column",
            "page",
            "--window",
            "64",
            "--windows",
            "10",
            "--tasks",
            "a, b",
        ],
        *["--limit", "5", "--batch-size", "2", "--speed", "--device", "cpu", "--json"],
    )
    assert json.loads(result.stdout)["perplexity"] == 12.5
    arguments, keywords = pipeline.calls["evaluate"]
    keywords.pop("progress")
    assert arguments == ("m",)
    assert keywords == {
        "against": "o",
        "text": "t.txt",
        "column": "page",
        "window": 64,
        "windows": 10,
        "tasks": ["a", "b"],
        "limit": 5,
        "batch_size": 2,
        "speed": True,
        "device": "cpu",
        "restart": False,
    }
    assert "12.5" in run("evaluate", "m").stdout


def test_overflow_in_an_evaluation_ends_with_1(pipeline):
    pipeline.returns["evaluate"] = EvaluationError("perplexity overflows")
    result = run("evaluate", "m", "--json")
    assert (result.exit_code, result.stdout, result.stderr) == (
        1,
        "",
        "error: perplexity overflows\n",
    )


def test_verify_lists_problems_and_ends_with_1(pipeline):
    assert run("verify", "m").stdout == "m: no problems\n"
    pipeline.returns["verify"] = ["config.json: changed", "model.safetensors: cut short"]
    result = run("verify", "m")
    assert result.stdout.splitlines() == pipeline.returns["verify"]
    assert result.stderr == "error: m: 2 problems found\n"
    assert result.exit_code == 1
    assert json.loads(run("verify", "m", "--json").stdout) == {
        "checkpoint": "m",
        "problems": pipeline.returns["verify"],
    }


def test_inspect_and_export_pass_their_paths(pipeline):
    run("inspect", "m", "--plot", "curves.png")
    assert pipeline.calls["inspect"] == (("m",), {"plot": Path("curves.png")})
    run("export", "m", "out", "--format", "dense", "--overwrite")
    arguments, options = pipeline.calls["export"]
    assert (arguments, options.pop("progress") and options) == (
        ("m", Path("out")),
        {"format": "dense", "overwrite": True},
    )


def test_methods_lists_engines_with_paper_and_options():
    listed = {
        record["name"]: record for record in json.loads(run("methods", "--json").stdout)["methods"]
    }
    assert {"low_rank", "utilized_rank"} <= listed.keys()
    assert "arXiv" in listed["low_rank"]["paper"]
    assert listed["low_rank"]["options"]["storage"] == "pivoted"
    assert "low_rank" in run("methods").stdout


def test_presets_lists_titles_and_spells_out_one():
    assert {
        record["name"] for record in json.loads(run("presets", "--json").stdout)["presets"]
    } == set(presets())
    assert "SVD-LLM" in run("presets").stdout
    assert run("presets", "lems").stdout == dump_yaml(load_recipe("lems"))
    assert json.loads(run("presets", "lems", "--json").stdout)["allocation"]["depth_bias"] == 5.0


def test_schema_is_json_either_way():
    assert (
        json.loads(run("schema").stdout) == json.loads(run("schema", "--json").stdout) == schema()
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-c", "svdllm"], ["did you mean 'svd_llm'?"]),
        (["--keep", "1.5"], ["allocation.keep", "1.5"]),
        (["--set", "allocation.kep=1"], ["--set allocation.kep=1", "'allocation.keep'"]),
        (["--target-size", "3 gigs"], ["allocation.target_size", "GiB"]),
        (["--keep", "0.5", "--target-size", "3MB"], ["keep or target_size"]),
        (["--dtype", "int8"], ["output.dtype", "bfloat16"]),
    ],
)
def test_bad_recipes_are_one_line_and_end_with_2_before_any_work(pipeline, arguments, words):
    result = run("compress", "m", "out", *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words), result.stderr
    assert pipeline.calls == {}


def set_all(*settings: str) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--method", "cospadi", *set_all("method.0.candidates.0.options.solver=ksvd")],
            None,
        ),
        (["--keep", "0.5", *set_all("allocation.keep=0.6")], ["--keep", "--set allocation.keep"]),
        (["--text", "t.txt", *set_all("evaluation={enabled: false}")], None),
        (["--plan", "plan.json"], None),
        (["--plan", "plan.json", "--keep", "0.5"], ["--keep: --plan is built as it stands"]),
        (
            ["--plan", "plan.json", *set_all("allocation.probe.rank=0.5")],
            ["--set allocation.probe.rank=0.5: --plan"],
        ),
        (
            [
                *("-c", "best_float", "--plan", "plan.json", "--budget", "5m"),
                *set_all("heal.enabled=false", "repair.enabled=false"),
            ],
            ["--budget: --plan"],
        ),
        (set_all("heal.steps=5"), ["--set heal.steps=5", "heal.enabled=true"]),
        (set_all("heal={steps: 5}"), ["--set heal={steps: 5}", "heal.enabled=true"]),
        (set_all("heal.steps=5", "heal.enabled=true"), None),
        (set_all("heal.rank=5", "heal.enabled=true"), ["heal.train=lora"]),
        (set_all("heal.top=5", "heal.enabled=true"), ["heal.teacher=cached"]),
        (set_all("repair.patience=2"), ["repair.enabled=true"]),
        (set_all("evaluation.limit=5"), ["evaluation.tasks"]),
        (set_all("calibration.anchor=1"), ["calibration.sequential=true"]),
        (set_all("calibration.anchor=1", "calibration.sequential=true"), None),
        (set_all("compensation.metric=gram"), ["compensation.rank"]),
        (["-c", "svd", *set_all("allocation.cap=2")], ["allocation.kind=knapsack"]),
        (
            ["-c", "svd", *set_all("allocation.depth_bias=2")],
            ["damage=fisher_probe or kl_probe"],
        ),
        (set_all("allocation.roles.q=2"), ["allocation.kind=by_role"]),
        (set_all("allocation.shift=0.2"), ["allocation.kind=d_rank"]),
        (["--device", "cpu", *set_all("model.device_map=auto")], ["--device: model.device"]),
    ],
)
def test_compress_uses_every_option_or_refuses_it_in_one_line(pipeline, arguments, words):
    result = run("compress", "m", "out", *arguments)
    if words is None:
        assert result.exit_code == 0, result.stderr
    else:
        assert (result.exit_code, result.stdout, pipeline.calls) == (2, "", {})
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        assert all(word in result.stderr for word in words), result.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["evaluate", "m", "--limit", "5"], "--tasks"),
        (["report", "m", "-o", "page.html", "--tokens", "5"], "--sample"),
        (["sweep", "sweep.yaml", "out", "--dry-run", "--jobs", "2"], "--jobs"),
        (["sweep", "sweep.yaml", "out", "--dry-run", "--restart"], "--restart"),
        (["gate", "m", "--baseline", "b", "--max", "kl=1", "--max-kl", "2"], "twice"),
        (["gate", "m", "--baseline", "b", "--min", "x=1", "--min", "x=2"], "twice"),
        (["calibrate", "m", "out", *set_all("evaluation.windows=3")], "--set evaluation.windows"),
        (["calibrate", "m", "out", *set_all("allocation.keep=0.3")], "--set allocation.keep=0.3"),
        (["compress", "m", "out", "--public"], "--push-to"),
    ],
)
def test_an_option_that_a_verb_would_ignore_is_refused_in_one_line(pipeline, arguments, word):
    result = run(*arguments)
    assert (result.exit_code, result.stdout, pipeline.calls) == (2, "", {})
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert word in result.stderr, result.stderr


def test_calibrate_has_no_options_that_statistics_do_not_depend_on():
    assert options_of("plan") - options_of("calibrate") == {
        *("--keep", "--target-size", "--text", "--window", "--dtype", "--budget", "--stats"),
    }


def test_lm_eval_passes_everything_on(monkeypatch):
    seen = []
    bridge = types.ModuleType("compressor.evaluation.lm_eval")
    bridge.run_cli = lambda arguments: seen.append(arguments) or 3
    monkeypatch.setitem(sys.modules, "compressor.evaluation.lm_eval", bridge)
    monkeypatch.setattr("compressor.evaluation.lm_eval", bridge, raising=False)
    result = run("lm-eval", "run", "--model", "hf", "--tasks", "a,b", "-h", "--json")
    assert seen == [["run", "--model", "hf", "--tasks", "a,b", "-h", "--json"]]
    assert result.exit_code == 3


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("seed: 1\nseed: 2\n", ":2: key 'seed' is repeated"),
        ("allocation: {depth_bias: .nan}\n", ":1: '.nan' is not a finite number"),
        ("model: !!python/object/apply:os.system ['true']\n", ":1: the tag"),
        ("model: &a {}\noutput: *a\n", ":2: '*a' is a YAML alias"),
        ("[" * 5000, ":1: nested deeper"),
        ("# " + "x" * 2**21, ":1: longer than"),
        ("", ":1: empty"),
        ("seed: 1\nsede: 2\n", ":2: unknown key 'sede' in the recipe; did you mean 'seed'?"),
    ],
    ids=["repeated", "nan", "tag", "alias", "deep", "long", "empty", "unknown"],
)
def test_bad_recipe_files_are_one_line_with_their_place_and_end_with_2(
    pipeline, tmp_path, text, place
):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    result = run("compress", "m", "out", "-c", str(file))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {file}{place}")
    assert result.stderr.count("\n") == 1
    assert pipeline.calls == {}
