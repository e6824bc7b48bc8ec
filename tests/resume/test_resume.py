"""Runs that were stopped: the same command goes on to the same bytes, another one is refused, and
nothing is lost or left behind.
"""

import json
import logging
import os
import signal

import pytest
from safetensors.torch import load_file, save_file
from support.processes import contents, dying, forked, wait
from support.recipes import recipe
from typer.testing import CliRunner

from compressor.cli.app import app
from compressor.errors import BudgetError, ConfigError
from compressor.files import staging
from compressor.pipeline import run, stages
from compressor.resume import journal, store

SEQUENTIAL = ["calibration.sequential=true", "compensation.keep=0.1"]


@pytest.fixture(scope="module")
def unbroken(tiny_llama, text_file, tmp_path_factory):
    """A recipe that uses every stage, and what an unbroken run of it writes."""
    made = recipe(tiny_llama, text_file, "allocation.keep=0.6", *SEQUENTIAL)
    folder = tmp_path_factory.mktemp("unbroken") / "out"
    run.compress(made, folder)
    return made, contents(folder)


@pytest.fixture(scope="module")
def pieces(unbroken, tmp_path_factory):
    """How many pieces an unbroken run makes, and how many files it puts in place."""
    counts = {}
    for owner, name in ((store, "_write"), (os, "replace")):
        folder = tmp_path_factory.mktemp("counted") / "out"
        with pytest.MonkeyPatch.context() as patch:
            counts[name] = calls_of(
                owner, name, lambda folder=folder: run.compress(unbroken[0], folder), patch
            )
    return counts


POINTS = {
    "inside the decomposition of a layer": (store, "_write", 4, "before"),
    "while a layer is solved in order": (store, "_write", -12, "after"),
    "before the folder is renamed": (journal.Journal, "note", 1, "after"),
    "before the folder is evaluated": (run, "score", 1, "before"),
    "while the report is amended": (os, "replace", -2, "after"),
}


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_goes_on_to_the_same_bytes(unbroken, pieces, tmp_path, monkeypatch, point):
    made, expected = unbroken
    owner, name, at, when = POINTS[point]
    at = at if at > 0 else pieces[name] + at

    def doomed():
        setattr(owner, name, dying(getattr(owner, name), at, when))
        run.compress(made, tmp_path / "out")

    assert wait(forked(doomed)) == -signal.SIGKILL
    assert (tmp_path / "out.journal").is_dir()
    finished = len(list((tmp_path / "out.journal" / "store").iterdir()))
    made_again = calls_of(
        store, "_write", lambda: run.compress(made, tmp_path / "out"), monkeypatch
    )
    assert contents(tmp_path / "out") == expected
    assert os.listdir(tmp_path) == ["out"]
    assert finished + made_again == pieces["_write"]


def impossible(*args):
    raise AssertionError("done twice")


def calls_of(owner, name, function, monkeypatch) -> int:
    """How often something is called while a function runs."""
    calls, real = [], getattr(owner, name)
    with monkeypatch.context() as patch:
        patch.setattr(
            owner, name, lambda *args, **kwargs: (calls.append(None), real(*args, **kwargs))[1]
        )
        function()
    return len(calls)


def stopped_at(monkeypatch, made, output, error=KeyboardInterrupt):
    """Run until the first layer has been probed, and stop there with an error."""
    with monkeypatch.context() as patch:
        real = stages.probe
        calls = []

        def probe(*args):
            calls.append(None)
            if len(calls) == 2:
                raise error
            return real(*args)

        patch.setattr(stages, "probe", probe)
        with pytest.raises(error):
            run.compress(made, output)


def test_ctrl_c_keeps_the_journal_and_says_how_to_go_on(unbroken, tmp_path, monkeypatch, capsys):
    made, expected = unbroken
    stopped_at(monkeypatch, made, tmp_path / "out")
    assert (
        "stopped; the same command goes on from out.journal, `compressor clean` removes it"
        in capsys.readouterr().err
    )
    run.compress(made, tmp_path / "out")
    assert contents(tmp_path / "out") == expected and os.listdir(tmp_path) == ["out"]


