"""What each linear of a decoder block is for: one table of projection names, believed only where
structure agrees.

Attention projections q, k, v must be siblings that receive the same tensor, and so must gate and
up; o needs them beside it. Two-layer MLPs are fc1 and fc2, also where a model calls them up and
down without a gate.
"""

from collections.abc import Iterable
from typing import Any

ROLES = {  # role: endings of the module path inside a block
    "q": ("q_proj",),
    "k": ("k_proj",),
    "v": ("v_proj",),
    "qkv": ("qkv_proj", "query_key_value", "c_attn", "Wqkv"),
    "o": (
        "o_proj",
        "out_proj",
        "attn.c_proj",
        "attention.dense",
        "self_attn.dense",
        "self_attention.dense",
    ),
    "gate": ("gate_proj",),
    "up": ("up_proj",),
    "gate_up": ("gate_up_proj",),
    "down": ("down_proj",),
    "fc1": ("fc1", "c_fc", "fc_in", "dense_h_to_4h"),
    "fc2": ("fc2", "mlp.c_proj", "fc_out", "dense_4h_to_h"),
}

GROUPS = {  # linears with a decision in common
    "qkv": (
        "q",
        "k",
        "v",
    ),  # these two read the same inputs, and recipes may let them share or tie them
    "gate_up": ("gate", "up"),
    "ffn": ("gate", "up", "gate_up", "down", "fc1", "fc2"),  # these are what module methods work on
    "attention": ("q", "k", "v", "qkv", "o"),
    "vo": ("v", "o"),
    "qk": ("q", "k"),
    "pair": tuple(ROLES),  # linears of one role, two at a time
}


def roles_of(names: Iterable[str], feeds: dict[str, str]) -> dict[str, str]:
    """Role by linear name, for those whose siblings and inputs agree with the table.

    names: linears inside decoder blocks; feeds: name → first linear that received the same input
    tensor, without linears that never ran.
    """
    roles: dict[str, str] = {}
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(name.rpartition(".")[0], []).append(name)
    for siblings in families.values():
        named = {
            role: name
            for name in siblings
            for role, ends in ROLES.items()
            if f".{name}".endswith(tuple(f".{end}" for end in ends))
        }
        if (
            not {"gate", "gate_up"} & named.keys()
        ):  # an ungated MLP whose projections are called up and down
            named = {
                {"up": "fc1", "down": "fc2"}.get(role, role): name for role, name in named.items()
            }
        known = (
            {"q", "k", "v", "qkv", "o"}
            if "qkv" in named or _fed_together(named, feeds, {"q", "k", "v"})
            else set()
        )
        known |= (
            {"gate", "up", "gate_up", "down"}
            if "gate_up" in named or _fed_together(named, feeds, {"gate", "up"})
            else set()
        )
        known |= {"fc1", "fc2"} if {"fc1", "fc2"} <= named.keys() else set()
        roles |= {name: role for role, name in named.items() if role in known}
    return roles


def _fed_together(named: dict[str, str], feeds: dict[str, str], members: set[str]) -> bool:
    return members <= named.keys() and len({feeds.get(named[role]) for role in members}) == 1


def head_dim(model: Any, name: str, role: str | None) -> int:
    """Width of an attention head of a projection; 0 for other linears, and for q and k beside norms
    of their own.
    """
    if role not in ("q", "k", "v", "o"):
        return 0
    siblings = [child for child, _ in model.get_submodule(name.rpartition(".")[0]).named_children()]
    if role in ("q", "k") and any("norm" in child for child in siblings):
        return 0
    config = model.config.get_text_config()
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
