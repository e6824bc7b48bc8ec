"""Faults of sweeps: points that fail, run out of memory or are killed, and files that ask for the
impossible.
"""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from support.shell import killed, refused, run

from compressor.pipeline import run as pipeline
from compressor.pipeline.sweep import run as sweep

pytestmark = pytest.mark.faults


def sweep_file(tmp_path: Path, model: Path, text: Path, rest: str) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(
        f"base:\n  model: {{name: {model}, device: cpu}}\n"
        f"  calibration: {{source: {text}, windows: 12, length: 32, heldout: 4, batch_size: 4}}\n"
        f"  evaluation: {{source: {text}, windows: 4, window: 32}}\n{rest}"
    )
    return path


def rows(output: Path) -> list[dict]:
    found = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def test_f32_points_that_fail(tiny_llama, text_file, tmp_path, monkeypatch):
    """A point of a sweep fails, runs out of memory or is killed: the others finish, exit 1, and the
    next run does what is missing.
    """
    path = sweep_file(
        tmp_path,
        tiny_llama,
        text_file,
        "runs: {a: {config: svd}, b: {config: svd_llm}, c: {config: welore}}",
    )
    unbroken = tmp_path / "unbroken"
    assert run("sweep", path, unbroken).exit_code == 0
    real = pipeline.compress

    def compress(recipe, output, **options):
        if output.name == "a":
            raise MemoryError("cannot allocate")
        return real(recipe, output, **options)

    monkeypatch.setattr(pipeline, "compress", compress)
    result = run("sweep", path, tmp_path / "out")
    assert (
        result.exit_code == 1
        and "1 of 3 points failed; the same command runs them again" in result.stderr
    )
    assert [row["status"] for row in rows(tmp_path / "out")] == [
        "failed",
        "done",
        "done",
    ] and "MemoryError" in result.stdout
    monkeypatch.undo()
    assert run("sweep", path, tmp_path / "out").exit_code == 0
    assert rows(tmp_path / "out") == rows(unbroken)
    real_run = sweep.subprocess.run

    def one_is_killed(command, **options):
        fatal = [sys.executable, "-c", f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"]
        return real_run(fatal if '/points/b"' in options["input"] else command, **options)

    monkeypatch.setattr(sweep.subprocess, "run", one_is_killed)
    result = run("sweep", path, tmp_path / "jobs", "--jobs", 2)
    assert result.exit_code == 1 and [row["status"] for row in rows(tmp_path / "jobs")] == [
        "done",
        "failed",
        "done",
    ]
    assert "killed by signal 9" in rows(tmp_path / "jobs")[1]["error"]


def test_f33_impossible_grids(tmp_path):
    """Two points of a sweep would have one output name, or there are a million: refused with exit 2
    before any work.
    """
    path = tmp_path / "sweep.yaml"
    path.write_text("base: {model: {name: reference}}\ngrid:\n  seed: [1, 1]\n")
    refused(run("sweep", path, tmp_path / "out"), 2, "two points have the output name 'seed=1'")
    values = list(range(1, 1001))
    path.write_text(f"grid:\n  seed: {values}\n  calibration.windows: {values}\n")
    refused(
        run("sweep", path, tmp_path / "out"), 2, f"{path}:1: 1,000,000 points, 10,000 are the most"
    )
    assert not (tmp_path / "out").exists()


def test_a_sweep_of_twelve_points_killed_twice_ends_as_an_unbroken_one(
    text_file, tmp_path, tiny_llama
):
    grid = "grid: {config: [svd, svd_llm, welore, oats], allocation.keep: [0.8, 0.7, 0.6]}\n"
    path = sweep_file(tmp_path, tiny_llama, text_file, grid)
    assert run("sweep", path, tmp_path / "unbroken").exit_code == 0
    killed(["sweep", path, tmp_path / "out"], "compressor.pipeline.run.write", 3)
    killed(["sweep", path, tmp_path / "out"], "compressor.allocation.decompose._prepare", 20)
    result = run("sweep", path, tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert rows(tmp_path / "out") == rows(tmp_path / "unbroken")
    assert sorted(os.listdir(tmp_path / "out")) == ["points", "report.html", "results.jsonl"]
