"""Several processes that heal together: as one process with larger batches, the same bits in all of
them, and an end for all.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from support.models import read_json
from support.processes import contents, forked, wait
from support.stores import Asked
from typer.testing import CliRunner

from compressor.cli.app import app
from compressor.errors import CompressorError, ConfigError
from compressor.pipeline import distributed
from compressor.recipe.load import load_recipe
from compressor.recipe.training import Heal
from compressor.resume.store import FolderStore, ReadOnlyStore
from compressor.runtime import launched as processes
from compressor.training import loop as training
from compressor.training import team as parallel
from compressor.training.loop import Orders, Schedule, Task, fit
from compressor.training.team import ALONE, Team

CLOSE = 1e-5
SECTION = Heal(steps=9, check=3, learning_rate=0.05)
LAUNCH = [
    "launch",
    "--multi_gpu",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    "--main_process_port",
    "0",
]


def toy(size: int) -> Task:
    """Least squares on 10 windows in batches of `size`: a large weight, and a bias that the windows
    6 to 9 alone reach.
    """
    generator = torch.Generator().manual_seed(0)
    x, target = (
        torch.randn(10, 5, 64, generator=generator),
        torch.randn(10, 5, 70, generator=generator),
    )
    parameters = {
        "weight": torch.nn.Parameter(torch.randn(70, 64, generator=generator) / 8),
        "bias": torch.nn.Parameter(torch.ones(70)),
    }
    batches = torch.arange(10).split(size)

    def loss(index: int) -> torch.Tensor:
        found = x[batches[index]] @ parameters["weight"].T
        if late := (batches[index] > 5).tolist():
            found = (
                found + parameters["bias"] * torch.tensor(late)[:, None, None]
                if any(late)
                else found
            )
        return (found - target[batches[index]]).square().mean()

    windows = tuple(map(len, batches))
    return Task(
        "toy",
        parameters,
        len(batches),
        loss,
        lambda: sum(loss(i).item() * n for i, n in enumerate(windows)),
        windows,
    )


def meet(rank: int, port: int, folder: Path, section: Heal) -> None:
    """One of two processes: train, and leave the parameters after the last step, and the best, in a
    file.
    """
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    task, team, real, last = toy(2), Team(2, rank), training._steps, {}

    def steps(*args):
        optimizer = real(*args)
        last.update(
            {name: parameter.detach().clone() for name, parameter in task.parameters.items()}
        )
        return optimizer

    training._steps = steps  # this process is a fork, in which an earlier test may have met nobody
    PartialState._reset_state()
    assert rank == 0 or team.called()
    fit(task, section, 0, (ReadOnlyStore if rank > 0 else FolderStore)(folder), team=team)
    if rank == 0:
        team.dismiss()
    torch.save(
        (last, {name: parameter.detach() for name, parameter in task.parameters.items()}),
        folder / f"{rank}.pt",
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_two_processes_are_one_with_batches_of_twice_the_size(kind, tmp_path):
    section, port = SECTION.model_copy(update={"optimizer": kind}), free_port()
    children = [forked(lambda rank=rank: meet(rank, port, tmp_path, section)) for rank in (0, 1)]
    assert [wait(child) for child in children] == [0, 0]
    (one, best), (other, told) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    expected = fit(toy(4), section, 0).parameters
    for name in expected:
        assert torch.equal(one[name], other[name]) and torch.equal(best[name], told[name])
        torch.testing.assert_close(one[name], expected[name], rtol=CLOSE, atol=CLOSE)


def test_every_batch_has_its_weight_in_the_round_it_belongs_to():
    shares = [
        Schedule(toy(3), SECTION, [0, 1], {}, Team(3, rank)) for rank in range(3)
    ]  # batches of 3, 3, 3 and 1 windows
    assert [one.share(0) for one in shares] == [(0, 1), (1, 1), (2, 1)]
    assert [one.share(1) for one in shares] == [(3, 3), None, None]
    pair = [
        Schedule(toy(4), SECTION, [1], {}, Team(2, rank)).share(0) for rank in (0, 1)
    ]  # of 4, 4 and 2
    assert pair == [(2, 2), None]
    uneven = Schedule(toy(7), SECTION, [0], {}, Team(2, 1)).share(0)
    assert uneven == (1, 2 * 3 / 10)
    assert all(Schedule.of(toy(2), SECTION, 0, ALONE).share(step)[1] == 1 for step in range(9))


def test_what_belongs_to_another_process_is_read_and_not_changed(tmp_path):
    kept, frozen = FolderStore(tmp_path).within("x"), ReadOnlyStore(tmp_path).within("x")
    kept.recall("piece", 1, lambda: {"value": torch.ones(2)})
    before = contents(tmp_path)
    assert torch.equal(frozen.recall("piece", 1, lambda: None)["value"], torch.ones(2))
    assert frozen.recall("piece", 2, lambda: "made") == "made" and frozen.scope == kept.scope
    frozen.forget("piece", 1)
    assert contents(tmp_path) == before


def test_what_the_main_process_tells_comes_to_the_own_device(monkeypatch):
    team = Team(2, 1)
    team.state = SimpleNamespace(device="cpu", wait_for_everyone=lambda: None)
    told = (
        {"list": [{"tensor": ["0", "cuda:0"]}, {"tensor": ["1", "cpu"]}]},
        [(name, (2,), torch.float32) for name in "01"],
    )
    monkeypatch.setattr(parallel, "broadcast_object_list", lambda given: [told])
    monkeypatch.setattr(parallel, "broadcast", lambda tensor: Asked())
    assert team.hear() == ["cuda", "cpu"]


def test_memory_that_runs_out_is_not_blamed_on_another_process():
    with pytest.raises(torch.OutOfMemoryError, match="tried to allocate"), parallel._reporting():
        raise torch.OutOfMemoryError("tried to allocate")
    with (
        pytest.raises(CompressorError, match=r"another process of this run has ended .*\(gone\)"),
        parallel._reporting(),
    ):
        raise RuntimeError("gone")


def test_a_process_that_came_to_another_model_says_so(monkeypatch):
    team = Team(2, 1)
    monkeypatch.setattr(team, "hear", lambda: Orders("another", {}))
    with pytest.raises(
        CompressorError,
        match=r"toy: process 1 came to another model than the main one; are their files the same\?",
    ):
        fit(toy(2), SECTION, 0, team=team)


@pytest.mark.parametrize("verb", [["presets", "--json"], ["compress", "nowhere", "out"]])
def test_another_process_without_a_part_ends_at_once(verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    found = CliRunner().invoke(
        app, [*verb, *(["--log-file", "log"] if verb[0] == "compress" else [])]
    )
    assert found.exit_code == 0 and found.stdout == "" and not list(tmp_path.iterdir())
    said = {
        "presets": "`presets` is done by the main process",
        "compress": "only healing is shared, and heal.enabled is false",
    }[verb[0]]
    assert found.stderr == f"process 1 of 2 ends: {said}\n"


def test_without_healing_a_model_that_is_spread_is_no_reason_to_stop(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes, "process_rank", lambda: 1)
    spread = load_recipe(None, ["model.device_map=auto"], {"model.name": "nowhere"})
    assert (
        distributed.compress(spread, tmp_path / "out") is None
        and "only healing is shared" in capsys.readouterr().err
    )
    healing = load_recipe(
        None, ["model.device_map=auto", "heal.enabled=true"], {"model.name": "nowhere"}
    )
    with pytest.raises(
        ConfigError, match="device_map spreads the model over devices that other processes use"
    ):
        distributed.compress(healing, tmp_path / "out")


def test_what_the_main_process_decides_by_its_clock_must_be_seen(tmp_path):
    made = load_recipe(None, ["heal.enabled=true", "budget=1h"], {"model.name": "nowhere"})
    with pytest.raises(
        ConfigError,
        match=r"process 1 does not see .*out\.journal/store.* its clock has decided; leave budget out",
    ):
        distributed.assist(made, tmp_path / "out", None, None, Team(2, 1))


def command(
    model: Path, text: Path, output: Path, batch: int, processes: int, *sets: str
) -> list[str]:
    small = ["windows=12", "length=32", "heldout=4", "batch_size=4"]
    training = ["enabled=true", "steps=8", "check=4", f"batch_size={batch}"]
    values = (
        [f"calibration.{value}" for value in small]
        + [f"heal.{value}" for value in training]
        + ["allocation.damage=two_sided", *sets]
    )
    given = [
        str(model),
        str(output),
        "--calibration",
        str(text),
        "--text",
        str(text),
        "--keep",
        "0.5",
        "--device",
        "cpu",
        "--json",
    ]
    start = (
        [sys.executable]
        if processes == 1
        else [str(Path(sys.executable).with_name("accelerate")), *LAUNCH, "--num_processes", "2"]
    )
    return [
        *start,
        "-m",
        "compressor",
        "compress",
        *given,
        *(part for value in values for part in ("--set", value)),
    ]


@pytest.mark.slow
def test_accelerate_launch_heals_in_parallel(tiny_llama, text_file, tmp_path):
    def run(name, batch, processes):
        return subprocess.run(
            command(tiny_llama, text_file, tmp_path / name, batch, processes),
            capture_output=True,
            text=True,
            check=True,
        )

    alone, both, again = run("alone", 6, 1), run("both", 3, 2), run("again", 3, 2)
    assert both.stdout.count("\n") == 1 and json.loads(both.stdout) == read_json(
        tmp_path / "both" / "report.json"
    )
    assert both.stderr.count("s  heal (2)") == 1 and contents(tmp_path / "both") == contents(
        tmp_path / "again"
    )
    assert again.returncode == 0 and {path.name for path in tmp_path.iterdir()} == {
        "alone",
        "both",
        "again",
    }
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "both"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=CLOSE, atol=CLOSE)
    one, other = (json.loads(result.stdout)["trained"]["heal"] for result in (alone, both))
    assert other["processes"] == 2 and "processes" not in one and other["kept"]
    assert one["looks"] == pytest.approx(other["looks"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_is_killed_the_others_end(victim, tiny_llama, text_file, tmp_path):
    sets = ["heal.steps=20000", "heal.check=20000"]
    with (tmp_path / "err").open("w") as stream:
        launcher = subprocess.Popen(
            command(tiny_llama, text_file, tmp_path / "out", 2, 2, *sets),
            stdout=subprocess.DEVNULL,
            stderr=stream,
        )
        while "s  heal (1)" not in (tmp_path / "err").read_text():
            assert launcher.poll() is None
        children = {
            int(child.environ()["RANK"]): child
            for child in psutil.Process(launcher.pid).children(recursive=True)
        }
        children[victim].kill()
        assert launcher.wait(60) == 1
    assert not any(child.is_running() for child in children.values())
    assert (tmp_path / "out.journal").is_dir() and not (tmp_path / "out").exists()
