"""Faults while a run is under way: it is killed or told to stop, what it left is changed, damaged,
or nobody wants it any more.
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from support.processes import forked, killed_after, wait
from support.shell import bytes_of, compress, killed, refused, run

pytestmark = pytest.mark.faults

IN_ORDER = {"calibration__sequential": True, "compensation__keep": 0.1, "allocation__keep": 0.7}
RECIPES = {
    "svd_llm": IN_ORDER,
    "gptq_w4": {"method__0__candidates__0__options__group": "[auto:16]"},
    "oats": {"allocation__keep": 0.7},
    "channels": {"allocation__keep": 0.8},
}
POINTS = 24


def command(tiny_llama: Path, output: Path, text_file: Path, *more: object) -> list[object]:
    return compress(tiny_llama, output, text_file, *more, **IN_ORDER)


@pytest.fixture(scope="module")
def expected(tiny_llama, text_file, tmp_path_factory) -> dict[str, str]:
    """What an unbroken run writes."""
    output = tmp_path_factory.mktemp("expected") / "out"
    assert run(*command(tiny_llama, output, text_file)).exit_code == 0
    return bytes_of(output)


def test_f01_killed_while_weights_are_written(tiny_llama, text_file, expected, tmp_path):
    """SIGKILL while weights are written: the old output is untouched, and the same command ends
    with the bytes of an unbroken run.
    """
    output = tmp_path / "out"
    assert run(*compress(tiny_llama, output, text_file)).exit_code == 0
    before = bytes_of(output)
    again = command(tiny_llama, output, text_file, "--overwrite")
    killed(again, "compressor.checkpoint.weights.write_shard")
    assert bytes_of(output) == before != expected
    assert run(*again).exit_code == 0
    assert {name: digest for name, digest in bytes_of(output).items() if name not in DIFFERING} == {
        name: digest for name, digest in expected.items() if name not in DIFFERING
    }
    assert os.listdir(tmp_path) == ["out"]


DIFFERING = (
    "recipe.yaml",
    "manifest.json",
    "README.md",
    "plan.json",
    "report.json",
)  # they say that --overwrite was given


@pytest.mark.parametrize(
    "where",
    ["compressor.allocation.decompose._prepare", "compressor.calibrate.streams.solve_block"],
)
def test_f03_killed_inside_a_layer(tiny_llama, text_file, expected, tmp_path, where):
    """SIGKILL inside a layer: the layers before it are not done again, and the end is the bytes of
    an unbroken run.
    """
    output, calls = tmp_path / "out", 2
    killed(command(tiny_llama, output, text_file), where, calls)
    pieces = sorted((output.parent / "out.journal" / "store").iterdir())
    times = {path: path.stat().st_mtime_ns for path in pieces}
    killed(command(tiny_llama, output, text_file), "compressor.pipeline.run.write")
    assert pieces and all(path.stat().st_mtime_ns == times[path] for path in pieces)
    assert run(*command(tiny_llama, output, text_file)).exit_code == 0
    assert bytes_of(output) == expected


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_f04_told_to_stop(tiny_llama, text_file, expected, tmp_path, number, code):
    """SIGTERM or Ctrl-C: the state is kept, one line says how to go on, exit 143 or 130."""
    output, said = tmp_path / "out", tmp_path / "stderr"

    def stopped():
        import compressor.allocation.decompose as module

        real, calls = module._prepare, []
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # jobs that a shell has put into the background ignore it

        def prepare(*args):
            calls.append(None)
            if len(calls) == 3:
                os.kill(os.getpid(), number)
                time.sleep(5)
            return real(*args)

        module._prepare = prepare
        result = run(*command(tiny_llama, output, text_file))
        said.write_text(result.stderr)
        os._exit(result.exit_code)

    assert wait(forked(stopped)) == code
    assert (
        "stopped; the same command goes on from out.journal, `compressor clean` removes it"
        in said.read_text()
    )
    assert not output.exists()
    assert run(*command(tiny_llama, output, text_file)).exit_code == 0
    assert bytes_of(output) == expected


def test_f11_leftovers_of_a_dead_run(tiny_llama, text_file, expected, tmp_path):
    """Leftovers of a run that was killed: reported to others, removed by the run that goes on and
    by `clean` alone.
    """
    output = tmp_path / "out"
    killed(command(tiny_llama, output, text_file), "compressor.files.manifest.build")
    left = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert [name.partition("-")[0] for name in left] == ["out.journal", "out.partial"]
    other = run(
        "export",
        shutil.copytree(_made(tiny_llama, text_file, tmp_path / "elsewhere"), tmp_path / "copy"),
        output,
    )
    assert other.exit_code == 0 and left[1] in other.stderr
    shutil.rmtree(output)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) == left
    assert run(*command(tiny_llama, output, text_file)).exit_code == 0
    assert bytes_of(output) == expected
    killed(command(tiny_llama, tmp_path / "second", text_file), "compressor.files.manifest.build")
    cleaned = run("clean", tmp_path / "second")
    assert (
        cleaned.exit_code == 0
        and "second.journal" in cleaned.stdout
        and "second.partial-" in cleaned.stdout
    )
    assert not list(tmp_path.glob("second*"))


def _made(model: Path, text: Path, output: Path) -> Path:
    assert run(*compress(model, output, text)).exit_code == 0
    return output


def test_f29_another_run_finds_the_journal(tiny_llama, text_file, tmp_path, monkeypatch):
    """The recipe, weights, text, seed or version differ from those of the run that was stopped:
    refused with the difference, exit 2.
    """
    output = tmp_path / "out"
    killed(command(tiny_llama, output, text_file), "compressor.pipeline.stages.probe_all")
    other_text = tmp_path / "text.txt"
    other_text.write_text("w7 w8 w9\n" * 3000)
    other_model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    weights = bytearray((other_model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other_model / "model.safetensors").write_bytes(weights)
    smaller = compress(tiny_llama, output, text_file, **IN_ORDER | {"allocation__keep": 0.6})
    start = f"error: {output}.journal: was left by another run: "
    for changed, difference in (
        (smaller, "recipe.allocation.keep is 0.7 there and 0.6 here"),
        (command(other_model, output, text_file), "fingerprint.model is"),
        (command(tiny_llama, output, other_text), "fingerprint.windows is"),
        (command(tiny_llama, output, text_file, "--seed", 5), "recipe.seed is 0 there and 5 here"),
    ):
        assert refused(run(*changed), 2, difference, "--restart").startswith(start)
    monkeypatch.setitem(
        __import__("compressor.resume.store", fromlist=["store"]).VERSIONS, "compressor", "0.0.9"
    )
    refused(
        run(*command(tiny_llama, output, text_file)), 2, "compressor is", "there and 0.0.9 here"
    )
    monkeypatch.undo()
    assert run(*smaller, "--restart").exit_code == 0


def test_f30_a_damaged_journal(tiny_llama, text_file, expected, tmp_path):
    """The journal is cut short or its bytes have changed: said aloud, pieces whose checksum holds
    are used, the others made again.
    """
    output = tmp_path / "out"
    killed(command(tiny_llama, output, text_file), "compressor.pipeline.run.write")
    pieces = sorted((tmp_path / "out.journal" / "store").iterdir())
    for number, path in enumerate(pieces):
        content = path.read_bytes()
        damaged = (content[: len(content) // 2], content[:40] + b"\0" + content[41:], b"", content)[
            number % 4
        ]
        path.write_bytes(damaged)
    (tmp_path / "out.journal" / "run.json").write_text('{"compressor": "0')
    result = run(*command(tiny_llama, output, text_file))
    assert result.exit_code == 0 and "run.json" in result.stderr
    assert sum(f"{path} is damaged" in result.stderr for path in pieces) == len(pieces) - len(
        pieces[3::4]
    )
    assert bytes_of(output) == expected


@pytest.mark.parametrize("preset", RECIPES)
def test_killed_at_random_moments_runs_end_with_the_bytes_of_an_unbroken_one(
    tiny_llama, text_file, tmp_path, preset
):
    made = RECIPES[preset]
    start = time.monotonic()
    whole = _with(preset, tiny_llama, tmp_path / "expected" / "out", text_file, made)
    assert run(*whole).exit_code == 0
    length, expected = time.monotonic() - start, bytes_of(tmp_path / "expected" / "out")
    moments = random.Random(preset)
    hits = 0
    for number in range(POINTS // len(RECIPES)):
        arguments = _with(preset, tiny_llama, tmp_path / str(number) / "out", text_file, made)
        hits += killed_after(
            lambda arguments=arguments: run(*arguments), moments.uniform(0, 0.8) * length
        )
        if (tmp_path / str(number) / "out").exists() and not (
            tmp_path / str(number) / "out.journal"
        ).exists():
            continue  # the machine was faster this time: it had finished
        result = run(*arguments)
        assert result.exit_code == 0, result.stderr
        assert bytes_of(tmp_path / str(number) / "out") == expected
        assert [path.name for path in (tmp_path / str(number)).iterdir()] == ["out"]
    assert hits > POINTS // len(RECIPES) // 2


def _with(preset: str, model: Path, output: Path, text: Path, settings: dict) -> list[object]:
    arguments = compress(model, output, text, **settings)
    arguments[arguments.index("svd_llm")] = preset
    return arguments
