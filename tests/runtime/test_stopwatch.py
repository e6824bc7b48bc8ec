"""Stopwatch and peak memory."""

import json
import time

import pytest

from compressor.runtime.stopwatch import STAGES, Stopwatch, peak_memory

MIB = 1 << 20


def test_stages_add_up_and_failures_count(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 10.0, 11.5, 20.0, 20.25, 30.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    stopwatch = Stopwatch()
    with stopwatch("probe"):
        pass
    with stopwatch("probe"):
        pass
    with pytest.raises(KeyError), stopwatch("write"):
        raise KeyError
    assert stopwatch.seconds() == dict.fromkeys(STAGES, 0.0) | {
        "probe": 3.5,
        "write": 0.25,
        "total": 30.0,
    }


def test_unknown_stage_is_refused():
    with (
        pytest.raises(ValueError, match="unknown stage 'prob'; stages: calibrate, probe"),
        Stopwatch()("prob"),
    ):
        pass


def test_json_has_the_promised_keys():
    found = json.loads(json.dumps(Stopwatch().to_json(), allow_nan=False))
    assert found.keys() == {"seconds", "peak_memory_bytes", "peak_device_memory_bytes", "host"}
    assert list(found["seconds"]) == [
        "calibrate",
        "probe",
        "decompose",
        "allocate",
        "train",
        "write",
        "evaluate",
        "total",
    ]
    assert found["host"].keys() == {
        "name",
        "system",
        "cpus",
        "threads",
        "device",
        "python",
        "torch",
    }


def test_peak_memory_grows_with_what_is_held_and_does_not_fall():
    before = peak_memory()
    held = bytearray(
        b"x" * (before + 64 * MIB)
    )  # more than was ever resident, so the mark must move
    during = peak_memory()
    assert during > len(held)
    del held
    assert peak_memory() >= during


def test_peak_memory_without_proc_is_in_bytes(monkeypatch):
    expected = peak_memory()
    monkeypatch.setattr("compressor.runtime.stopwatch.Path.exists", lambda self: False)
    assert (
        expected / 2 < peak_memory() < 100 * expected
    )  # ru_maxrss may start at the peak of the launching process
