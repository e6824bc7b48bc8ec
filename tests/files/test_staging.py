import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.outputs import fail, interrupt, produce, version_of, write

from compressor.errors import CheckpointError, ConfigError
from compressor.files import manifest, staging
from compressor.files.staging import Staging, amend, leftovers, preflight


def test_f6_output_exists(output):
    preflight(output, None, False, 0)
    produce(output, "old")
    for attempt in (lambda: preflight(output, None, False, 0), lambda: produce(output, "new")):
        with pytest.raises(ConfigError, match="--overwrite"):
            attempt()
    assert version_of(output) == "old"
    preflight(output, None, True, 0)
    produce(output, "new", overwrite=True)
    assert version_of(output) == "new"
    assert list(output.parent.iterdir()) == [output]


def test_overwrite_spares_folders_that_hold_no_model(output):
    output.mkdir()
    preflight(output, None, True, 0)  # an empty folder is nobody's loss
    (output / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="holds neither a model nor statistics"):
        preflight(output, None, True, 0)
    with pytest.raises(ConfigError, match="holds neither a model nor statistics"):
        produce(output, "new", overwrite=True)
    assert (output / "thesis.tex").exists()


@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "device", "fifo"])
def test_f8_output_is_no_folder(output, tmp_path, kind):
    if kind == "file":
        output.write_text("keep")
    elif kind == "fifo":
        os.mkfifo(output)
    elif kind == "device":
        output = Path("/dev/null")
    else:
        target = tmp_path / "target"
        if kind == "link":
            produce(target, "old")
        output.symlink_to(target)
    for attempt in (
        lambda: preflight(output, None, True, 0),
        lambda: produce(output, "new", overwrite=True),
    ):
        with pytest.raises(ConfigError, match=r"not a folder|symbolic link"):
            attempt()


def test_f8_output_overlaps_the_input(tmp_path):
    source = tmp_path / "a" / "model"
    source.mkdir(parents=True)
    write(source, "source")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "a" / "config.json").touch()
    for output in (
        source / "out",
        source,
        source / "x" / "y",
        tmp_path / "link" / "out",
        tmp_path / "a",
        source / ".." / "model" / "out",
    ):
        with pytest.raises(ConfigError, match="overlap"):
            preflight(output, source, True, 0)
    with pytest.raises(ConfigError, match="overlap"):
        preflight(source / "out", tmp_path / "link", True, 0)
    preflight(tmp_path / "a" / "model2", source, False, 0)


