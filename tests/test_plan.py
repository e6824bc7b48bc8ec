"""plan.json: what is written is read again, in this version and in the one before."""

import json

import pytest

from compressor.errors import ConfigError
from compressor.pipeline.run import read_plan
from compressor.plan import VERSION, Choice, Plan

MEMBERS = ("layers.0.q", "layers.0.k")
SIZES = {"bits": 8, "parameters": 1, "dense_bits": 16, "dense_parameters": 2}
PLAN = Plan(
    {name: Choice("compot", {"atoms": 4}, **SIZES, members=MEMBERS) for name in MEMBERS},
    contest={"single_linears": 0.2, "with_residuals": 0.1, "finer_bases": 0.3, "all": 0.2},
    search={"kinds": [0], "in_order": {"kept": True}},
)


def test_a_plan_survives_json():
    data = json.loads(json.dumps(PLAN.to_json()))
    assert data == PLAN.to_json() and data["version"] == VERSION == 2
    assert Plan.from_json(data) == PLAN


def test_files_of_version_1_are_read():
    data = PLAN.to_json()
    del data["version"]
    for choice in data["linears"].values():
        choice["setting"] = choice["setting"] | {"shared": choice.pop("members")}
    data["contest"] = {
        "single linears": 0.2,
        "with residuals": 0.1,
        "finer bases instead": 0.3,
        "all": 0.2,
    }
    data["search"] = {"kinds": [0], "in order": {"kept": True}}
    assert Plan.from_json(json.loads(json.dumps(data))) == PLAN


def test_files_of_a_later_version_are_refused(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(PLAN.to_json() | {"version": VERSION + 1}))
    with pytest.raises(ConfigError, match="version 3, this release reads 2"):
        read_plan(path)
