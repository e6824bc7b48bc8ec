"""Faults of the texts: what is calibrated and evaluated on, recipes, and a hub that cannot be
reached.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.folders import WEIGHTS, edit_tensors
from support.models import read_json
from support.shell import calibrate, compress, refused, run

import compressor
from compressor.calibrate import sources
from compressor.pipeline import job
from compressor.recipe.load import load_recipe

pytestmark = pytest.mark.faults


def test_f24_texts_that_are_hardly_texts(tiny_llama, tmp_path, monkeypatch):
    """Text that is empty, one line, too short, binary, CRLF, with a BOM, not UTF-8 or one huge
    line: a warning or a refusal with counts.
    """
    monkeypatch.setattr(sources, "LONG_LINE", 5_000)
    words = b" ".join(b"w%d" % (3 + n % 90) for n in range(2000))
    refusals = {
        b"": "no text (1 blank documents)",
        b" \n\r\n": "no text",
        b"w3 w4 w5": "3 tokens of text, where one window needs 32",
        b"\0\1\0": "binary, not text (the first of 2 zero bytes is at 0)",
        b"caf\xe9 cr\xe8me": "not UTF-8: byte 0xe9 at offset 3 (2 bad places)",
    }
    warnings = {
        words: "1 lines are longer than",
        words.replace(
            b" ", b"\r\n"
        ): "1999 carriage returns (CRLF or CR line ends) were read as newlines",
        b"\xef\xbb\xbf"
        + words[:1000]: "windows of 32 tokens, where 12 were asked for; all are used",
    }
    path = tmp_path / "text.txt"
    for content, message in refusals.items():
        path.write_bytes(content)
        refused(run(*compress(tiny_llama, tmp_path / "never", path)), 1, path, message)
    assert not (tmp_path / "never").exists()
    for number, (content, message) in enumerate(warnings.items()):
        path.write_bytes(content)
        result = run(*calibrate(tiny_llama, tmp_path / f"stats{number}", path))
        assert (
            result.exit_code == 0 and f"{path}: " in result.stderr and message in result.stderr
        ), result.stderr


def test_f31_recipes_that_do_not_say_what_they_mean(tmp_path, monkeypatch):
    """Unknown or repeated keys, .nan, tags, aliases, 5,000 levels, 50 MB, nothing: one line with
    the place and exit 2; 1e-3 is a number.
    """
    monkeypatch.setattr(job, "open_source", lambda *_: pytest.fail("work was done"))
    path = tmp_path / "recipe.yaml"
    bomb = "a: &a [x]\nb: [" + ", ".join(["*a"] * 10) + "]\n"
    refusals = {
        "allocation:\n  kep: 0.5\n": (2, "unknown key 'kep'"),
        "seed: 1\nseed: 2\n": (2, "key 'seed' is repeated"),
        "allocation: {keep: .nan}\n": (1, "'.nan' is not a finite number"),
        "seed: !!python/object/apply:os.system ['true']\n": (1, "the tag"),
        bomb: (2, "alias"),
        "[" * 5000: (1, "nested deeper"),
        "a: [" + "1, " * (50 * 2**20 // 3): (1, "longer than"),
        "": (1, "empty"),
        "seed: 010\n": (1, "ambiguous"),
    }
    for text, (line, words) in refusals.items():
        path.write_text(text)
        refused(
            run("compress", "reference", tmp_path / "never", "-c", path),
            2,
            f"{path}:{line}: ",
            words,
        )
    path.write_text("allocation: {depth_bias: 1e-3}\n")
    monkeypatch.undo()
    assert load_recipe(path).allocation.depth_bias == 0.001
    assert not (tmp_path / "never").exists()


def test_f34_evaluations_that_fail(tiny_llama, model, checkpoint, text_file, tmp_path):
    """An evaluation gives NaN, overflows, or its text is empty or missing: exit not 0, the
    checkpoint kept, scores null with the reason.
    """
    (tmp_path / "empty.txt").touch()
    for number, (text, words) in enumerate(
        {tmp_path / "empty.txt": "no text", tmp_path / "none.txt": "none.txt"}.items()
    ):
        output = tmp_path / str(number)
        result = run(*compress(tiny_llama, output, text_file, "--text", text, "--json"))
        assert (
            result.exit_code == 1
            and "the checkpoint is written, its evaluation failed" in result.stderr.splitlines()[-1]
        )
        for found in (json.loads(result.stdout), read_json(output / "report.json")):
            assert (
                found["kl"] is None
                and found["perplexity"] == {"original": None, "compressed": None}
                and words in found["reason"]
            )
        assert run("verify", output).exit_code == 0
        refused(run("evaluate", output, "--text", text), 1, words)
    edit_tensors(model / WEIGHTS, lambda tensors: tensors["lm_head.weight"].mul_(1e6))
    refused(
        run("evaluate", model, "--text", text_file, "--window", 32, "--json"),
        1,
        "overflow as a perplexity",
    )
    edit_tensors(model / WEIGHTS, lambda tensors: tensors["lm_head.weight"].fill_(math.nan))
    refused(
        run(
            "evaluate",
            checkpoint,
            "--against",
            model,
            "--text",
            text_file,
            "--window",
            32,
            "--json",
        ),
        1,
        "is nan",
    )


LOCAL_THEN_HUB = """
import socket
from typer.testing import CliRunner
from compressor.cli.app import app

def refuse(*_, **__):
    raise AssertionError("a socket was opened")

kept = socket.create_connection, socket.getaddrinfo, socket.socket.connect
socket.create_connection = socket.getaddrinfo = socket.socket.connect = refuse
local = CliRunner().invoke(app, {local!r})
assert local.exit_code == 0, (local.stderr, local.exception)
socket.create_connection, socket.getaddrinfo, socket.socket.connect = kept
app(["compress", "organisation/model", "never"])
"""


def test_f36_no_network(tiny_llama, text_file, tmp_path, monkeypatch):
    """No network, a dead proxy, no token: local inputs work and open no socket; what needs the hub
    is refused naming the variables.
    """
    words = ("organisation/model", "HF_HUB_OFFLINE", "HF_TOKEN", "HTTPS_PROXY")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(run("compress", "organisation/model", tmp_path / "never"), 1, *words)

    environment = {
        key: value
        for key, value in os.environ.items()
        if "PROXY" not in key.upper() and not key.startswith("HF_")
    }
    environment |= {
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
    }
    environment |= {"PYTHONPATH": str(Path(compressor.__file__).parents[1])}
    local = [str(part) for part in compress(tiny_llama, tmp_path / "out", text_file)]
    code = LOCAL_THEN_HUB.format(local=local)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and done.stdout == "", done.stderr
    assert all(word in done.stderr.splitlines()[-1] for word in words)
