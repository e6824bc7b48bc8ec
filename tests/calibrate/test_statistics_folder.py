"""Statistics on disk: exact, shared tensors once, damage and foreign runs refused."""

import json
import os
import resource

import pytest
import torch

from compressor.calibrate.statistics_folder import (
    DESCRIPTION,
    TENSORS,
    load_statistics,
    save_statistics,
)
from compressor.errors import CompressorError, ConfigError, DataError
from compressor.statistics import LinearStats

FINGERPRINT = {
    "model": "abc",
    "windows": "def",
    "seed": 0,
    "dtype": "float32",
    "gradients": {"labels": "data", "clip": None},
}
SIDE = 40


@pytest.fixture
def stats() -> dict[str, LinearStats]:
    generator = torch.Generator().manual_seed(0)
    shared, own, vector = (
        torch.randn(SIDE, SIDE, dtype=torch.float64, generator=generator) for _ in range(3)
    )
    return {
        "q": LinearStats(tokens=9, gram=shared, grad_tokens=8, grad_gram=own),
        "k": LinearStats(tokens=9, gram=shared, sum=vector[0]),
        "o": LinearStats(tokens=9),
    }


@pytest.fixture
def folder(tmp_path, stats):
    save_statistics(tmp_path / "stats", stats, FINGERPRINT)
    return tmp_path / "stats"


def test_round_trip_is_exact_and_keeps_sharing(folder, stats):
    loaded = load_statistics(folder, FINGERPRINT)
    assert list(loaded) == list(stats)
    for name, one in stats.items():
        for field in ("tokens", "grad_tokens"):
            assert getattr(loaded[name], field) == getattr(one, field)
        for field in ("gram", "sum", "abs_sum", "fisher", "grad_gram"):
            mine, theirs = getattr(one, field), getattr(loaded[name], field)
            assert (mine is None) == (theirs is None)
            assert mine is None or (theirs.dtype == torch.float64 and torch.equal(mine, theirs))
    assert loaded["q"].gram is loaded["k"].gram


def test_files_written_once_each_and_readable(folder):
    assert {path.name for path in folder.iterdir()} == {DESCRIPTION, TENSORS, "manifest.json"}
    assert (folder / TENSORS).stat().st_size < 8 * (
        2 * SIDE**2 + SIDE
    ) + 1000  # the shared Gram is there once
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_every_difference_is_named_with_both_values(folder):
    other = FINGERPRINT | {
        "seed": 7,
        "gradients": {"labels": "sampled", "clip": None},
        "device": "cuda",
    }
    with pytest.raises(DataError) as caught:
        load_statistics(folder, other)
    message = str(caught.value)
    for part in (
        "seed is 0 there and 7 here",
        "gradients.labels is data there and sampled here",
        "device is absent there and cuda here",
    ):
        assert part in message
    assert "model" not in message.split("run:")[1] and "clip" not in message


def test_no_expectation_accepts_any_fingerprint(folder):
    assert load_statistics(folder)["q"].tokens == 9


def test_tuples_of_a_recipe_equal_the_lists_of_json(tmp_path, stats):
    save_statistics(tmp_path / "stats", stats, {"clip": (0.1, 10.0)})
    load_statistics(tmp_path / "stats", {"clip": (0.1, 10.0)})


def test_changed_bytes_are_noticed(folder):
    data = bytearray((folder / TENSORS).read_bytes())
    data[-5] ^= 1
    (folder / TENSORS).write_bytes(data)
    with pytest.raises(DataError, match=rf"{TENSORS}.*sha256.*collect"):
        load_statistics(folder)


def test_missing_cut_or_newer_description_is_refused(folder, tmp_path):
    with pytest.raises(DataError, match="no statistics"):
        load_statistics(tmp_path)
    path = folder / DESCRIPTION
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text) | {"version": 2}))
    with pytest.raises(DataError, match=r"version 2, this version reads .* version 1"):
        load_statistics(folder)
    path.write_text(text[:100])
    with pytest.raises(CompressorError, match=DESCRIPTION):
        load_statistics(folder)


def test_an_existing_folder_is_not_replaced(folder, stats):
    with pytest.raises(ConfigError, match="exists"):
        save_statistics(folder, stats, FINGERPRINT)


def test_a_full_disk_leaves_nothing_and_names_the_file(tmp_path, stats):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(CompressorError, match=TENSORS):
            save_statistics(tmp_path / "stats", stats, FINGERPRINT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []
