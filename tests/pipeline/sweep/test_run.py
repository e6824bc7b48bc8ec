"""Sweeps: what is shared is done once, what failed does not stop the rest, what was stopped goes
on.
"""

import json
import signal
import sys
from pathlib import Path

import pytest
from support.processes import dying, forked, wait
from typer.testing import CliRunner

from compressor.calibrate import statistics_folder
from compressor.calibrate.collect import _Pass
from compressor.cli.app import app
from compressor.errors import ConfigError
from compressor.pipeline import run as pipeline
from compressor.pipeline.sweep import run as sweep
from compressor.pipeline.sweep.points import read_points
from compressor.runtime.progress import silent

BASE = """
base:
  model: {{name: {model}, device: cpu}}
  calibration: {{source: {text}, windows: 12, length: 32, heldout: 4, batch_size: 4}}
  evaluation: {{source: {text}, windows: 4, window: 32}}
"""


@pytest.fixture(autouse=True)
def page(monkeypatch):
    """The number of checkpoints in place of a page about them, whose figures take longer than a
    sweep of tiny models.
    """
    monkeypatch.setattr(sweep.page, "write", lambda runs, output: output.write_text(str(len(runs))))


@pytest.fixture
def points(tiny_llama, text_file, tmp_path):
    def read(rest):
        path = tmp_path / "sweep.yaml"
        path.write_text(BASE.format(model=tiny_llama, text=text_file) + rest)
        return read_points(path)

    return read


def without_times(output: Path) -> list[dict]:
    rows = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def counted(monkeypatch, owner, name) -> list[None]:
    calls, real = [], getattr(owner, name)
    monkeypatch.setattr(
        owner, name, lambda *args, **kwargs: (calls.append(None), real(*args, **kwargs))[1]
    )
    return calls


def test_five_sizes_calibrate_decompose_and_probe_once_and_score_as_alone(
    points, tmp_path, monkeypatch
):
    from compressor.allocation import decompose
    from compressor.pipeline import stages

    passes, decomposed, probed = (
        counted(monkeypatch, owner, name)
        for owner, name in ((_Pass, "over"), (decompose, "_prepare"), (stages, "probe"))
    )
    found = points("grid: {config: [default], allocation.keep: [0.9, 0.8, 0.7, 0.6, 0.5]}")
    result = sweep.run(found, tmp_path / "out")
    assert (len(passes), len(decomposed), len(probed)) == (1, 14, 14)
    assert result["failed"] == 0 and [row["status"] for row in result["points"]] == ["done"] * 5
    alone = pipeline.compress(found[3].recipe, tmp_path / "alone")
    row = without_times(tmp_path / "out")[3]
    assert (row["kl"], row["perplexity"]) == (
        pytest.approx(alone["kl"], rel=1e-9),
        pytest.approx(alone["perplexity"]["compressed"]),
    )
    assert row["kept"] == alone["kept"]["targets"] and row["settings"] == {
        "config": "default",
        "allocation.keep": 0.6,
    }
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "points",
        "report.html",
        "results.jsonl",
    ]


def test_points_with_other_needs_share_one_calibration(points, tmp_path, monkeypatch):
    passes = counted(monkeypatch, _Pass, "over")
    result = sweep.run(
        points("grid: {config: [svd_llm, fwsvd, default, gptq_w4]}"), tmp_path / "out"
    )
    assert result["failed"] == 0 and len(passes) == 1


def test_statistics_of_a_sweep_that_searches_more_are_collected_again(
    points, tmp_path, monkeypatch
):
    asked = counted(monkeypatch, pipeline, "calibrate")
    more = "[{method.0.candidates.0.options.metric: two_sided}]"
    for search in ("[]", "[]", more):
        task = sweep.Sweep(
            points(f"runs: {{a: {{allocation.search: {search}}}}}"), tmp_path / "out"
        )
        (place,) = sweep._calibrated(task, {sweep.family(task.points[0])}, silent).values()
    assert (
        len(asked) == 2
        and statistics_folder.load_statistics(place).popitem()[1].grad_gram is not None
    )


def test_a_point_that_fails_is_named_and_run_again_alone(points, tmp_path, monkeypatch):
    found = points(
        "grid: {config: [svd_llm]}\nruns:\n  small: {config: svd_llm, allocation.keep: 0.01}\n  "
        "odd: {config: svd}"
    )
    real = pipeline.compress
    broken = {"odd": MemoryError("no memory left")}

    def compress(recipe, output, **options):
        if output.name in broken:
            raise broken[output.name]
        return real(recipe, output, **options)

    monkeypatch.setattr(pipeline, "compress", compress)
    result = sweep.run(found, tmp_path / "out")
    assert result["failed"] == 2
    done, small, odd = without_times(tmp_path / "out")
    assert (done["status"], small["status"], odd["status"]) == ("done", "failed", "failed")
    assert "least" in small["error"] and odd["error"] == "MemoryError: no memory left"
    assert (tmp_path / "out" / "work").is_dir()
    assert (tmp_path / "out" / "report.html").read_text() == "1"
    broken.clear()
    again = counted(monkeypatch, pipeline, "compress")
    assert sweep.run(found, tmp_path / "out")["failed"] == 1 and len(again) == 2
    assert without_times(tmp_path / "out")[2]["status"] == "done"


