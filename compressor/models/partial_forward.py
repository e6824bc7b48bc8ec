"""Forward passes in which some modules run otherwise: pass on a cached output, run once more in
the backward pass, or end the pass.

The stock `model.forward` runs; decoder blocks that need no recomputation hand on a cached output.
Masks, positions and whatever else a model computes around its blocks come from its own code, so
nothing here knows an architecture.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from compressor.errors import CompressorError
from compressor.models.linears import blocks

# ‖full − restarted‖ / ‖full‖ of outputs; 0 on CPUs, while some GPU kernels add in varying order
RESTART_TOLERANCE = 1e-2


class Stop(Exception):
    """Ends a forward pass behind the last module that is needed."""


def stop(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook that ends the pass."""
    raise Stop


def input_device(model: PreTrainedModel) -> torch.device:
    """Device for token ids: that of the model, or the CPU where accelerate moves them."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def run_until_stopped(model: PreTrainedModel, input_ids: Tensor) -> Any:
    """Run the model until a hook raises Stop; return its output, None if it was stopped."""
    try:
        return model(input_ids=input_ids.to(input_device(model)), use_cache=False)
    except Stop:
        return None


@contextmanager
def capturing(
    register: Callable[[Callable[..., None]], Any], pick: Callable[..., Any]
) -> Iterator[list[Any]]:
    """Hook a module inside the `with`: what `pick` takes of the hook's arguments is put into the
    list, and the pass ends there.
    """
    seen: list[Any] = []

    def take(*hooked: Any) -> None:
        seen.append(pick(*hooked))
        raise Stop

    handle = register(take)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def watching(modules: Iterable[nn.Module]) -> Iterator[list[Any]]:
    """List what each module returns (a tensor or a tuple) inside the `with`, in order."""
    outputs: list[Any] = []
    handles = [
        module.register_forward_hook(lambda module, args, output: outputs.append(output))
        for module in modules
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def passing(modules: Iterable[nn.Module], outputs: list[Any]) -> Iterator[None]:
    """Let each module return its cached output."""
    with standing_in(
        modules, [lambda *args, _output=output, **kwargs: _output for output in outputs]
    ):
        yield


@contextmanager
def recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Keep of every decoder block only what went in until the backward pass runs the block again;
    gradients are the same.

    Transformers' own way asks for a model in training mode, with dropout.
    """
    modules = blocks(model)[1]
    again = [
        partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
        for module in modules
    ]
    with standing_in(modules, again):
        yield


@contextmanager
def standing_in(modules: Iterable[nn.Module], forwards: Sequence[Callable]) -> Iterator[None]:
    """Let each module run another `forward`; the modules stay, since models read attributes of
    their blocks.
    """
    modules = list(modules)
    # accelerate puts its own `forward` into the dictionary of a module
    hidden = [module.__dict__.get("forward") for module in modules]
    try:
        for module, forward in zip(modules, forwards, strict=True):
            module.forward = forward
        yield
    finally:
        for module, former in zip(modules, hidden, strict=True):
            if former is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = former


def require_restartable(model: PreTrainedModel, full: Tensor, restarted: Tensor, cure: str) -> None:
    """Raise CompressorError, ending with `cure`, if a pass restarted between the modules of a model
    does not give the output of the full pass: hidden states or logits.
    """
    if (full - restarted).norm() > RESTART_TOLERANCE * full.norm():
        raise CompressorError(
            f"{type(model).__name__}: a forward pass restarted between its blocks differs from "
            f"the full one; {cure}"
        )
