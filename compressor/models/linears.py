"""The linears of a model: found by structure, named, grouped by the inputs they share."""

import re
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compressor.errors import ConfigError
from compressor.hf import out_in
from compressor.linears import CompressedLinear, Dense
from compressor.models.quiet import quiet_transformers
from compressor.models.roles import GROUPS, head_dim, roles_of

LISTED = 10  # names printed in an error before "and n more"


@dataclass(frozen=True)
class LinearInfo:
    """A dense linear (nn.Linear or Conv1D) of a model."""

    name: str
    module: nn.Module
    role: str | None  # key of roles.ROLES; None where names and observed inputs do not say
    # a forward pass restarted at this block sees every change of the module; the number of blocks
    # for lm_head
    block: int
    out_features: int
    in_features: int
    conv1d: bool  # the weight is kept as (in, out)
    # name of the first linear that receives the very same input tensor; its own name if it is the
    # first
    feeds: str
    # not in a decoder block, such as lm_head; such modules must be targeted by their exact name
    outside: bool = False
    head_dim: int = (
        0  # of attention projections, see `Dense`; 0 for q and k whose heads are normalised
    )


def blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks: of the ModuleLists whose members all hold linears, the
    one with the most parameters.

    Raises ConfigError if there is none.
    """
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and all(map(_holds_linears, module)):
            found[name] = module
    if not found:
        raise ConfigError(
            f"{type(model).__name__}: no decoder blocks found (a ModuleList of modules that hold "
            "linears)"
        )
    return max(
        found.items(), key=lambda item: sum(parameter.numel() for parameter in item[1].parameters())
    )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def _holds_linears(module: nn.Module) -> bool:
    return not _is_linear(module) and any(map(_is_linear, module.modules()))


def linears(model: PreTrainedModel, patterns: Iterable[str] | None = None) -> dict[str, LinearInfo]:
    """Dense linears by name, in the order of the model: those in decoder blocks, or those that
    `patterns` select.

    A pattern is a glob (`*q_proj`, `model.layers.0.*`) or `re:` and a regular expression, either
    for the whole module name, or `role:` and a role or a group of roles (`role:v`, `role:ffn`). A
    linear outside the blocks is selected by its exact name only. Works on the meta device. Raises
    ConfigError for a pattern that selects nothing.
    """
    prefix, members = blocks(model)
    modules = {
        name: module
        for name, module in model.named_modules()
        if _is_linear(module) and not isinstance(module, CompressedLinear)
    }
    feeds, entered = _observe(model, modules, members)
    inside = {
        name: int(name[len(prefix) + 1 :].split(".")[0])
        for name in modules
        if name.startswith(f"{prefix}.")
    }
    roles = roles_of(inside, feeds)
    infos = {}
    for name, module in modules.items():
        block = inside.get(name, entered.get(name, 0))
        height, width = out_in(module)
        conv1d, outside = isinstance(module, Conv1D), name not in inside
        role, heads = roles.get(name), head_dim(model, name, roles.get(name))
        infos[name] = LinearInfo(
            name, module, role, block, height, width, conv1d, feeds.get(name, name), outside, heads
        )
    if patterns is None:
        return {name: info for name, info in infos.items() if not info.outside}
    patterns = list(patterns)
    for pattern in patterns:
        if not any(selects(pattern, info) for info in infos.values()):
            known = (
                ", ".join(sorted({info.role for info in infos.values() if info.role}))
                or "none that are known"
            )
            cure = (
                f"its roles are {known}"
                if pattern.startswith("role:")
                else f"the nearest is '{_nearest(pattern, infos)}'"
            )
            raise ConfigError(f"target '{pattern}' selects no linear of this model; {cure}")
    return {
        name: info
        for name, info in infos.items()
        if any(selects(pattern, info) for pattern in patterns)
    }


def selects(pattern: str, info: LinearInfo) -> bool:
    """Whether a target pattern selects this linear. Raises ConfigError for an invalid regular
    expression.
    """
    if info.outside:
        return pattern == info.name
    if pattern.startswith("role:"):
        return info.role in GROUPS.get(
            pattern.removeprefix("role:"), (pattern.removeprefix("role:"),)
        )
    if not pattern.startswith("re:"):
        return fnmatchcase(info.name, pattern)
    try:
        return re.fullmatch(pattern.removeprefix("re:"), info.name) is not None
    except re.error as error:
        raise ConfigError(f"target '{pattern}' is not a regular expression: {error}") from None


def _nearest(pattern: str, names: Iterable[str]) -> str:
    names = list(names)
    return (get_close_matches(pattern.removeprefix("re:"), names, n=1, cutoff=0.0) or names)[0]


class _Zeros(TorchDispatchMode):
    """Let value-dependent branches run on the meta device, as if every value were zero."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return torch.zeros((), dtype=args[0].dtype).item()
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty(0, args[0].ndim, dtype=torch.long)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _observe(
    model: PreTrainedModel, modules: dict[str, nn.Module], members: nn.ModuleList
) -> tuple[dict[str, str], dict[str, int]]:
    """Run two tokens; return for each linear that ran the first linear with the same input tensor,
    and the blocks entered before it.
    """
    inputs: list[tuple[Tensor, str]] = []  # holding the tensors keeps their identities apart
    feeds: dict[str, str] = {}
    entered: dict[str, int] = {}
    started: list[nn.Module] = []

    def watch(name: str, module: nn.Module, args: tuple) -> None:
        feeds.setdefault(name, next((first for tensor, first in inputs if tensor is args[0]), name))
        entered.setdefault(name, len(started))
        inputs.append((args[0], name))

    handles = [
        module.register_forward_pre_hook(partial(watch, name)) for name, module in modules.items()
    ]
    handles += [
        block.register_forward_pre_hook(lambda module, args: started.append(module))
        for block in members
    ]
    offloaded = hasattr(model, "hf_device_map")
    device = (
        "cpu" if offloaded and model.device.type == "meta" else model.device
    )  # accelerate moves inputs to where they are needed
    try:
        with (
            quiet_transformers(),
            _Zeros() if model.device.type == "meta" and not offloaded else nullcontext(),
        ):
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return feeds, entered


def covered_share(model: nn.Module, names: Iterable[str]) -> float:
    """Share of the model's parameters (a tied one counts once) that lie in the named linears, 0 to
    1.
    """
    covered = {
        id(parameter): parameter.numel()
        for name in names
        for parameter in model.get_submodule(name).parameters()
    }
    return sum(covered.values()) / sum(parameter.numel() for parameter in model.parameters())


def fused(model: nn.Module) -> dict[str, int]:
    """Numbers in each parameter of three or more dimensions inside the blocks, by name: fused
    experts, which are not linears.
    """
    prefix, members = blocks(model)
    return {
        f"{prefix}.{name}": parameter.numel()
        for name, parameter in members.named_parameters()
        if parameter.ndim > 2
    }


def dense_of(info: LinearInfo, dtype: torch.dtype) -> Dense:
    """Return weight (out, in) and bias (out,) of a linear, detached; offloaded ones are fetched.

    dtype: that of the output.
    """
    with align_module_device(info.module):
        parameters = dict(info.module.named_parameters(recurse=False))
        weight = parameters["weight"].detach()
        bias = parameters["bias"].detach() if "bias" in parameters else None
    return Dense(
        weight.T.contiguous() if info.conv1d else weight, bias, dtype, head_dim=info.head_dim
    )