def test_killed_twice_a_sweep_ends_as_an_unbroken_one(points, tmp_path):
    found = points("grid: {config: [svd_llm, svd, welore], allocation.keep: [0.8, 0.6]}")
    sweep.run(found, tmp_path / "unbroken")
    for call in (2, 2):

        def doomed(call=call):
            pipeline.write = dying(pipeline.write, call, "before")
            sweep.run(found, tmp_path / "out")

        assert wait(forked(doomed)) == -signal.SIGKILL
    sweep.run(found, tmp_path / "out")
    assert without_times(tmp_path / "out") == without_times(tmp_path / "unbroken")
    for path in (tmp_path / "unbroken" / "points").iterdir():
        other = tmp_path / "out" / "points" / path.name
        assert (path / "model.safetensors").read_bytes() == (
            other / "model.safetensors"
        ).read_bytes()


def test_finished_points_are_not_run_again_and_others_are_refused(points, tmp_path, monkeypatch):
    found = points("runs: {a: {config: svd_llm}, b: {config: svd}}")
    sweep.run(found, tmp_path / "out")
    again = counted(monkeypatch, pipeline, "compress")
    sweep.run(found, tmp_path / "out")
    assert not again
    more = points("runs: {a: {config: svd_llm}, b: {config: svd}, c: {config: lord}}")
    sweep.run(more, tmp_path / "out")
    assert len(again) == 1 and len(without_times(tmp_path / "out")) == 3
    changed = points("runs: {a: {config: svd_llm, seed: 3}}")
    with pytest.raises(
        ConfigError,
        match=r"points/a: holds another run: seed is 0 there and 3 here; pass --restart",
    ):
        sweep.run(changed, tmp_path / "out")
    sweep.run(changed, tmp_path / "out", restart=True)
    assert len(again) == 2


@pytest.mark.faults
def test_processes_give_the_same_results_and_one_that_dies_is_one_point(
    points, tmp_path, monkeypatch
):
    found = points(
        "runs: {a: {config: svd_llm}, b: {config: svd_llm, allocation.keep: 0.6}, c: {config: svd}}"
    )
    sweep.run(found, tmp_path / "here")
    real = sweep.subprocess.run

    def run(command, **options):
        if '/points/c"' in options["input"]:
            command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
        return real(command, **options)

    monkeypatch.setattr(sweep.subprocess, "run", run)
    result = sweep.run(found, tmp_path / "out", jobs=2)
    assert result["failed"] == 1 and "killed by signal 9" in result["points"][2]["error"]
    monkeypatch.undo()
    assert sweep.run(found, tmp_path / "out", jobs=2)["failed"] == 0
    for one, two in zip(
        without_times(tmp_path / "here"), without_times(tmp_path / "out"), strict=True
    ):
        assert one | {"kl": 0, "perplexity": 0, "heldout_kl": 0} == two | {
            "kl": 0,
            "perplexity": 0,
            "heldout_kl": 0,
        }
        assert one["kl"] == pytest.approx(two["kl"], rel=1e-4)


def test_places_that_are_not_a_sweeps_are_refused(points, tmp_path):
    found = points("runs: {a: {config: svd}}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="holds something else than a sweep"):
        sweep.run(found, tmp_path / "other")
    with pytest.raises(ConfigError, match="exists and is not a folder"):
        sweep.run(found, tmp_path / "other" / "thesis.tex")
    with (
        sweep._alone(sweep.Sweep(found, tmp_path / "out")),
        pytest.raises(ConfigError, match="another process runs a sweep there"),
    ):
        sweep.run(found, tmp_path / "out")


def test_a_dry_run_prints_points_and_runs_nothing(points, tmp_path):
    points("grid: {config: [svd_llm, default], allocation.keep: [0.8, 0.6]}")
    result = CliRunner().invoke(
        app, ["sweep", str(tmp_path / "sweep.yaml"), str(tmp_path / "out"), "--dry-run", "--json"]
    )
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["points"]
    assert [row["name"] for row in rows] == [
        "svd_llm+keep=0.8",
        "svd_llm+keep=0.6",
        "default+keep=0.8",
        "default+keep=0.6",
    ]
    assert rows[0]["bytes"] > rows[1]["bytes"] > 0 and rows[0]["seconds"] > rows[1]["seconds"]
    assert not (tmp_path / "out").exists()


def test_no_point_beats_one_that_is_marked():
    rows = [
        {"bytes": 10, "kl": 0.5},
        {"bytes": 12, "kl": 0.5},
        {"bytes": 12, "kl": 0.1},
        {"bytes": 9, "kl": None},
        {"status": "failed"},
    ]
    assert [row.get("best") for row in sweep.pareto(rows)] == [True, False, True, None, None]