def test_another_recipe_model_or_text_is_refused_with_the_difference(
    unbroken, tiny_llama, text_file, tmp_path, monkeypatch
):
    made, expected = unbroken
    out = tmp_path / "out"
    stopped_at(monkeypatch, made, out)
    other_text = tmp_path / "other.txt"
    other_text.write_text(text_file.read_text()[::-1].replace("w", " w") + " w5" * 50)
    other_model = tmp_path / "other"
    other_model.mkdir()
    for path in tiny_llama.iterdir():
        (other_model / path.name).write_bytes(path.read_bytes())
    weights = load_file(other_model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, other_model / "model.safetensors", {"format": "pt"})
    changes = {
        r"recipe\.allocation\.keep is 0\.6 there and 0\.7 here": recipe(
            tiny_llama, text_file, "allocation.keep=0.7", *SEQUENTIAL
        ),
        r"recipe\.seed is 0 there and 1 here": recipe(
            tiny_llama, text_file, "allocation.keep=0.6", "seed=1", *SEQUENTIAL
        ),
        r"fingerprint\.model is": recipe(
            other_model, text_file, "allocation.keep=0.6", *SEQUENTIAL
        ),
        r"fingerprint\.windows is": recipe(
            tiny_llama, other_text, "allocation.keep=0.6", *SEQUENTIAL
        ),
    }
    for message, changed in changes.items():
        with pytest.raises(
            ConfigError, match=rf"out\.journal: was left by another run: .*{message}.*--restart"
        ):
            run.compress(changed, out)
    monkeypatch.setitem(store.VERSIONS, "compressor", "9.9")
    with pytest.raises(ConfigError, match=r"compressor is 0\.1\.0 there and 9\.9 here"):
        run.compress(made, out)
    monkeypatch.undo()
    run.compress(made, out)
    assert contents(out) == expected


def test_decisions_made_on_other_heldout_text_are_refused(
    text_file, tiny_llama, tmp_path, monkeypatch
):
    text = tmp_path / "text.txt"
    lines = text_file.read_text().splitlines(keepends=True)
    text.write_text("".join(lines))
    made = recipe(tiny_llama, text)
    stopped_at(monkeypatch, made, tmp_path / "out")
    text.write_text(
        "".join([*lines[:-20], *reversed(lines[-20:])])
    )  # where the windows are that nothing is fitted to
    message = r"left by another run: digest of the held-out windows is \w{64} there and \w{64} here; pass --restart"
    with pytest.raises(ConfigError, match=message):
        run.compress(made, tmp_path / "out")


def test_restart_discards_what_was_left(unbroken, tiny_llama, text_file, tmp_path, monkeypatch):
    made, expected = unbroken
    stopped_at(
        monkeypatch,
        recipe(tiny_llama, text_file, "allocation.keep=0.7", *SEQUENTIAL),
        tmp_path / "out",
    )
    run.compress(made, tmp_path / "out", restart=True)
    assert contents(tmp_path / "out") == expected and os.listdir(tmp_path) == ["out"]


def test_a_corrected_recipe_uses_what_the_wrong_one_has_made(
    unbroken, tiny_llama, text_file, tmp_path, monkeypatch
):
    made, expected = unbroken
    with pytest.raises(BudgetError):
        run.compress(
            recipe(tiny_llama, text_file, "allocation.keep=0.101", *SEQUENTIAL), tmp_path / "out"
        )
    with monkeypatch.context() as patch:
        patch.setattr("compressor.allocation.decompose._prepare", impossible)
        run.compress(made, tmp_path / "out")
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("damage", ["a piece", "the description"])
def test_a_damaged_journal_is_made_good_with_a_warning(
    unbroken, tmp_path, monkeypatch, caplog, damage
):
    made, expected = unbroken
    stopped_at(monkeypatch, made, tmp_path / "out")
    left = tmp_path / "out.journal"
    path = (
        left / "run.json"
        if damage == "the description"
        else max((left / "store").iterdir(), key=lambda piece: piece.stat().st_size)
    )
    path.write_bytes(path.read_bytes()[:-7])
    with caplog.at_level(logging.WARNING):
        run.compress(made, tmp_path / "out")
    assert path.name in caplog.text
    assert contents(tmp_path / "out") == expected


def test_two_processes_on_one_output(unbroken, tmp_path, monkeypatch):
    made, _ = unbroken
    stopped_at(monkeypatch, made, tmp_path / "out")
    with (
        journal.Journal(tmp_path / "out"),
        pytest.raises(
            ConfigError, match=rf"out: another process is writing it \(process {os.getpid()} on "
        ),
    ):
        run.compress(made, tmp_path / "out")


