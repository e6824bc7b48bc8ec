"""Faults while output is written: kills, a full disk, places that cannot or must not be written,
two writers.
"""

import os
import shutil
import socket
import stat
from pathlib import Path

import pytest
from click.testing import Result
from support.modules import disk_of_20_kb, full_disk
from support.processes import forked, wait
from support.shell import bytes_of, calibrate, compress, killed, refused, run

from compressor.pipeline import job
from compressor.pipeline import run as pipeline

pytestmark = pytest.mark.faults


def reported_or_gone(result: Result, leftover: Path) -> bool:
    return leftover.name in result.stderr or not leftover.exists()


def test_f02_killed_before_the_output_is_in_place(tiny_llama, text_file, tmp_path):
    """SIGKILL between the last shard, the index and the rename: there is no half model under the
    output's name, and the next run works.
    """
    points = {
        "compressor.checkpoint.weights.write_shard": 3,  # a shard is missing
        "compressor.checkpoint.write.write_other_files": 1,  # the index is the last thing written
        "compressor.files.manifest.build": 1,
        "os.rename": 1,
    }
    for number, (where, call) in enumerate(points.items()):
        output = tmp_path / str(number) / "out"
        command = compress(tiny_llama, output, text_file, output__shard_size="20KB")
        killed(command, where, call)
        assert not output.exists()
        left = [path for path in output.parent.iterdir() if path.name.startswith("out.partial-")]
        assert len(left) == 1
        again = run(*command)
        assert again.exit_code == 0 and reported_or_gone(again, left[0])
        assert run("verify", output).exit_code == 0


def test_f05_disk_full(tiny_llama, text_file, old, tmp_path, monkeypatch):
    """Disk full in a shard, the journal, a report, statistics or a result: exit 1, the file named,
    old output and journal intact.
    """
    before, overwrite = bytes_of(old), compress(tiny_llama, old, text_file, "--overwrite")
    with disk_of_20_kb():
        refused(run(*overwrite), 1, old.with_name("out.journal"), "File too large")
    killed(overwrite, "compressor.checkpoint.weights.write_shard")
    with disk_of_20_kb():
        refused(run(*overwrite), 1, "model.safetensors", "File too large")
    for name in ("plan.json", "report.json", "README.md", "timings.json"):
        with full_disk(monkeypatch, name):
            refused(run(*overwrite), 1, name, "No space left on device")
    assert bytes_of(old) == before and {path.name for path in old.parent.iterdir()} == {
        "out",
        "out.journal",
    }

    with full_disk(
        monkeypatch, "README.md", spared=1
    ):  # written with the checkpoint, and again with the scores
        refused(run(*overwrite), 1, "README.md", "No space left on device")
    assert run("verify", old).exit_code == 0 and not list(old.glob("*.partial-*"))
    assert run(*overwrite).exit_code == 0 and [path.name for path in old.parent.iterdir()] == [
        "out"
    ]

    with full_disk(monkeypatch, "statistics.json"):
        refused(
            run(*calibrate(tiny_llama, tmp_path / "stats", text_file)),
            1,
            "statistics.json",
        )
    with full_disk(monkeypatch, "page.md"):
        refused(
            run("report", old, "-o", tmp_path / "page.md"), 1, "page.md", "No space left on device"
        )
    assert not (tmp_path / "stats").exists() and not (tmp_path / "page.md").exists()


def test_f06_output_exists(tiny_llama, text_file, old, tmp_path, monkeypatch):
    """The output exists and --overwrite is not given: refused with exit 2 before any work."""
    before = bytes_of(old)
    monkeypatch.setattr(job, "start", lambda *_: pytest.fail("work was done"))
    refused(run(*compress(tiny_llama, old, text_file)), 2, old, "--overwrite")
    refused(run("export", old, tmp_path), 2, "exists already")
    (tmp_path / "stats").mkdir()
    refused(
        run(*calibrate(tiny_llama, tmp_path / "stats", text_file)),
        2,
        "exists already",
    )
    assert bytes_of(old) == before


