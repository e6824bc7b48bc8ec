"""Roles on hand-made lists of names and shared inputs, without a model."""

import pytest

from compressor.models.roles import roles_of


def named(
    parent: str, *children: str, shared: tuple[str, ...] = ()
) -> tuple[list[str], dict[str, str]]:
    """Names under one parent, and feeds in which the `shared` children receive one tensor."""
    names = [f"{parent}.{child}" for child in children]
    return names, {
        f"{parent}.{child}": f"{parent}.{shared[0] if child in shared else child}"
        for child in children
    }


QKV = ("q_proj", "k_proj", "v_proj")


@pytest.mark.parametrize(
    ("parent", "children", "shared", "roles"),
    [
        ("h.0.attn", (*QKV, "o_proj"), QKV, ["q", "k", "v", "o"]),
        (
            "h.0.attn",
            (*QKV, "o_proj"),
            QKV[1:],
            [None] * 4,
        ),  # cross-attention: k and v read something else
        ("h.0.attn", ("q_proj", "o_proj"), (), [None] * 2),
        ("h.0.mixer", ("in_proj", "out_proj"), (), [None] * 2),  # a state-space block
        ("h.0.attn", ("Wqkv", "out_proj"), (), ["qkv", "o"]),
        (
            "h.0.mlp",
            ("gate_proj", "up_proj", "down_proj"),
            ("gate_proj", "up_proj"),
            ["gate", "up", "down"],
        ),
        ("h.0.mlp", ("gate_proj", "up_proj", "down_proj"), (), [None] * 3),
        ("h.0.mlp", ("up_proj", "down_proj"), (), ["fc1", "fc2"]),
        ("h.0.mlp", ("fc_in", "fc_out"), (), ["fc1", "fc2"]),
        ("h.0.mlp", ("fc2",), (), [None]),
        ("h.0.mlp", ("c_fc", "c_proj"), (), ["fc1", "fc2"]),
        ("h.0.attn", ("c_attn", "c_proj"), (), ["qkv", "o"]),
        ("h.0.mlp", ("xfc1", "xfc2"), (), [None] * 2),
    ],
)
def test_names_count_where_inputs_agree(parent, children, shared, roles):
    names, feeds = named(parent, *children, shared=shared)
    assert [roles_of(names, feeds).get(name) for name in names] == roles


def test_siblings_need_not_be_neighbours():
    """A block that lists its own fc1, then a submodule, then its own fc2."""
    names = ["h.0.fc1", "h.0.attn.qkv_proj", "h.0.fc2", "h.1.fc1"]
    assert roles_of(names, {name: name for name in names}) == {
        "h.0.fc1": "fc1",
        "h.0.fc2": "fc2",
        "h.0.attn.qkv_proj": "qkv",
    }


def test_linears_that_never_ran_are_judged_by_their_siblings():
    """Experts that two tokens did not reach."""
    names, _ = named("h.0.experts.7", "gate_proj", "up_proj", "down_proj")
    assert list(roles_of(names, {}).values()) == ["gate", "up", "down"]