@pytest.mark.parametrize("place", ["/proc/out", "/dev/null/out", "file/out"])
def test_f10_output_not_writable(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write in"):
        preflight(tmp_path / place, None, False, 0)


def test_preflight_leaves_nothing_and_makes_no_folder(tmp_path):
    preflight(tmp_path / "deep" / "down" / "out", None, False, 0)
    assert list(tmp_path.iterdir()) == []
    produce(tmp_path / "deep" / "down" / "out", "new")
    assert version_of(tmp_path / "deep" / "down" / "out") == "new"


def test_output_written_with_dots(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.json").touch()
    monkeypatch.chdir(tmp_path / "here")
    for output in (Path("."), Path("../here"), Path("x/..")):
        with pytest.raises(ConfigError, match="here: exists already"):
            preflight(output, None, False, 0)
    produce(Path("../other/../out"), "new")
    assert version_of(tmp_path / "out") == "new"
    preflight(Path(), None, True, 0)
    produce(Path(), "new", overwrite=True)
    assert version_of(tmp_path / "here") == "new"


def test_preflight_wants_enough_room(output):
    free = shutil.disk_usage(output.parent).free
    preflight(output, None, False, free // 2)
    with pytest.raises(CheckpointError, match=r"needs about .* bytes, .* are free"):
        preflight(output, None, False, free * 2)


class Fuse:
    """Raises, or kills the process, before or after the n-th call of what it wraps; counts the
    calls.
    """

    def __init__(self, monkeypatch, blow, at: int, after: bool):
        self.blow, self.at, self.after, self.calls = blow, at, after, 0
        for module, name in (
            (os, "rename"),
            (os, "fsync"),
            (shutil, "rmtree"),
            (manifest, "build"),
            (manifest, "digest"),
            (os, "mkdir"),
        ):
            monkeypatch.setattr(module, name, self.wrap(getattr(module, name)))

    def wrap(self, function):
        def call(*args, **kwargs):
            self.calls += 1
            mine = self.calls
            if mine == self.at and not self.after:
                self.blow()
            result = function(*args, **kwargs)
            if mine == self.at and self.after:
                self.blow()
            return result

        return call


@pytest.mark.parametrize("blow", [interrupt, fail])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("before", ["old", None])
def test_f2_f7_interrupted_at_any_step_is_old_or_new(tmp_path, monkeypatch, blow, after, before):
    seen = set()
    for at in range(1, 100):
        output = tmp_path / str(at) / "out"
        output.parent.mkdir()
        if before:
            produce(output, before)
        with monkeypatch.context() as patch:
            fuse = Fuse(patch, blow, at, after)
            try:
                produce(output, "new", overwrite=True)
                stopped = False
            except (KeyboardInterrupt, CheckpointError):
                stopped = True
        assert version_of(output) in {before, "new"}
        seen.add(version_of(output))
        if version_of(output) == before:
            left = [path.name for path in output.parent.iterdir() if path != output]
            assert [name for name in left if ".old-" in name or ".lock" in name] == []
        if fuse.calls < at:
            assert not stopped
            break
    assert at > 10
    assert seen == {before, "new"}


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from compressor.files.staging import Staging

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

point, rename = sys.argv[2], os.rename
with Staging(Path(sys.argv[1]), overwrite=True) as stage:
    (stage.folder / "config.json").write_text('"new"')
    if point == "writing":
        kill()
    (stage.folder / "model.safetensors").write_bytes(b"new" * 100)
    if point == "before the renames":
        os.rename = kill
    if point == "between the renames":
        os.rename = lambda *names: rename(*names) or setattr(os, "rename", kill)
    if point == "after the renames":
        shutil.rmtree = kill
    stage.commit()
"""


@pytest.mark.parametrize(
    ("point", "found", "aside"),
    [
        ("writing", "old", None),
        ("before the renames", "old", None),
        ("between the renames", None, "old"),
        ("after the renames", "new", "old"),
    ],
)
def test_f2_f7_killed(output, caplog, point, found, aside):
    produce(output, "old")
    environment = os.environ | {"PYTHONPATH": str(Path(staging.__file__).parents[2])}
    result = subprocess.run(
        [sys.executable, "-c", KILLED, output, point],
        env=environment,
        capture_output=True,
        timeout=60,
    )
    assert result.returncode == -signal.SIGKILL
    assert version_of(output) == found
    old = [path for path in leftovers(output) if ".old-" in path.name]
    assert [version_of(path) for path in old] == ([aside] if aside else [])
    preflight(
        output, None, True, 0
    )  # what is left is reported, not touched, and does not stop the next run
    assert all(str(path) in caplog.text for path in leftovers(output))
    produce(output, "newer", overwrite=True)
    assert version_of(output) == "newer"


def test_f9_second_writer_of_one_output_is_refused(output):
    with Staging(output) as first:
        with pytest.raises(
            ConfigError, match=f"another process is writing it .*{first.folder.name}"
        ):
            produce(output, "second")
        write(first.folder, "first")
        first.commit()
    assert version_of(output) == "first"
    assert list(output.parent.iterdir()) == [output]


def test_output_that_appears_meanwhile_is_kept(output):
    with pytest.raises(ConfigError, match="exists already"), Staging(output) as stage:
        write(stage.folder, "new")
        output.mkdir()
        write(output, "theirs")
        stage.commit()
    assert (output / "config.json").read_text() == '"theirs"'
    assert list(output.parent.iterdir()) == [output]


def test_error_while_writing_removes_the_staging_folder(output):
    with pytest.raises(ZeroDivisionError), Staging(output) as stage:
        write(stage.folder, "new")
        raise ZeroDivisionError
    assert list(output.parent.iterdir()) == []


def test_old_folder_that_cannot_be_removed_is_reported(output, monkeypatch, caplog):
    produce(output, "old")
    monkeypatch.setattr(shutil, "rmtree", lambda path: fail())
    with caplog.at_level(logging.WARNING):
        produce(output, "new", overwrite=True)
    assert version_of(output) == "new"
    assert "could not be removed" in caplog.text


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_follow_the_umask(output, mask):
    former = os.umask(mask)
    try:
        produce(output, "new")
        amend(output, {"report.json": "{}"})
    finally:
        os.umask(former)
    assert {path.stat().st_mode & 0o777 for path in output.iterdir()} == {0o666 & ~mask}
    assert output.stat().st_mode & 0o777 == 0o777 & ~mask