def test_f07_overwrite_is_killed(tiny_llama, text_file, checkpoint, tmp_path):
    """SIGKILL while an output is replaced: it is the old or the new one, or the old one lies aside
    whole under a name that is reported.
    """
    command = [*compress(tiny_llama, tmp_path / "new", text_file, allocation__keep=0.6)]
    assert run(*command).exit_code == 0
    versions = {"old": bytes_of(checkpoint), "new": bytes_of(tmp_path / "new")}
    points = {"os.rename": ("old", 1), "between": (None, 2), "shutil.rmtree": ("new", 1)}
    for point, (expected, call) in points.items():
        output = tmp_path / point / "out"
        shutil.copytree(checkpoint, output)
        command = compress(
            tiny_llama,
            output,
            text_file,
            "--overwrite",
            "--set",
            "evaluation.enabled=false",
            allocation__keep=0.6,
        )
        killed(command, "os.rename" if point == "between" else point, call)
        found = bytes_of(output) if output.exists() else None
        weights = {name: version["model.safetensors"] for name, version in versions.items()}
        assert (found and found["model.safetensors"]) == (expected and weights[expected])
        aside = [path for path in output.parent.iterdir() if ".old-" in path.name]
        assert [bytes_of(path) for path in aside] == (
            [] if expected == "old" else [versions["old"]]
        )
        again = run(*command)
        assert again.exit_code == 0 and all(reported_or_gone(again, path) for path in aside)
        assert run("verify", output).exit_code == 0


def test_f08_output_that_is_no_new_folder(tiny_llama, text_file, model, tmp_path):
    """The output is a file, a link, a device, a pipe, inside the input, the input or around it:
    refused with exit 2, nothing touched.
    """
    (tmp_path / "file").write_text("keep")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "pipe")
    for output in (tmp_path / "file", tmp_path / "link", tmp_path / "pipe", Path("/dev/null")):
        refused(run(*compress(tiny_llama, output, text_file, "--overwrite")), 2, output)
    before = bytes_of(model)
    for output in (model, model / "out", model / "a" / "b"):
        refused(run(*compress(model, output, text_file, "--overwrite")), 2, output, "overlap")
    refused(run(*compress(model, model.parent, text_file, "--overwrite")), 2, model.parent)
    assert bytes_of(model) == before and (tmp_path / "file").read_text() == "keep"
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode) and not (tmp_path / "elsewhere").exists()


def test_f09_two_processes_and_one_output(tiny_llama, text_file, tmp_path, monkeypatch):
    """Two processes write one output: the second is refused with number and host of the first; a
    dead one's lock stops nobody.
    """
    output, (said, say), (heard, tell) = tmp_path / "out", os.pipe(), os.pipe()
    command = compress(tiny_llama, output, text_file)

    def wait_and_die(*_):
        os.write(say, b"1")
        os.read(heard, 1)
        os._exit(0)  # without unlocking, as if killed

    def first():
        pipeline.plan_and_build = wait_and_die
        run(*command)

    child = forked(first)
    try:
        os.read(said, 1)
        with monkeypatch.context() as patch:
            patch.setattr(job, "start", lambda *_: pytest.fail("work was done"))
            refused(
                run(*command),
                2,
                "another process is writing it",
                f"process {child} on {socket.gethostname()}",
            )
    finally:
        os.write(tell, b"1")
        assert wait(child) == 0
    assert not output.exists() and (tmp_path / "out.journal" / "lock").exists()
    assert run(*command).exit_code == 0
    assert run("verify", output).exit_code == 0


def test_f10_output_that_cannot_be_written(
    tiny_llama, text_file, checkpoint, tmp_path, monkeypatch
):
    """The place of the output cannot be written: refused with exit 2 before any work."""
    monkeypatch.setattr(job, "start", lambda *_: pytest.fail("work was done"))
    (tmp_path / "file").touch()
    for output in (tmp_path / "file" / "out", Path("/proc/out")):
        refused(run(*compress(tiny_llama, output, text_file)), 2, output, "cannot write in")
        refused(run("export", checkpoint, output), 2, "cannot write in")
