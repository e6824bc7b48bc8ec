"""Units of several linears, as methods take them apart."""

from collections.abc import Iterable
from typing import Any

from compressor.linears import CompressedLinear
from compressor.methods.base import Member, Method


def compress_members(
    method: Method, state: Any, setting: dict[str, Any], members: Iterable[Member]
) -> dict[str, CompressedLinear]:
    """Build the modules of one setting, by the names of the members."""
    outputs = {member.linear: len(member.dense.weight) for member in members}
    return method.compress_unit(state, setting, outputs)
