"""Runs of every kind of method, stopped just before they write: nothing is computed twice, and the
bytes are those of an unbroken run.
"""

import pytest
import torch
from support.shell import bytes_of, compress, killed, run

pytestmark = pytest.mark.faults

PRESETS = {
    "modules": {"allocation__keep": 0.7},
    "transact": {"allocation__keep": 0.8},
    "rocket": {"allocation__keep": 0.7},
    "geopair": {"allocation__keep": 0.7},
    "sparse_low_rank": {"allocation__keep": 0.7},
    "eora_24": {"allocation__keep": 0.85},
    "svd_llm_gptq": {},
    "armor": {"allocation__keep": 0.85},
}


def impossible(*args, **options):
    raise AssertionError("done twice")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_storage_kind_comes_back_from_the_journal(
    preset, tiny_llama, text_file, tmp_path, monkeypatch
):
    def command(output):
        arguments = compress(tiny_llama, output, text_file, **PRESETS[preset])
        arguments[arguments.index("svd_llm")] = preset
        return arguments

    result = run(*command(tmp_path / "expected" / "out"))
    assert result.exit_code == 0, result.stderr
    killed(command(tmp_path / "stopped" / "out"), "compressor.pipeline.run.write")
    for where in (
        "compressor.allocation.decompose.built",
        "compressor.pipeline.sequential_solve.built",
    ):
        monkeypatch.setattr(where, impossible)
    monkeypatch.setattr(torch.linalg, "eigh", impossible)
    result = run(*command(tmp_path / "stopped" / "out"))
    assert result.exit_code == 0, result.stderr
    assert bytes_of(tmp_path / "stopped" / "out") == bytes_of(tmp_path / "expected" / "out")