def test_clean_removes_what_was_left_and_nothing_else(unbroken, tmp_path, monkeypatch):
    made, _ = unbroken
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stopped_at(monkeypatch, made, tmp_path / "out")
    (tmp_path / "out.partial-host-1-aa").mkdir()
    (tmp_path / "other.journal").mkdir()
    (tmp_path / "cache" / "compressor" / "evaluate-1.journal").mkdir(parents=True)
    result = CliRunner().invoke(app, ["clean", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.stderr
    gone = [path.rpartition("/")[2] for path in json.loads(result.stdout)["removed"]]
    assert gone == ["out.journal", "out.partial-host-1-aa", "evaluate-1.journal"]
    assert sorted(os.listdir(tmp_path)) == ["cache", "other.journal"]
    assert CliRunner().invoke(app, ["clean", str(tmp_path / "out")]).stdout == "nothing was left\n"


def test_a_folder_set_aside_comes_back(unbroken, tmp_path):
    made, expected = unbroken
    out = tmp_path / "out"
    run.compress(made, out)

    def doomed():
        os.rename = dying(os.rename, 1, "after")
        run.compress(
            made.model_copy(update={"output": made.output.model_copy(update={"overwrite": True})}),
            out,
        )

    assert wait(forked(doomed)) == -signal.SIGKILL
    assert not out.exists()
    staging.recover(out)
    assert contents(out) == expected


def test_evaluations_go_on_too(tiny_llama, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = {"text": str(text_file), "window": 32, "windows": 8, "batch_size": 2, "device": "cpu"}
    expected = run.evaluate(str(tiny_llama), str(tiny_llama), **options)
    assert list((tmp_path / "compressor").iterdir()) == []

    def doomed():
        store._write = dying(store._write, 2, "after")
        run.evaluate(str(tiny_llama), str(tiny_llama), **options)

    assert wait(forked(doomed)) == -signal.SIGKILL
    made = calls_of(
        store,
        "_write",
        lambda: run.evaluate(str(tiny_llama), str(tiny_llama), **options),
        monkeypatch,
    )
    assert made == 2
    assert run.evaluate(str(tiny_llama), str(tiny_llama), **options) == expected


def test_calibrations_go_on_too(tiny_llama, text_file, tmp_path):
    made = recipe(tiny_llama, text_file, "calibration.memory=20KiB")
    run.calibrate(made, tmp_path / "expected")

    def doomed():
        store._write = dying(store._write, 2, "after")
        run.calibrate(made, tmp_path / "stats")

    assert wait(forked(doomed)) == -signal.SIGKILL
    assert len(list((tmp_path / "stats.journal" / "store").iterdir())) == 2
    run.calibrate(made, tmp_path / "stats")
    assert contents(tmp_path / "stats") == contents(tmp_path / "expected")


def test_a_journal_that_cannot_be_begun_says_why_and_leaves_nothing(tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device", str(path))

    with (
        pytest.raises(OSError, match="No space left"),
        journal.journaled(tmp_path / "out") as begun,
    ):
        monkeypatch.setattr(
            journal,
            "replace_text",
            lambda path, text: full(path, text) if path.name == journal.RUN else None,
        )
        begun.begin({"recipe": 1})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [None, ConfigError("x"), ValueError("x"), KeyboardInterrupt()])
def test_how_a_run_ends_decides_what_becomes_of_its_journal(tmp_path, capsys, error):
    folder = tmp_path / "out.journal"
    try:
        with journal.journaled(tmp_path / "out") as begun:
            begun.begin({"recipe": 1}).recall("piece", 1, lambda: 1)
            if error is not None:
                raise error
    except (ConfigError, ValueError, KeyboardInterrupt):
        pass
    assert folder.exists() == (error is not None)
    if error is not None:  # after a mistake in the recipe, the pieces serve any run
        assert len(os.listdir(folder / "store")) == 1
        assert (folder / journal.RUN).exists() != isinstance(error, ConfigError)
    stopped = isinstance(error, KeyboardInterrupt)
    assert ("goes on from out.journal" in capsys.readouterr().err) == stopped


def test_another_run_is_refused_again_and_again(tmp_path):
    with pytest.raises(ValueError, match="stop"), journal.journaled(tmp_path / "out") as begun:
        begun.begin({"recipe": 1}).recall("piece", 1, lambda: 1)
        raise ValueError("stop")
    for _ in range(2):
        with (
            pytest.raises(ConfigError, match="left by another run: recipe is 1 there and 2 here"),
            journal.journaled(tmp_path / "out") as other,
        ):
            other.begin({"recipe": 2})
    with journal.journaled(tmp_path / "out", restart=True) as other:
        other.begin({"recipe": 2})
    assert os.listdir(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_a_temporary_one_aloud(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with journal.writable_cache() as folder:
        assert folder.is_dir() and tmp_path not in folder.parents
    assert not folder.exists()
    assert "set XDG_CACHE_HOME to a folder that can be" in caplog.text
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    with journal.writable_cache() as folder:
        assert folder == tmp_path / "home" / "compressor" and folder.is_dir()
